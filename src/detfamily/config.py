"""Configs: compose them from YAML and overrides, check them against the constructors that they name, build them.

A node is a mapping with ``_target_`` (a class or function of ours, or of torch) and that constructor's arguments; with
``_partial_: true`` it stands for a factory whose remaining arguments the code gives. The constructor's signature is the
schema: an argument that it does not have, or a value that its annotation does not allow, is an error before any work.
Mappings without ``_target_`` hold plain values; their defaults are the schema.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from detfamily.errors import ConfigError, DetfamilyError, nearest

ALLOWED_TARGETS = (
    "detfamily.",
    "torch.nn.",
    "torch.optim.",
    "torchvision.models.",
    "torchvision.ops.",
    "torchvision.transforms.",
)
"""What a config may name. Configs travel inside checkpoints, so they must not reach arbitrary code."""

PRESETS = ("family", "experiment", "local")
"""Groups whose choices only set what others declare: a field that they would add is a typo."""

DERIVED = {"model.num_classes": 1}
"""Values that a run derives from its data, null until then, and what stands in for them while a config is checked."""

_NODE_KEYS = ("_target_", "_partial_")
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_PATH = re.compile(r"(\.{0,2}|~|[A-Za-z]:)[/\\]")
_MISSING = "???"
_USER_ERRORS = (DetfamilyError, ValueError, TypeError, ImportError, OSError)
"""What a constructor raises about what it was given."""

Key = tuple[str | int, ...]


class Problem(NamedTuple):
    """What is wrong with the value at a key, or with the key itself."""

    key: Key
    text: str
    about_key: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Where configs lie, and what there is to choose from
# ---------------------------------------------------------------------------------------------------------------------


def configs_dir() -> Path:
    """The folder of the YAML files: inside an installed package, or ``configs/`` of the repository.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parent
    places = (package / "configs", package.parents[1] / "configs")
    for place in places:
        if place.is_dir():
            return place
    raise ConfigError(f"no configs found, neither in {places[0]} nor in {places[1]}: install detfamily again")


def groups(configs: Path | None = None) -> dict[str, list[str]]:
    """The config groups (folders, nested ones as ``a/b``) and their choices (YAML files, without the suffix)."""
    folder = configs or configs_dir()
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        group = file.parent.relative_to(folder).as_posix()
        if group != ".":
            found.setdefault(group, []).append(file.stem)
    return found


def groups_of(config_name: str, configs: Path | None = None) -> dict[str, list[str]]:
    """The groups in the defaults list of one primary config, in the order of that list, and their choices."""
    folder = configs or configs_dir()
    every = groups(folder)
    entries = _read_yaml(folder / f"{config_name}.yaml").get("defaults") or []
    names = [str(key).split()[-1].lstrip("/").split("@")[0] for e in entries if isinstance(e, dict) for key in e]
    return {name: every[name] for name in names if name in every}


def _read_yaml(file: Path) -> dict[str, Any]:
    """One config file as it stands, without resolving anything."""
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
    return typing.cast(dict[str, Any], _raw(loaded))


# ---------------------------------------------------------------------------------------------------------------------
# Composition
# ---------------------------------------------------------------------------------------------------------------------


def compose(config_name: str, overrides: Sequence[str] = (), configs: Path | None = None) -> DictConfig:
    """Compose a primary config from its groups and the overrides of a command line.

    Hydra resolves the groups; fields are set here, one by one, so that each error can say which override it is about.
    Interpolations stay as they are, so a value set later still reaches all that refer to it. ``validate`` is the
    other half of the check.

    Args:
        config_name: a YAML file of the configs folder, without the suffix.
        overrides: ``group=choice``, ``field=value``, ``+field=value`` or ``~field``, in Hydra's grammar; a path needs
            no quotes whatever it contains.
        configs: another folder of configs, for tests.

    Raises:
        ConfigError: an unknown group, choice or field (with the nearest names), an override that cannot be read, a
            value of another kind than its default, a mandatory value that is missing.
    """
    folder = (configs or configs_dir()).resolve()
    _read_yaml(folder / f"{config_name}.yaml")
    registry = groups(folder)
    parsed = [_parse(text, registry) for text in overrides]
    chosen = [_choice(one, registry, folder) for one in parsed if _chooses(one, registry)]
    cfg, schema = _compose_groups(folder, config_name, chosen, registry)
    for one in parsed:
        if not _chooses(one, registry):
            _set_field(cfg, schema, one, registry)
    problems = [Problem(key, f"is missing: pass {_dotted(key)}=...") for key in _missing_keys(_raw(cfg))]
    _raise_all(problems)
    to_container(cfg)  # Follows every interpolation once, so that none fails in the middle of a run.
    return cfg


