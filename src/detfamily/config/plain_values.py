"""Plain values (no ``_target_`` around them) against their defaults: what exists, and of what kind it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detfamily.config.containers import Key, Problem, dotted, is_node, is_number, is_open, shown
from detfamily.errors import nearest


def plain_value_problems(body: Any, schema: Any, key: Key = ()) -> Iterator[Problem]:
    """Compare plain values with their defaults. Nodes are left to ``validate``, which knows their constructors.

    Args:
        body: what is to be set, as plain containers.
        schema: the defaults, as plain containers.
        key: where both stand.
    """
    if is_node(schema) and (body is None or isinstance(body, dict)):
        return
    if isinstance(schema, dict) and isinstance(body, dict):
        for name, value in body.items():
            if name in schema:
                yield from plain_value_problems(value, schema[name], (*key, name))
            elif schema and not is_node(value):
                where = f"{dotted(key)} has no such field" if key else "there is no such field"
                yield Problem((*key, name), f"is unknown, {where}: {nearest(str(name), map(str, schema))}")
    elif (expected := _kind_expected(body, schema)) is not None:
        yield Problem(key, f"{shown(body)} given, expected {expected} (default {shown(schema)})")


def _kind_expected(value: Any, default: Any) -> str | None:
    """What kind the default asks for, or None if the value is of that kind. A null default allows anything."""
    if default is None or is_open(default) or is_open(value) or default == {}:
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "an integer"
    if isinstance(default, float):
        return None if is_number(value) else "a number"
    if isinstance(default, list):
        return None if isinstance(value, list) else "a list"
    if isinstance(default, dict):
        return None if value is None or isinstance(value, dict) else "a mapping"
    return None if value is None or isinstance(value, str) or is_number(value) else "text"
