"""The overrides of a command line: ``group=choice``, ``field=value``, ``+field=value`` and ``~field``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from detfamily.config.containers import (
    NODE_KEYS,
    Key,
    as_written,
    child_of,
    dotted,
    is_node,
    is_number,
    is_open,
    nested,
    raise_all,
    shown,
    split_key,
    value_at,
    walk,
)
from detfamily.config.plain_values import plain_value_problems
from detfamily.config.targets import argument_hints
from detfamily.config.type_hints import value_problems
from detfamily.errors import ConfigError, nearest

Registry = Mapping[str, Sequence[str]]
"""Groups and their choices."""

_PATH = re.compile(r"(\.{0,2}|~|[A-Za-z]:)[/\\]")


def read_override(text: str, registry: Registry) -> Override:
    """Read one override in Hydra's grammar; a path needs no quotes whatever it contains.

    Raises:
        ConfigError: it cannot be read, or stands for several values.
    """
    key, equals, value = text.partition("=")
    if not key or (not equals and not text.startswith("~")):
        raise ConfigError(f"{text!r} is not an override, write key=value: {_meant_by(text, registry)}")
    if _PATH.match(value):
        text = f"{key}={quoted(os.path.expanduser(value))}"
    one = _parse(text)
    if one is None and value and os.path.exists(value):
        one = _parse(f"{key}={quoted(value)}")
    if one is None:
        raise ConfigError(
            f"cannot read {text!r}: a list is written {key}=[a,b], and text with special characters in two kinds of "
            f'quotes: "{key}={quoted(value)}"'
        )
    return one


def _parse(text: str) -> Override | None:
    """The override, or None if it is outside Hydra's grammar or stands for several values."""
    try:
        one = OverridesParser.create().parse_override(text)
    except HydraException:
        return None
    return None if one.is_sweep_override() else one


def _meant_by(word: str, registry: Registry) -> str:
    """A choice given without its group is the likeliest slip."""
    holders = [f"{group}={word}" for group, choices in registry.items() if word in choices]
    return f"did you mean {' or '.join(holders)}?" if holders else nearest(word, registry)


def quoted(value: str) -> str:
    """A value as quoted text of Hydra's grammar: backslashes count only in front of a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def chooses(one: Override, registry: Registry) -> bool:
    """Whether an override picks from a group (``optimizer={lr: 1}`` sets fields of the choice instead)."""
    return one.key_or_group in registry and not isinstance(one.value(), dict)


def choice(one: Override, registry: Registry) -> str:
    """The override of a group as Hydra wants it.

    Raises:
        ConfigError: the group has no such choice.
    """
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
        if name not in registry[group]:
            raise ConfigError(f"{group} has no choice {name!r}: {nearest(name, registry[group])}")
    return line if isinstance(value, (list, str)) else f"{line.partition('=')[0]}='{names[0]}'"


def set_field(cfg: DictConfig, schema: Mapping[str, Any], one: Override, registry: Registry) -> None:
    """Apply ``field=value``, ``+field=value`` or ``~field`` to a config, in place.

    Raises:
        ConfigError: there is no such field (with the nearest names), or the value is of another kind than its default.
    """
    name, line = one.key_or_group, str(one.input_line)
    if one.package is not None or "/" in name:
        raise ConfigError(f"{line!r}: there is no group {name!r}: {nearest(name, registry)}")
    key = split_key(name)
    raw = as_written(cfg)
    adds = one.is_add() or one.is_force_add()
    if not adds:
        _require_field(raw, key, line, registry)
    try:
        if one.is_delete():
            with open_dict(cfg):
                del (OmegaConf.select(cfg, dotted(key[:-1])) if key[:-1] else cfg)[key[-1]]
            return
        value = _as_typed(one.value(), schema, key, line)
        if not adds and isinstance(value, dict):
            for inner, _ in walk(value):
                _require_field(raw, (*key, *inner), line, registry)
        if not any(isinstance(part, int) for part in key):  # Items of lists have no default to compare with.
            raise_all(plain_value_problems(nested(name, value), schema))
        OmegaConf.update(cfg, name, value, merge=True, force_add=adds)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{line!r}: {str(error).splitlines()[0]}") from error


def _require_field(raw: Any, key: Key, line: str, registry: Registry) -> None:
    """Refuse to set what does not exist, and say what does."""
    node = raw
    for depth, part in enumerate(key):
        above = dotted(key[:depth])
        known = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        if part in known:
            node = child_of(node, part)
            continue
        if isinstance(node, list):
            raise ConfigError(f"{line!r}: {above} is a list of {len(node)}, counted from 0")
        if not isinstance(node, dict):
            raise ConfigError(f"{line!r}: {above} is {shown(node)}, it has no fields")
        names = [str(name) for name in node if name not in NODE_KEYS]
        names += list(registry) if depth == 0 else []
        what = f"{above} has no field {part!r}" if above else f"there is no group or field {part!r}"
        close, elsewhere = nearest(str(part), names), _elsewhere(raw, key, node)
        hints = [elsewhere] if elsewhere and not close.startswith("did you mean") else [close, elsewhere]
        raise ConfigError(f"{line!r}: {what}: {'; '.join(filter(None, hints))}")


def _elsewhere(raw: Any, key: Key, parent: dict[str, Any]) -> str:
    """Where a field of that name does exist, and whether the constructor would take it."""
    if is_node(parent) and key[-1] in argument_hints(parent):
        return f"{parent['_target_']} takes it although the config does not list it: +{dotted(key)}=..."
    others = [dotted(other) for other, _ in walk(raw) if other and other[-1] == key[-1] and other != key]
    return f"{key[-1]} exists as {', '.join(others[:3])}" if others else ""


def _as_typed(value: Any, schema: Mapping[str, Any], key: Key, line: str) -> Any:
    """A name or a folder may be called 2017 or 1e3: where text is due, the value is the text that was typed."""
    default, parent = value_at(schema, key), value_at(schema, key[:-1])
    if not is_number(value) or not isinstance(default, str):
        return value
    text = line.partition("=")[2].strip()
    if not is_node(parent):
        return value if is_open(default) else text
    hint = argument_hints(parent).get(str(key[-1]), Any)
    number_fits, text_fits = (not any(value_problems(one, hint, key)) for one in (value, text))
    return text if text_fits and not number_fits else value