def _parse(text: str, registry: Mapping[str, Sequence[str]]) -> Override:
    key, equals, value = text.partition("=")
    if not key or (not equals and not text.startswith("~")):
        raise ConfigError(f"{text!r} is not an override, write key=value: {_meant_by(text, registry)}")
    if _PATH.match(value):
        text = f"{key}={_quoted(os.path.expanduser(value))}"
    one = _read_override(text)
    if one is None and value and os.path.exists(value):
        one = _read_override(f"{key}={_quoted(value)}")
    if one is None:
        raise ConfigError(
            f"cannot read {text!r}: a list is written {key}=[a,b], and text with special characters in two kinds of "
            f'quotes: "{key}={_quoted(value)}"'
        )
    return one


def _read_override(text: str) -> Override | None:
    """The override, or None if it is outside Hydra's grammar or stands for several values."""
    try:
        one = OverridesParser.create().parse_override(text)
    except HydraException:
        return None
    return None if one.is_sweep_override() else one


def _meant_by(word: str, registry: Mapping[str, Sequence[str]]) -> str:
    """A choice given without its group is the likeliest slip."""
    holders = [f"{group}={word}" for group, choices in registry.items() if word in choices]
    return f"did you mean {' or '.join(holders)}?" if holders else nearest(word, registry)


