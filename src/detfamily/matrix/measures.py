"""The figures of a cell as people read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from detfamily.matrix.results import Record


@dataclass(frozen=True)
class Measure:
    """A figure with its unit.

    Attributes:
        key: of the record.
        title: with the unit.
        unit: what a value is divided by.
        digits: behind the point.
    """

    key: str
    title: str
    unit: float
    digits: int

    def text(self, record: Record) -> str:
        """The value with its digits; "-" where there is none."""
        value = record.get(self.key)
        return "-" if value is None else f"{value / self.unit:.{self.digits}f}"


MEASURES = (
    Measure("parameters", "parameters, M", 1e6, 2),
    Measure("multiply_adds", "GFLOPs", 1e9, 3),
    Measure("kept_bytes", "kept for backward, MiB", 2**20, 1),
    Measure("peak_bytes", "peak, MiB", 2**20, 1),
    Measure("seconds", "training step, ms", 1e-3, 0),
)


def measures_of(records: Iterable[Record]) -> list[Measure]:
    """The measures that any of the records has: there is no peak on the CPU."""
    present = {key for record in records for key, value in record.items() if value is not None}
    return [one for one in MEASURES if one.key in present]
