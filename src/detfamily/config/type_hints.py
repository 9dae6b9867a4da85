"""Values of a config against the annotations of the arguments that they are given for."""

from __future__ import annotations

import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from detfamily.config.containers import Key, Problem, is_node, is_number, shown
from detfamily.config.targets import locate
from detfamily.errors import ConfigError, nearest


def value_problems(value: Any, hint: Any, key: Key) -> Iterator[Problem]:
    """Whether a value may be given where the annotation is ``hint``; what is not understood is allowed."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        hint = typing.get_args(hint)[0]
        origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        yield from _union_problems(value, hint, key)
    elif isinstance(value, list) and _is_sequence(origin or hint):
        yield from _item_problems(value, hint, key)
    elif isinstance(value, dict) and not is_node(value) and _is_kind(origin or hint, Mapping):
        arguments = typing.get_args(hint)
        for name, child in value.items() if len(arguments) == 2 else ():
            yield from value_problems(child, arguments[1], (*key, name))
    elif not _fits(value, hint, origin):
        yield Problem(key, _expected(value, [hint]))


def _union_problems(value: Any, hint: Any, key: Key) -> Iterator[Problem]:
    arms = typing.get_args(hint)
    problems = [list(value_problems(value, arm, key)) for arm in arms]
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
        yield from value_problems(item, item_hint, (*key, index))


def _fits(value: Any, hint: Any, origin: Any) -> bool:
    """Whether one value that is not a container of values fits one annotation that is not a union."""
    if hint is Any or hint is object or isinstance(hint, (str, typing.TypeVar)):
        return True
    if is_node(value):
        return _node_fits(value, hint)
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if hint is float:
        return is_number(value)
    if hint in (bool, int, str):
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if _is_kind(hint, os.PathLike):
        return isinstance(value, (str, os.PathLike))
    kind = origin or hint  # Lists and mappings that fit never come here, and nodes are dealt with above.
    return not (_is_sequence(kind) or _is_kind(kind, Mapping) or kind is Callable or _is_module(kind))


def _node_fits(node: Mapping[str, Any], hint: Any) -> bool:
    """A node gives an instance of its class; what a function or a factory gives is not known, but it is something."""
    if hint is None or hint is type(None):
        return False
    try:
        target = locate(node["_target_"])
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
    return f"{shown(value)} given, expected {' or '.join(_describe(hint) for hint in hints)}{near}"


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(shown(choice) for choice in arguments)
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
