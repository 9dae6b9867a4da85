"""Where configs lie, and what there is to choose from: a group is a folder, a choice is a file."""

from __future__ import annotations

import functools
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detfamily.config.containers import as_written
from detfamily.errors import ConfigError, nearest


def configs_dir() -> Path:
    """The folder of the YAML files: inside an installed package, or ``configs/`` of the repository.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "configs", package.parents[1] / "configs")
    for place in places:
        if place.is_dir():
            return place
    raise ConfigError(f"no configs found, neither in {places[0]} nor in {places[1]}: install detfamily again")


def folder_of(configs: Path | None) -> Path:
    """The folder that a caller means: its own, else that of the package."""
    return (configs or configs_dir()).resolve()


def groups(configs: Path | None = None) -> dict[str, list[str]]:
    """The config groups (folders, nested ones as ``a/b``) and their choices (YAML files, without the suffix)."""
    folder = folder_of(configs)
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        group = file.parent.relative_to(folder).as_posix()
        if group != ".":
            found.setdefault(group, []).append(file.stem)
    return found


def groups_for(config_name: str, configs: Path | None = None) -> dict[str, list[str]]:
    """The groups that overrides of a primary config may name, and their choices.

    A primary config may have choices of its own of a group, in a folder of its name: ``classify/data`` is what
    ``data`` means to ``classify``. Those of other primary configs are not seen.
    """
    folder = folder_of(configs)
    found, own = {}, {}
    for name, choices in groups(folder).items():
        first, _, rest = name.partition("/")
        if rest and first == config_name:
            own[rest] = choices
        elif not (rest and (folder / f"{first}.yaml").is_file()):
            found[name] = choices
    return found | own


def place_of(group: str, config_name: str, configs: Path | None = None) -> str:
    """Where the choices of a group lie for a primary config: ``classify/data``, or ``backbone``."""
    own = f"{config_name}/{group}"
    return own if (folder_of(configs) / own).is_dir() else group


def groups_of(config_name: str, configs: Path | None = None) -> dict[str, list[str]]:
    """The groups in the defaults list of one primary config, in the order of that list, and their choices."""
    folder = folder_of(configs)
    every = groups_for(config_name, folder)
    entries = read_yaml(folder / f"{config_name}.yaml").get("defaults") or []
    names = [str(key).split()[-1].lstrip("/").split("@")[0] for e in entries if isinstance(e, dict) for key in e]
    names = [name.removeprefix(f"{config_name}/") for name in names]
    return {name: every[name] for name in names if name in every}


def stamps(folder: Path) -> tuple[tuple[Path, int, int], ...]:
    """Every config file with its time of change and its size: while they stay, what was composed from them holds."""
    files = [(file, file.stat()) for file in sorted(folder.rglob("*.yaml")) if file.is_file()]
    return tuple((file, state.st_mtime_ns, state.st_size) for file, state in files)


def read_yaml(file: Path) -> dict[str, Any]:
    """One config file as it stands, without resolving anything. Not to be changed: it is read once for all.

    Raises:
        ConfigError: there is no such file (with the nearest names), or it does not hold a YAML mapping.
    """
    if not file.is_file():
        names = [other.stem for other in file.parent.glob("*.yaml")]
        raise ConfigError(f"there is no config {file.stem!r}: {nearest(file.stem, names)}")
    state = file.stat()
    return _load_yaml(file, state.st_mtime_ns, state.st_size)


@functools.cache
def _load_yaml(file: Path, changed: int, size: int) -> dict[str, Any]:
    """Read once while the file stays the same: a table of ablations composes the same files over and over."""
    try:
        loaded = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file} must hold a mapping, not a {type(loaded).__name__}")
    return typing.cast(dict[str, Any], as_written(loaded))
