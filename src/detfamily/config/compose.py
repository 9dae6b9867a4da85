"""Composition: from groups, presets and the overrides of a command line to one config."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detfamily.config.containers import MISSING, Problem, as_written, dotted, nested, raise_all, to_container, walk
from detfamily.config.overrides import Registry, choice, chooses, read_override, set_field
from detfamily.config.plain_values import plain_value_problems
from detfamily.config.registry import folder_of, groups, groups_for, place_of, read_yaml, stamps
from detfamily.errors import ConfigError, nearest

PRESETS = ("family", "experiment", "local")
"""Groups whose choices only set what others declare: a field that they would add is a typo."""

LISTS = ("auxiliary", "encoder_attention")
"""Groups of which a list may be chosen, ``group=[a,b,a]``: the config then holds a list of their choices."""


class _Part(NamedTuple):
    """One file of a composition."""

    path: str
    """Inside the configs folder, without the suffix."""
    body: dict[str, Any]
    """What it says, where it says it."""
    parent: str
    """The path of the file whose defaults list chose it."""

    @property
    def preset(self) -> bool:
        return not set(self.path.split("/")[:-1]).isdisjoint(PRESETS)


def compose(config_name: str, overrides: Sequence[str] = (), configs: Path | None = None) -> DictConfig:
    """Compose a primary config from its groups and the overrides of a command line.

    Hydra decides which files make the config, in which order; fields are set here, one by one, so that each error can
    say which override it is about. Interpolations stay as they are, so a value set later still reaches all that refer
    to it. ``validate`` is the other half of the check.

    Args:
        config_name: a YAML file of the configs folder, without the suffix.
        overrides: ``group=choice``, ``field=value``, ``+field=value`` or ``~field``, in Hydra's grammar; a path needs
            no quotes whatever it contains.
        configs: another folder of configs, for tests.

    Raises:
        ConfigError: an unknown group, choice or field (with the nearest names), an override that cannot be read, a
            value of another kind than its default, a mandatory value that is missing.
    """
    folder = folder_of(configs)
    read_yaml(folder / f"{config_name}.yaml")
    registry = groups_for(config_name, folder)
    parsed = [read_override(text, registry) for text in overrides]
    chosen = [choice(one, registry) for one in parsed if chooses(one, registry)]
    lists = {one.key_or_group: names for one in parsed if chooses(one, registry) and (names := _names_listed(one))}
    composed, schema = _compose_groups(folder, config_name, _one_each(chosen, lists), stamps(folder))
    cfg = copy.deepcopy(composed)
    for one in parsed:
        value = one.value() if chooses(one, registry) else None
        if isinstance(value, list) and one.key_or_group not in lists:
            _check_apart(cfg, one.key_or_group, value)
    for group, names in lists.items():
        alone = (_one_each(chosen, {**lists, group: [name]}) for name in names)
        items = [_compose_groups(folder, config_name, one, stamps(folder))[0][group] for one in alone]
        OmegaConf.update(cfg, group, [as_written(one) for one in items], merge=False)
    for one in parsed:
        if not chooses(one, registry):
            set_field(cfg, schema, one, registry)
    raise_all(Problem(key, f"is missing: pass {dotted(key)}=...") for key, v in walk(as_written(cfg)) if v == MISSING)
    to_container(cfg)  # Follows every interpolation once, so that none fails in the middle of a run.
    return cfg


def _check_apart(cfg: DictConfig, group: str, names: Sequence[Any]) -> None:
    """Refuse several choices that are no list and would end up on top of each other, and a list of none."""
    if group in LISTS:
        raise ConfigError(f"{group}=[] chooses nothing: expected one choice, or one for each layer")
    if "_target_" in (cfg.get(group) or {}):
        raise ConfigError(
            f"{group} is one block, and {len(names)} choices are given for it: {', '.join(map(str, names))}"
        )


def _names_listed(one: Override) -> list[str]:
    """The choices of an override whose list is to be kept as a list; none for any other."""
    value = one.value()
    return [str(name) for name in value] if one.key_or_group in LISTS and isinstance(value, list) else []


def _one_each(chosen: Sequence[str], lists: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Overrides of groups, with the first choice alone where a list is chosen: what Hydra can compose."""
    heads = ((line, line.partition("=")[0]) for line in chosen)
    return tuple(f"{group}='{lists[group][0]}'" if group in lists else line for line, group in heads)


