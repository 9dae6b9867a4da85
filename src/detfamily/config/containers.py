"""Configs as plain dicts, lists and values; keys into them; and how both are written in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detfamily.errors import ConfigError, nearest

NODE_KEYS = ("_target_", "_partial_")
MISSING = "???"
"""How YAML says that a value must be given."""

Key = tuple[str | int, ...]


class Problem(NamedTuple):
    """What is wrong with the value at a key, or with the key itself."""

    key: Key
    text: str
    about_key: bool = False


def raise_all(problems: Iterable[Problem], head: str = "") -> None:
    """Report everything that is wrong at once, a line each.

    Raises:
        ConfigError: there is a problem.
    """
    lines = [f"{head}{dotted(key)}{' ' if text.startswith('is ') else ': '}{text}" for key, text, _ in problems]
    if lines:
        raise ConfigError("\n".join(lines))


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
        known = [dotted(key) for key, _ in walk(as_written(cfg)) if key]
        near = f": {nearest(match[1], known)}" if match else ""
        raise ConfigError(f"{getattr(error, 'full_key', '') or 'config'}: {text}{near}") from error


def as_written(cfg: Any) -> Any:
    """The same with interpolations as they are written."""
    return OmegaConf.to_container(cfg, resolve=False) if isinstance(cfg, (DictConfig, ListConfig)) else cfg


def is_node(value: Any) -> bool:
    """Whether a plain value describes an object: a mapping with ``_target_``."""
    return isinstance(value, dict) and "_target_" in value


def is_special(name: Any) -> bool:
    """Whether a name is one of Hydra's, which no argument has: ``_target_`` and the like."""
    return isinstance(name, str) and re.fullmatch(r"_\w+_", name) is not None


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_open(value: Any) -> bool:
    """Whether a value is only known later: mandatory, or an interpolation."""
    return isinstance(value, str) and (value == MISSING or "${" in value)


def walk(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """A plain value and all that lies in it, with the keys; what contains comes before what is contained."""
    yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in items:
        yield from walk(child, (*key, name))


def child_of(node: Any, part: str | int) -> Any:
    """One step down; None where nothing is."""
    if isinstance(node, dict):
        return node.get(part)
    return node[part] if isinstance(node, list) and isinstance(part, int) and part < len(node) else None


def value_at(raw: Any, key: Key) -> Any:
    """The value at a key; None where nothing is."""
    for part in key:
        raw = child_of(raw, part)
    return raw


def nested(dotted_key: str, value: Any) -> Any:
    """The mapping that has a value at a key and nothing else; the value itself for the empty key."""
    for part in reversed(dotted_key.split(".") if dotted_key else []):
        value = {part: value}
    return value


def split_key(dotted_key: str) -> Key:
    """``a.0.b`` in parts; digits count items of a list."""
    return tuple(int(part) if part.isdigit() else part for part in dotted_key.split("."))


def dotted(key: Key) -> str:
    """The parts of a key as it is typed: ``a.0.b``."""
    return ".".join(str(part) for part in key)


def shown(value: Any) -> str:
    """A value as it is written in YAML, short enough for a message."""
    names: Mapping[Any, str] = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
