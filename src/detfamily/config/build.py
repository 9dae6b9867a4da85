"""Building: from a node to the object that it describes."""

from __future__ import annotations

import functools
import re
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from detfamily.config.containers import Key, dotted, is_node, to_container, walk
from detfamily.config.targets import locate
from detfamily.errors import ConfigError, DetfamilyError

_USER_ERRORS = (DetfamilyError, ValueError, TypeError, ImportError, OSError)
"""What a constructor raises about what it was given."""


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
    for key, value in walk(to_container(node)):
        try:
            if is_node(value):
                locate(value["_target_"])
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
    return ".".join(part for part in (above, dotted(key)) if part) or "config"
