"""Files of mmcv 1, which Co-DETR's code trains with: {meta, state_dict, optimizer}.

``meta`` may hold the classes' names, and the config as the text of a Python file, which is read and never run.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Place = tuple[str | int, ...]
"""Where a setting stands in a config: names of arguments, and numbers in lists."""


def is_file(content: Any) -> bool:
    """Whether what a file holds is laid out so."""
    return (
        isinstance(content, Mapping)
        and "model" not in content
        and "meta" in content
        and isinstance(content.get("state_dict"), Mapping)
    )


def content(state: Mapping[str, Tensor], settings: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
    """What a file holds; without optimizer, as for evaluation.

    Args:
        state: official names.
        settings: "CLASSES", and settings by their names in ``places``.
        places: where in the config these stand.
    """
    config: dict[str, Any] = {}
    for name, place in places.items():
        if name in settings:
            _put(config, place, settings[name])
    text = "".join(f"{name} = {_text(value)}\n" for name, value in config.items())
    return {"meta": {"CLASSES": tuple(settings["CLASSES"]), "config": text}, "state_dict": dict(state)}


def settings(meta: Any, places: Mapping[str, Place]) -> dict[str, Any]:
    """The opposite of ``content``: what can be read of a file's meta, which may be anything."""
    if not isinstance(meta, Mapping):
        return {}
    text, classes = meta.get("config"), meta.get("CLASSES")
    config = _read(text) if isinstance(text, str) else {}
    told = {name: _at(config, place) for name, place in places.items()}
    found: dict[str, Any] = {name: value for name, value in told.items() if isinstance(value, (bool, int, float, str))}
    if isinstance(classes, (tuple, list)) and all(isinstance(one, str) for one in classes):
        found["CLASSES"] = list(classes)
    return found


def averages(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """The averaged weights and the trained ones; None where there is one set only.

    A hook keeps the averages as buffers ``ema_...``, and exchanges both before a file is written at the end of an
    epoch, so that the averages stand under the plain names, which are evaluated.
    """
    twins = {name: f"ema_{name.replace('.', '_')}" for name in state}
    if not any(twin in state for twin in twins.values()):
        return None
    plain = {name: value for name, value in state.items() if name not in set(twins.values())}
    return plain, {name: state.get(twins[name], value) for name, value in plain.items()}


def _read(text: str) -> dict[str, Any]:
    """The assignments of a config, as plain containers; None in the place of what is no plain value."""
    try:
        statements = [one for one in ast.parse(text).body if isinstance(one, ast.Assign)]
        return {ast.unparse(one.targets[0]): _value(one.value) for one in statements}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {one.arg: _value(one.value) for one in node.keywords if one.arg is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        return -number if isinstance(number, (int, float)) else None
    return node.value if isinstance(node, ast.Constant) else None


def _at(config: Any, place: Place) -> Any:
    for key in place:
        if isinstance(config, Mapping):
            config = config.get(key)
        elif isinstance(config, Sequence) and isinstance(key, int) and key < len(config):
            config = config[key]
        else:
            return None
    return config


def _put(config: dict[str, Any], place: Place, value: Any) -> None:
    """Set what stands at a place; lists there have one entry."""
    *above, last = place
    node: Any = config
    for key, following in zip(above, place[1:], strict=True):
        fresh: Any = [{}] if isinstance(following, int) else {}
        node = node[key] if isinstance(key, int) else node.setdefault(key, fresh)
    node[last] = value


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={_text(one)}' for key, one in value.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)
