"""One trial of a sweep: a training in a folder of its own, and what is kept of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detfamily.experiments.results import RUN
from detfamily.experiments.runner import Run
from detfamily.files import read_json
from detfamily.sweeps.distribution import Point
from detfamily.tracking.files import EPOCHS, read_rows

TRIALS = "trials"
PRUNED = "pruned"
"""How a trial ended that was given up; the other states are those of ``detfamily ablate``'s runs."""


@dataclass(frozen=True)
class TrialRun(Run):
    """The training of a trial.

    Attributes:
        key: the name of its folder, unique in the sweep.
    """

    key: str = ""

    @property
    def name(self) -> str:
        return self.variant.row.label

    @property
    def folder(self) -> Path:
        return self.root / TRIALS / self.key


@dataclass(frozen=True)
class Trial:
    """What came out of a trial.

    Attributes:
        number: from 0.
        point: its values.
        state: finished, pruned, failed, running, cut off.
        value: of the metric after the last epoch that was evaluated; None where there is none.
        epochs: that were trained.
        seconds: that it took, all its parts together.
        error: what went wrong, or None.
    """

    number: int
    point: Point
    state: str
    value: float | None
    epochs: int
    seconds: float
    error: str | None = None


def label(number: int) -> str:
    """What a trial is called.

    >>> label(3)
    'trial 3'
    """
    return f"trial {number}"


def key(number: int) -> str:
    """What its folder is called, so that the names sort as the numbers do.

    >>> key(3)
    '0003'
    """
    return f"{number:04}"


def measured(folder: Path, metric: str) -> dict[int, float]:
    """The metric after each evaluated epoch of a run; epochs in which it could not be measured are left out."""
    rows: list[dict[str, Any]] = read_rows(folder / EPOCHS)
    return {int(row["epoch"]): float(row[metric]) for row in rows if _is_measured(row.get(metric))}


def trial_of(number: int, point: Point, state: str, folder: Path, metric: str) -> Trial:
    """A trial with what its folder says."""
    rows, values = read_rows(folder / EPOCHS), measured(folder, metric)
    run = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    last = values[max(values)] if values else None
    epochs = int(rows[-1]["epoch"]) if rows else 0
    # an agent of W&B leaves no run.json; the epochs say how long they trained
    seconds = run.get("seconds") or sum(row.get("seconds") or 0.0 for row in rows)
    return Trial(number, dict(point), state, last, epochs, float(seconds), run.get("error"))


def _is_measured(value: Any) -> bool:
    """COCO's metrics say -1 where there is nothing to measure."""
    return value is not None and math.isfinite(value) and value >= 0
