"""Curves of a run: the loss, and the AP or the accuracy, against the images seen. No display is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detfamily.files import write_atomically

_METRICS = ("AP", "AP50", "APs", "APm", "APl")
_ACCURACY = ("top1", "top5")


def plot_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a PNG with two panels, loss on the left and AP, AP50, APs, APm, APl on the right, or top1 and top5.

    Args:
        history: one row per line of metrics. "images_seen" is the axis where every row has it, else "epoch". "loss"
            and the others (fractions) are drawn where a row has them; NaN, infinity and -1, which says that there was
            no object of that size, leave a gap.
        path: the file to write; it appears whole or not at all.

    Raises:
        ValueError: no rows, or rows with neither "images_seen" nor "epoch".
    """
    axis = _axis(history)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    _draw(left, history, axis, "loss")
    left.set_ylabel("loss")
    classifies = any(name in row for row in history for name in _ACCURACY)
    drawn = [name for name in (_ACCURACY if classifies else _METRICS) if _draw(right, history, axis, name)]
    right.set_ylabel("accuracy (fraction)" if classifies else "AP (fraction)")
    right.set_ylim(bottom=0)
    if drawn:
        right.legend(loc="best")
    for panel in (left, right):
        panel.set_xlabel(axis.replace("_", " "))
        panel.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _axis(history: Sequence[Mapping[str, float]]) -> str:
    for name in ("images_seen", "epoch"):
        if history and all(name in row for row in history):
            return name
    raise ValueError(
        f"{len(history)} rows of metrics: need at least one, and all with 'images_seen' or all with 'epoch'"
    )


def _draw(panel: Axes, history: Sequence[Mapping[str, float]], axis: str, name: str) -> bool:
    """Draw one curve; False where there is nothing to draw."""
    rows = [row for row in history if row.get(name) is not None]
    values = [row[name] if _drawable(row[name], name) else math.nan for row in rows]
    if all(math.isnan(value) for value in values):
        return False
    panel.plot([row[axis] for row in rows], values, marker="o", markersize=3, label=name)
    return True


def _drawable(value: float, name: str) -> bool:
    return math.isfinite(value) and (name == "loss" or value >= 0)