def _quoted(value: str) -> str:
    """A value as quoted text of Hydra's grammar: backslashes count only in front of a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _chooses(one: Override, registry: Mapping[str, Sequence[str]]) -> bool:
    """Whether an override picks from a group (``optimizer={lr: 1}`` sets fields of the choice instead)."""
    return one.key_or_group in registry and not isinstance(one.value(), dict)


def _choice(one: Override, registry: Mapping[str, Sequence[str]], folder: Path) -> str:
    """The override as Hydra wants it, after checking that the choices exist."""
    group, line = one.key_or_group, str(one.input_line)
    if one.is_delete():
        return line
    value = one.value()
    if isinstance(value, list):
        names = [str(name) for name in value]
    else:
        # A choice may be called 50 or 1x: take the text as it was typed, not the number that it parses to.
        names = [value if isinstance(value, str) else line.partition("=")[2].strip()]
    for name in names:
        if not (folder / group / f"{name}.yaml").is_file():
            raise ConfigError(f"{group} has no choice {name!r}: {nearest(name, registry[group])}")
    return line if isinstance(value, (list, str)) else f"{line.partition('=')[0]}='{names[0]}'"


def _compose_groups(
    folder: Path, config_name: str, chosen: list[str], registry: Mapping[str, Sequence[str]]
) -> tuple[DictConfig, dict[str, Any]]:
    """The composed config before any field is set, and its schema: the same without the presets."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3", job_name="detfamily"):
            cfg = hydra_compose(config_name, chosen)
            loader = GlobalHydra.instance().config_loader()
            parts = loader.compute_defaults_list(config_name, chosen, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise _composition_error(error, config_name, registry) from error

    files = [(str(part.config_path), part.package or "") for part in parts]
    bodies = {path: _body(folder, path) for path, _ in files if not path.startswith("hydra/")}
    presets = [path for path in bodies if path.split("/")[0] in PRESETS]
    if not presets:
        return cfg, _raw(cfg)
    schema = OmegaConf.create()
    for path, package in files:
        if path in bodies and path not in presets:
            schema.merge_with(_nested(package, bodies[path]))
    plain = _raw(schema)
    for path in presets:
        _raise_all(_schema_problems(bodies[path], plain, ()), f"in {path}.yaml: ")
    return cfg, plain


def _body(folder: Path, path: str) -> dict[str, Any]:
    return {key: value for key, value in _read_yaml(folder / f"{path}.yaml").items() if key != "defaults"}


def _nested(package: str, body: Any) -> Any:
    for part in reversed(package.split(".") if package else []):
        body = {part: body}
    return body


def _composition_error(error: Exception, config_name: str, registry: Mapping[str, Sequence[str]]) -> ConfigError:
    """What Hydra says, shortened, with the nearest names."""
    text = _deepest_message(error)
    where = f"in {match[1]}.yaml: " if (match := re.match(r"In '([^']+)': ", text)) else ""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group in registry:
            return ConfigError(f"{where}{group} has no choice {choice!r}: {nearest(choice, registry[group])}")
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


def _set_field(
    cfg: DictConfig, schema: Mapping[str, Any], one: Override, registry: Mapping[str, Sequence[str]]
) -> None:
    """Apply ``field=value``, ``+field=value`` or ``~field``."""
    dotted, line = one.key_or_group, str(one.input_line)
    if one.package is not None or "/" in dotted:
        raise ConfigError(f"{line!r}: there is no group {dotted!r}: {nearest(dotted, registry)}")
    key = _split(dotted)
    raw = _raw(cfg)
    adds = one.is_add() or one.is_force_add()
    if not adds:
        _require_field(raw, key, line, registry)
    try:
        if one.is_delete():
            with open_dict(cfg):
                del (OmegaConf.select(cfg, _dotted(key[:-1])) if key[:-1] else cfg)[key[-1]]
            return
        value = _as_typed(one.value(), schema, key, line)
        if not adds and isinstance(value, dict):
            for inner, _ in _leaves(value):
                _require_field(raw, (*key, *inner), line, registry)
        if not any(isinstance(part, int) for part in key):  # Items of lists have no default to compare with.
            _raise_all(_schema_problems(_nested(dotted, value), schema, ()))
        OmegaConf.update(cfg, dotted, value, merge=True, force_add=adds)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{line!r}: {str(error).splitlines()[0]}") from error


def _require_field(raw: Any, key: Key, line: str, registry: Mapping[str, Sequence[str]]) -> None:
    """Refuse to set what does not exist, and say what does."""
    node = raw
    for depth, part in enumerate(key):
        above = _dotted(key[:depth])
        known = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        if part in known:
            node = _child(node, part)
            continue
        if isinstance(node, list):
            raise ConfigError(f"{line!r}: {above} is a list of {len(node)}, counted from 0")
        if not isinstance(node, dict):
            raise ConfigError(f"{line!r}: {above} is {_show(node)}, it has no fields")
        names = [str(name) for name in node if name not in _NODE_KEYS]
        names += list(registry) if depth == 0 else []
        what = f"{above} has no field {part!r}" if above else f"there is no group or field {part!r}"
        close, elsewhere = nearest(str(part), names), _elsewhere(raw, key, node)
        hints = [elsewhere] if elsewhere and not close.startswith("did you mean") else [close, elsewhere]
        raise ConfigError(f"{line!r}: {what}: {'; '.join(filter(None, hints))}")


def _elsewhere(raw: Any, key: Key, parent: Mapping[str, Any]) -> str:
    """Where a field of that name does exist, and whether the constructor would take it."""
    if "_target_" in parent and key[-1] in _parameters(parent):
        return f"{parent['_target_']} takes it although the config does not list it: +{_dotted(key)}=..."
    others = [_dotted(other) for other, _ in _leaves(raw) if other[-1] == key[-1] and other != key]
    return f"{key[-1]} exists as {', '.join(others[:3])}" if others else ""


def _parameters(node: Mapping[str, Any]) -> dict[str, Any]:
    """The names and annotations of a node's constructor; empty if there is none."""
    try:
        return _signature(_locate(node["_target_"])).hints
    except ConfigError:
        return {}


def _as_typed(value: Any, schema: Mapping[str, Any], key: Key, line: str) -> Any:
    """A name or a folder may be called 2017 or 1e3: where text is due, the value is the text that was typed."""
    default, parent = _at(schema, key), _at(schema, key[:-1])
    if not _is_number(value) or not isinstance(default, str):
        return value
    text = line.partition("=")[2].strip()
    if not isinstance(parent, dict) or "_target_" not in parent:
        return value if _is_open(default) else text
    hint = _parameters(parent).get(str(key[-1]), Any)
    number_fits, text_fits = (not any(_value_problems(one, hint, key)) for one in (value, text))
    return text if text_fits and not number_fits else value


def _schema_problems(body: Any, schema: Any, key: Key) -> Iterator[Problem]:
    """Compare plain values with their defaults. Nodes are left to ``validate``, which knows their constructors."""
    if isinstance(schema, dict) and "_target_" in schema and (body is None or isinstance(body, dict)):
        return
    if isinstance(schema, dict) and isinstance(body, dict):
        for name, value in body.items():
            if name in schema:
                yield from _schema_problems(value, schema[name], (*key, name))
            elif schema and not (isinstance(value, dict) and "_target_" in value):
                where = f"{_dotted(key)} has no such field" if key else "there is no such field"
                yield Problem((*key, name), f"is unknown, {where}: {nearest(str(name), map(str, schema))}")
    elif (expected := _kind_expected(body, schema)) is not None:
        yield Problem(key, f"{_show(body)} given, expected {expected} (default {_show(schema)})")


def _kind_expected(value: Any, default: Any) -> str | None:
    """What kind the default asks for, or None if the value is of that kind. A null default allows anything."""
    if default is None or _is_open(default) or _is_open(value) or default == {}:
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "an integer"
    if isinstance(default, float):
        return None if _is_number(value) else "a number"
    if isinstance(default, list):
        return None if isinstance(value, list) else "a list"
    if isinstance(default, dict):
        return None if value is None or isinstance(value, dict) else "a mapping"
    return None if value is None or isinstance(value, str) or _is_number(value) else "text"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_open(value: Any) -> bool:
    """Whether a value is only known later: mandatory, or an interpolation."""
    return isinstance(value, str) and (value == _MISSING or "${" in value)


# ---------------------------------------------------------------------------------------------------------------------
# Validation against the constructors
# ---------------------------------------------------------------------------------------------------------------------


def validate(cfg: DictConfig | dict[str, Any]) -> None:
    """Check every node of a config against the constructor that it names, without building anything.

    Raises:
        ConfigError: all that is wrong, a line each: a target that does not exist or may not be used, an argument that
            its constructor does not have or misses, a value that the annotation does not allow. A value that comes
            from elsewhere by interpolation is reported under the key where it stands.
    """
    raw = _raw(cfg)
    found: dict[Problem, Key] = {}  # A value may be used in many places, but is wrong once.
    for key, text, about_key in _tree_problems(to_container(_with_stand_ins(cfg)), ()):
        origin = (*_origin(raw, key[:-1]), key[-1]) if about_key else _origin(raw, key)
        found.setdefault(Problem(origin, text), key)
    used = {one: f" (used as {_dotted(key)})" if key != one.key else "" for one, key in found.items()}
    _raise_all(Problem(one.key, one.text + via) for one, via in used.items())


def _with_stand_ins(cfg: Any) -> Any:
    """A copy in which values that the run derives have one already, so that what refers to them can be checked."""
    if not isinstance(cfg, DictConfig):
        return cfg
    cfg, raw = OmegaConf.create(cfg), _raw(cfg)
    for dotted, stand_in in DERIVED.items():
        *above, name = _split(dotted)
        parent = _at(raw, tuple(above))
        if isinstance(parent, dict) and name in parent and parent[name] is None:
            OmegaConf.update(cfg, dotted, stand_in)
    return cfg


def _tree_problems(value: Any, key: Key) -> Iterator[Problem]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield from _node_problems(value, key)
        for name in value:
            if isinstance(name, str) and re.fullmatch(r"_\w+_", name) and name not in _NODE_KEYS:
                yield Problem((*key, name), f"is unknown: {nearest(name, _NODE_KEYS)}", about_key=True)
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, child in items:
        yield from _tree_problems(child, (*key, name))


def _node_problems(node: Mapping[str, Any], key: Key) -> Iterator[Problem]:
    """One node: its target, the names of its arguments, their values."""
    try:
        target = _locate(node["_target_"])
    except ConfigError as error:
        yield Problem((*key, "_target_"), str(error))
        return
    parameters, open_ended, hints = _signature(target)
    given = {name: value for name, value in node.items() if not re.fullmatch(r"_\w+_", str(name))}
    for name, value in given.items():
        if name in parameters:
            yield from _value_problems(value, hints.get(name, Any), (*key, name))
        elif not open_ended:
            text = f"is not an argument of {node['_target_']}: {nearest(str(name), parameters)}"
            yield Problem((*key, name), text, about_key=True)
    if not isinstance(node.get("_partial_", False), bool):
        yield Problem((*key, "_partial_"), f"{_show(node['_partial_'])} given, expected true or false")
    elif not node.get("_partial_", False):
        for name, required in parameters.items():
            if required and name not in given:
                yield Problem((*key, name), f"is missing, {node['_target_']} needs it", about_key=True)


def _locate(target: Any) -> Callable[..., Any]:
    """Import what ``_target_`` names.

    Raises:
        ConfigError: it does not exist, cannot be imported, is not callable, or is outside ``ALLOWED_TARGETS``.
    """
    if not isinstance(target, str) or not target.startswith(ALLOWED_TARGETS):
        allowed = ", ".join(prefix + "*" for prefix in ALLOWED_TARGETS)
        raise ConfigError(f"{_show(target)} may not be used in a config, only {allowed}")
    found = _import(target)
    if not callable(found):
        raise ConfigError(f"{target} is not a class or a function")
    if not _home(found).startswith(ALLOWED_TARGETS):  # Reached through an import: detfamily.config.os.system.
        raise ConfigError(f"{target} may not be used in a config: it is {_home(found)}")
    return typing.cast(Callable[..., Any], found)


def _home(value: Any) -> str:
    """Where something was defined, wherever it was found."""
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', '')}"


@functools.cache
def _import(target: str) -> Any:
    parts = target.split(".")
    found: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=1):
        path = ".".join(parts[:depth])
        if not hasattr(found, part) and inspect.ismodule(found):
            _import_module(f"{path}.{part}", target)
        if not hasattr(found, part):
            own = {name for name, value in vars(found).items() if _home(value).startswith(ALLOWED_TARGETS)}
            names = own | {module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))}
            raise ConfigError(f"{path} has no {part!r}: {nearest(part, names)}")
        found = getattr(found, part)
    return found