@functools.lru_cache(maxsize=32)
def _compose_groups(
    folder: Path, config_name: str, chosen: tuple[str, ...], state: tuple[tuple[Path, int, int], ...]
) -> tuple[DictConfig, dict[str, Any]]:
    """The composed config before any field is set, and its schema: the same without the presets. Neither to be changed.

    Kept for as long as the files stay in the given state: ablations mostly differ in fields, not in choices.
    """
    parts = _parts(folder, config_name, chosen)
    for group, names in _listed(parts).items():
        alone = [_compose_groups(folder, config_name, (*chosen, f"{group}='{name}'"), state) for name in names]
        cfg = copy.deepcopy(alone[0][0])
        OmegaConf.update(cfg, group, [as_written(one[group]) for one, _ in alone], merge=False)
        return cfg, alone[0][1]
    first = next((index for index, part in enumerate(parts) if part.preset), len(parts))
    common = _merge(OmegaConf.create(), parts[:first])
    cfg = _merge(copy.deepcopy(common), parts[first:])
    OmegaConf.set_struct(cfg, True)
    schema = as_written(_merge(common, [part for part in parts[first:] if not part.preset]))
    for part in parts:
        if part.preset:
            raise_all(plain_value_problems(part.body, schema), f"in {part.path}.yaml: ")
    return cfg, schema


def _parts(folder: Path, config_name: str, chosen: Sequence[str]) -> list[_Part]:
    """The files of a composition in their order, as Hydra's defaults lists say; without Hydra's own."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3", job_name="detfamily"):
            loader = GlobalHydra.instance().config_loader()
            placed = [_placed(line, config_name, folder) for line in chosen]
            found = loader.compute_defaults_list(config_name, placed, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise _composition_error(error, config_name, groups(folder)) from error
    parts = []
    for one in found:
        path = str(one.config_path)
        if not path.startswith("hydra/"):
            body = {key: value for key, value in read_yaml(folder / f"{path}.yaml").items() if key != "defaults"}
            parts.append(_Part(path, nested(one.package or "", body), str(one.parent)))
    return parts


def _listed(parts: Sequence[_Part]) -> dict[str, list[str]]:
    """Groups of which a defaults list chooses several, with the choices: as ``group=[a,b]`` on a command line does."""
    chosen: dict[str, list[str]] = {}
    for part in parts:
        group, _, name = part.path.rpartition("/")
        if group in LISTS and not part.parent.startswith(f"{group}/"):
            chosen.setdefault(group, []).append(name)
    return {group: names for group, names in chosen.items() if len(names) > 1}


def _placed(line: str, config_name: str, folder: Path) -> str:
    """An override of a group, which names the place of the group's choices."""
    group = line.partition("=")[0].lstrip("+~")
    return line.replace(group, place_of(group, config_name, folder), 1)


def _merge(cfg: DictConfig, parts: Iterable[_Part]) -> DictConfig:
    """Put files on top of a config, in place."""
    for part in parts:
        try:
            cfg.merge_with(part.body)
        except OmegaConfBaseException as error:
            raise ConfigError(f"in {part.path}.yaml: {str(error).splitlines()[0]}") from error
    cfg.pop("hydra", None)  # Hydra's own settings, of which a run has no use.
    return cfg


def _composition_error(error: Exception, config_name: str, registry: Registry) -> ConfigError:
    """What Hydra says, shortened, with the nearest names."""
    text = _deepest_message(error)
    where = f"in {match[1]}.yaml: " if (match := re.match(r"In '([^']+)': ", text)) else ""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group in registry:
            return ConfigError(f"{where}{group} has no choice {name!r}: {nearest(name, registry[group])}")
        return ConfigError(f"{where}there is no group {group!r}: {nearest(group, registry)}")
    if match := re.search(r"Could not (?:override|delete) '(([^'@=]+)[^']*)'", text):
        entry, group = match.groups()
        if group not in registry:
            return ConfigError(f"{where}there is no group {group!r}: {nearest(group, registry)}")
        return ConfigError(f"{where}{entry} is not in the defaults list of {config_name}.yaml")
    if match := re.search(r"You must specify '([^']+)'", text):
        choices = registry.get(match[1], [])
        return ConfigError(f"{match[1]} is missing: pass {match[1]}=..., one of {', '.join(choices)}")
    return ConfigError(f"{config_name}.yaml cannot be composed: {text}")


def _deepest_message(error: BaseException) -> str:
    """The message nearest to the cause; Hydra's outer exceptions are often empty, its messages long."""
    message = ""
    cause: BaseException | None = error
    while cause is not None:
        message = str(cause).strip() or message
        cause = cause.__cause__
    return message.split("\nConfig search path:")[0].split("\nSee https:")[0].strip()
