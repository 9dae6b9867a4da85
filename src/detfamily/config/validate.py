"""Checks of a whole config against the constructors that it names, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from detfamily.config.containers import (
    NODE_KEYS,
    Key,
    Problem,
    as_written,
    child_of,
    dotted,
    is_node,
    is_special,
    raise_all,
    shown,
    split_key,
    to_container,
    value_at,
    walk,
)
from detfamily.config.targets import locate, signature
from detfamily.config.type_hints import value_problems
from detfamily.errors import ConfigError, nearest

DERIVED = {"model.num_classes": 1}
"""Values that a run derives from its data, null until then, and what stands in for them while a config is checked."""

_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")


def validate(cfg: DictConfig | dict[str, Any]) -> None:
    """Check every node of a config against the constructor that it names, without building anything.

    Raises:
        ConfigError: all that is wrong, a line each: a target that does not exist or may not be used, an argument that
            its constructor does not have or misses, a value that the annotation does not allow. A value that comes
            from elsewhere by interpolation is reported under the key where it stands.
    """
    raw = as_written(cfg)
    found: dict[Problem, Key] = {}  # A value may be used in many places, but is wrong once.
    for key, text, about_key in _tree_problems(to_container(_with_stand_ins(cfg))):
        origin = (*_origin(raw, key[:-1]), key[-1]) if about_key else _origin(raw, key)
        found.setdefault(Problem(origin, text), key)
    used = {one: f" (used as {dotted(key)})" if key != one.key else "" for one, key in found.items()}
    raise_all(Problem(one.key, one.text + via) for one, via in used.items())


def _with_stand_ins(cfg: Any) -> Any:
    """A copy in which values that the run derives have one already, so that what refers to them can be checked."""
    if not isinstance(cfg, DictConfig):
        return cfg
    cfg, raw = OmegaConf.create(cfg), as_written(cfg)
    for text, stand_in in DERIVED.items():
        *above, name = split_key(text)
        parent = value_at(raw, tuple(above))
        if isinstance(parent, dict) and name in parent and parent[name] is None:
            OmegaConf.update(cfg, text, stand_in)
    return cfg


def _tree_problems(tree: Any) -> Iterator[Problem]:
    for key, value in walk(tree):
        if is_node(value):
            yield from _node_problems(value, key)
        for name in value if isinstance(value, dict) else ():
            if is_special(name) and name not in NODE_KEYS:
                yield Problem((*key, name), f"is unknown: {nearest(name, NODE_KEYS)}", about_key=True)


def _node_problems(node: Mapping[str, Any], key: Key) -> Iterator[Problem]:
    """One node: its target, the names of its arguments, their values."""
    try:
        target = locate(node["_target_"])
    except ConfigError as error:
        yield Problem((*key, "_target_"), str(error))
        return
    parameters, open_ended, hints = signature(target)
    given = {name: value for name, value in node.items() if not is_special(name)}
    for name, value in given.items():
        if name in parameters:
            yield from value_problems(value, hints.get(name, Any), (*key, name))
        elif not open_ended:
            text = f"is not an argument of {node['_target_']}: {nearest(str(name), parameters)}"
            yield Problem((*key, name), text, about_key=True)
    if not isinstance(node.get("_partial_", False), bool):
        yield Problem((*key, "_partial_"), f"{shown(node['_partial_'])} given, expected true or false")
    elif not node.get("_partial_", False):
        for name, required in parameters.items():
            if required and name not in given:
                yield Problem((*key, name), f"is missing, {node['_target_']} needs it", about_key=True)


def _origin(raw: Any, key: Key) -> Key:
    """The key where a value really stands: follows ``${a.b}`` through the config as written."""
    for _ in range(20):  # A cycle of interpolations cannot get here, but a bound costs nothing.
        node = raw
        for depth, part in enumerate(key):
            node = child_of(node, part)
            match = _REFERENCE.fullmatch(node) if isinstance(node, str) else None
            if match:
                key = (*split_key(match[1]), *key[depth + 1 :])
                break
        else:
            return key
    return key