def _import_module(name: str, target: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ConfigError(f"{target} needs the package {error.name!r}, which is not installed") from error


class _Signature(NamedTuple):
    parameters: dict[str, bool]
    """Name -> whether it must be given."""
    open_ended: bool
    """Whether any other name is taken too."""
    hints: dict[str, Any]


@functools.cache
def _signature(target: Callable[..., Any]) -> _Signature:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # Some compiled callables have none.
        return _Signature({}, True, {})
    named = {
        one.name: one.default is one.empty
        for one in parameters
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return _Signature(named, open_ended, {name: _hint(target, name) for name in named})


def _hint(target: Callable[..., Any], name: str) -> Any:
    """The annotation of one argument; Any if it cannot be resolved (a name imported for type checkers only)."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    function = getattr(function, "__func__", function)
    annotations = getattr(function, "__annotations__", {})
    if name not in annotations:
        return Any
    lone = types.SimpleNamespace(__annotations__={name: annotations[name]})
    try:
        return typing.get_type_hints(lone, globalns=getattr(function, "__globals__", {}))[name]
    except (NameError, TypeError, AttributeError):
        return Any


def _value_problems(value: Any, hint: Any, key: Key) -> Iterator[Problem]:
    """Whether a value may be given where the annotation is ``hint``; what is not understood is allowed."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        hint = typing.get_args(hint)[0]
        origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        yield from _union_problems(value, hint, key)
    elif isinstance(value, list) and _is_sequence(origin or hint):
        yield from _item_problems(value, hint, key)
    elif isinstance(value, dict) and "_target_" not in value and _is_kind(origin or hint, Mapping):
        arguments = typing.get_args(hint)
        for name, child in value.items() if len(arguments) == 2 else ():
            yield from _value_problems(child, arguments[1], (*key, name))
    elif not _fits(value, hint, origin):
        yield Problem(key, _expected(value, [hint]))


def _union_problems(value: Any, hint: Any, key: Key) -> Iterator[Problem]:
    arms = typing.get_args(hint)
    problems = [list(_value_problems(value, arm, key)) for arm in arms]
    if all(problems):
        # An arm of the value's own shape knows best which of its items is wrong.
        inner = [found for found in problems if any(problem.key != key for problem in found)]
        yield from inner[0] if inner else [Problem(key, _expected(value, arms))]


def _item_problems(value: list[Any], hint: Any, key: Key) -> Iterator[Problem]:
    arguments = typing.get_args(hint)
    if not arguments:
        return
    if typing.get_origin(hint) is tuple and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            yield Problem(key, _expected(value, [hint]))
            return
    else:
        arguments = (arguments[0],) * len(value)
    for index, (item, item_hint) in enumerate(zip(value, arguments, strict=True)):
        yield from _value_problems(item, item_hint, (*key, index))


def _fits(value: Any, hint: Any, origin: Any) -> bool:
    """Whether one value that is not a container of values fits one annotation that is not a union."""
    if hint is Any or hint is object or isinstance(hint, (str, typing.TypeVar)):
        return True
    if isinstance(value, dict) and "_target_" in value:
        return _node_fits(value, hint)
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if hint in (bool, int, float, str):
        return isinstance(value, (int, float) if hint is float else hint) and (
            hint is bool or not isinstance(value, bool)
        )
    if _is_kind(hint, os.PathLike):
        return isinstance(value, (str, os.PathLike))
    kind = origin or hint  # Lists and mappings that fit never come here, and nodes are dealt with above.
    return not (_is_sequence(kind) or _is_kind(kind, Mapping) or kind is Callable or _is_module(kind))


def _node_fits(node: Mapping[str, Any], hint: Any) -> bool:
    """A node gives an instance of its class; what a function or a factory gives is not known, but it is something."""
    if hint is None or hint is type(None):
        return False
    try:
        target = _locate(node["_target_"])
    except ConfigError:
        return True  # Reported where the node itself is checked.
    if node.get("_partial_", False) or not inspect.isclass(target) or not _is_module(hint):
        return True
    return issubclass(target, hint)


def _is_kind(hint: Any, kind: type | tuple[type, ...]) -> bool:
    return inspect.isclass(hint) and issubclass(hint, kind)


def _is_sequence(hint: Any) -> bool:
    if _is_kind(hint, (str, bytes, Mapping)):
        return False
    return hint in (Sequence, Iterable, Collection, Set) or _is_kind(hint, (list, tuple, set, frozenset, Sequence))


def _is_module(hint: Any) -> bool:
    torch = sys.modules.get("torch")  # Whoever annotates with a module has imported it.
    return torch is not None and _is_kind(hint, torch.nn.Module)


def _expected(value: Any, hints: Sequence[Any]) -> str:
    choices = [c for hint in hints if typing.get_origin(hint) is typing.Literal for c in typing.get_args(hint)]
    texts = [str(choice) for choice in choices if isinstance(choice, str)]
    close = nearest(value, texts) if isinstance(value, str) and texts else ""
    near = f": {close}" if close.startswith("did you mean") else ""
    return f"{_show(value)} given, expected {' or '.join(_describe(hint) for hint in hints)}{near}"


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(_show(choice) for choice in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} values"
    kind = origin or hint
    if _is_sequence(kind):
        return f"a list ({_describe(arguments[0])} each)" if arguments else "a list"
    if _is_kind(kind, Mapping):
        return "a mapping"
    if kind is Callable:
        return "a block (a mapping with _target_)"
    if _is_module(kind):
        return f"a block (a mapping with _target_, giving a {kind.__name__})"
    if _is_kind(kind, os.PathLike):
        return "a path"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null", None: "null"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _origin(raw: Any, key: Key) -> Key:
    """The key where a value really stands: follows ``${a.b}`` through the config as written."""
    for _ in range(20):  # A cycle of interpolations cannot get here, but a bound costs nothing.
        node = raw
        for depth, part in enumerate(key):
            node = _child(node, part)
            match = _REFERENCE.fullmatch(node) if isinstance(node, str) else None
            if match:
                key = (*_split(match[1]), *key[depth + 1 :])
                break
        else:
            return key
    return key


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def build(node: DictConfig | ListConfig | dict[str, Any] | list[Any] | None, **extra: Any) -> Any:
    """Make the object that a node describes, its inner nodes first. The only call of Hydra's ``instantiate``.

    Args:
        node: a node, a list or a mapping of nodes (gives a list or a dict of objects), or None (gives None).
        **extra: further arguments of the node's own constructor, passed on as they are (never copied or converted).

    Returns:
        The object; for a ``_partial_`` node the factory, with ``extra`` bound to it.

    Raises:
        ConfigError: a target that may not be used or does not exist, or a constructor that refuses its arguments
            (ValueError, TypeError, ImportError, OSError); names the key and the reason.
    """
    if node is None:
        return None
    for key, target in _targets(to_container(node)):
        try:
            _locate(target)
        except ConfigError as error:
            raise ConfigError(f"{_full_key(node, key)}: {error}") from None
    try:
        if not extra:
            return instantiate(node, _convert_="all")
        if not isinstance(node, (dict, DictConfig)) or "_target_" not in node:
            raise ConfigError(f"{_full_key(node, ())}: arguments {', '.join(extra)} given to what has no _target_")
        # Hydra would copy and convert the extra arguments, which may be whole models: it makes a factory instead.
        factory = instantiate(node, _convert_="all", _partial_=True)
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, _USER_ERRORS):
            raise cause from None  # A fault of ours, or of the machine: not for the config to explain.
        raise _build_error(error) from cause
    bound = functools.partial(factory.func, *factory.args, **{**factory.keywords, **extra})
    if node.get("_partial_", False):
        return bound
    try:
        return bound()
    except _USER_ERRORS as error:
        raise _cause_error(error, _full_key(node, ()), str(node["_target_"])) from error


def _build_error(error: Exception) -> Exception:
    """An exception of Hydra's in the constructor's own words, with the key that it came from."""
    text = str(error)
    key = match[1] if (match := re.search(r"full_key: (\S+)", text)) else ""
    target = match[1] if (match := re.search(r"target '([^']+)'", text)) else ""
    if isinstance(error.__cause__, Exception):
        return _cause_error(error.__cause__, key, target)
    return ConfigError(text.replace("\nfull_key: ", " at "))


def _cause_error(cause: Exception, key: str, target: str) -> Exception:
    if isinstance(cause, DetfamilyError) and not isinstance(cause, ConfigError):
        return cause  # About a file or a tensor, which it names; not about a key.
    head = ": ".join(part for part in (key, target.rpartition(".")[2]) if part)
    return ConfigError(f"{head}: {cause}" if head else str(cause))


def _full_key(node: Any, key: Key) -> str:
    above = str(node._get_full_key(None) or "") if isinstance(node, (DictConfig, ListConfig)) else ""
    return ".".join(part for part in (above, _dotted(key)) if part) or "config"


def _targets(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, dict) and "_target_" in value:
        yield key, value["_target_"]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in items:
        yield from _targets(child, (*key, name))


# ---------------------------------------------------------------------------------------------------------------------
# Plain containers and keys
# ---------------------------------------------------------------------------------------------------------------------


def to_container(cfg: DictConfig | ListConfig | dict[str, Any] | list[Any]) -> Any:
    """A config as plain dicts, lists and values, all interpolations resolved: what runs and checkpoints store.

    ``build`` and ``validate`` take the result as they take the config itself.

    Raises:
        ConfigError: an interpolation leads nowhere.
    """
    if not isinstance(cfg, (DictConfig, ListConfig)):
        return cfg
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        match = re.search(r"Interpolation key '([^']+)' not found", text)
        known = [_dotted(key) for key, _ in _leaves(_raw(cfg))]
        near = f": {nearest(match[1], known)}" if match else ""
        raise ConfigError(f"{getattr(error, 'full_key', '') or 'config'}: {text}{near}") from error


def _raw(cfg: Any) -> Any:
    """The same with interpolations as they are written."""
    return OmegaConf.to_container(cfg, resolve=False) if isinstance(cfg, (DictConfig, ListConfig)) else cfg


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if key:
        yield key, value
    for name, child in items:
        yield from _leaves(child, (*key, name))


def _missing_keys(raw: Any) -> list[Key]:
    return [key for key, value in _leaves(raw) if isinstance(value, str) and value == _MISSING]


def _child(node: Any, part: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    return node[part] if isinstance(node, list) and isinstance(part, int) and part < len(node) else None


def _at(raw: Any, key: Key) -> Any:
    for part in key:
        raw = _child(raw, part)
    return raw


def _split(dotted: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _show(value: Any) -> str:
    """A value as it is written in YAML, short enough for a message."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _raise_all(problems: Iterable[Problem], head: str = "") -> None:
    lines = [f"{head}{_dotted(key)}{' ' if text.startswith('is ') else ': '}{text}" for key, text, _ in problems]
    if lines:
        raise ConfigError("\n".join(lines))
