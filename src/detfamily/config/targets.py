"""What ``_target_`` names: which code a config may reach, and the arguments that it takes."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detfamily.config.containers import shown
from detfamily.errors import ConfigError, nearest

ALLOWED_TARGETS = (
    "detfamily.",
    "torch.nn.",
    "torch.optim.",
    "torchvision.models.",
    "torchvision.ops.",
    "torchvision.transforms.",
)
"""What a config may name. Configs travel inside checkpoints, so they must not reach arbitrary code."""


class Signature(NamedTuple):
    """The arguments of a class or function."""

    parameters: dict[str, bool]
    """Name -> whether it must be given."""
    open_ended: bool
    """Whether any other name is taken too."""
    hints: dict[str, Any]
    """Name -> annotation, Any where there is none."""


def locate(target: Any) -> Callable[..., Any]:
    """Import what ``_target_`` names.

    Raises:
        ConfigError: it does not exist, cannot be imported, is not callable, or is outside ``ALLOWED_TARGETS``.
    """
    if not isinstance(target, str) or not target.startswith(ALLOWED_TARGETS):
        allowed = ", ".join(prefix + "*" for prefix in ALLOWED_TARGETS)
        raise ConfigError(f"{shown(target)} may not be used in a config, only {allowed}")
    found = _import(target)
    if not callable(found):
        raise ConfigError(f"{target} is not a class or a function")
    if not _home(found).startswith(ALLOWED_TARGETS):  # Reached through an import: detfamily.cli.os.system.
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


@functools.cache
def signature(target: Callable[..., Any]) -> Signature:
    """The arguments of what ``locate`` found."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # Some compiled callables have none.
        return Signature({}, True, {})
    named = {
        one.name: one.default is one.empty
        for one in parameters
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return Signature(named, open_ended, {name: _hint(target, name) for name in named})


def argument_hints(node: Mapping[str, Any]) -> dict[str, Any]:
    """The names and annotations of a node's constructor; empty if there is none."""
    try:
        return signature(locate(node["_target_"])).hints
    except ConfigError:
        return {}


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
