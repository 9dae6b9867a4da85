"""Figures and tables as the Markdown of reports has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what would end a cell early is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def names(labels: Iterable[str]) -> str:
    """Labels in a sentence."""
    return ", ".join(f"`{label}`" for label in labels)


def with_spread(value: float, spread: float) -> str:
    """A mean with its spread, where that is known."""
    return f"{value:.1f}" if math.isnan(spread) else f"{value:.1f} ± {spread:.1f}"


def signed(value: float | None, digits: int = 1) -> str:
    """A difference: always with its sign, and with a minus sign instead of a hyphen."""
    return "-" if value is None else f"{value:+.{digits}f}".replace("-", "−")  # noqa: RUF001


def figure(value: float | None) -> str:
    """A figure with one digit behind the point."""
    return "-" if value is None else f"{value:.1f}"


def number(value: float | None) -> str:
    """A whole number."""
    return "-" if value is None else f"{value:.0f}"


def hours(spent: Mapping[str, float]) -> str:
    """What runs took, by what they ran on, such as ``{"CPU": 1.5}``."""
    return " + ".join(f"{amount:.{1 if amount >= 10 else 2}f} {kind}-h" for kind, amount in spent.items()) or "-"
