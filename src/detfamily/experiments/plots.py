"""Pictures of a table: differences beside the published ones, and curves of the metric against images seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detfamily.experiments.results import FINISHED, Record
from detfamily.experiments.statistics import Difference
from detfamily.files import write_atomically

DPI = 90
"""Some 30 KB a picture: they are committed."""


def plot_differences(
    found: Mapping[str, Difference], published: Mapping[str, float | None], path: Path, metric: str
) -> None:
    """Draw the difference of each row to the baseline, with its interval, and the published one.

    Args:
        found: label -> ours, points.
        published: label -> what the source says, where it says it.
        path: the PNG.
        metric: what differs, in words.
    """
    figure = Figure(figsize=(7, 1.2 + 0.42 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, (label, one) in enumerate(found.items()):
        reach = [[one.mean - one.low], [one.high - one.mean]] if one.has_interval else None
        axes.errorbar(one.mean, place, xerr=reach, fmt="o", color="C0", capsize=4, label="ours" if not place else None)
        if (value := published.get(label)) is not None:
            axes.plot(value, place, "D", color="C1", markerfacecolor="none")
    axes.plot([], [], "D", color="C1", markerfacecolor="none", label="published")
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    # of the whole figure: beside long labels of rows the axes are narrower than these words
    figure.supxlabel(f"{metric} minus the baseline's, points (bars: 95 % interval of the mean)", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path)


def plot_curves(records: Sequence[Record], labels: Sequence[str], path: Path, metric: str) -> bool:
    """Draw the metric against the images seen: a thin line per seed, a thick one for their mean.

    The mean is drawn where all seeds of a row were evaluated.

    Args:
        records: of the runs.
        labels: rows, in the order of the legend.
        path: the PNG.
        metric: in words.

    Returns:
        False where no run has a curve; then nothing is written.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = [label for place, label in enumerate(labels) if _draw_row(axes, records, label, f"C{place % 10}")]
    if not drawn:
        return False
    axes.set_xlabel("images seen")
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path)
    return True


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
    """The mean over curves of [images, AP], at the numbers of images that all of them have."""
    values = [{float(images): float(ap) for images, ap in curve} for curve in curves]
    common = sorted(set.intersection(*map(set, values))) if values else []
    return common, [float(np.mean([one[images] for one in values])) for images in common]


def _draw_row(axes: Axes, records: Sequence[Record], label: str, color: str) -> bool:
    curves = [one["curve"] for one in records if one["row"] == label and one["status"] == FINISHED and one["curve"]]
    for curve in curves:
        images, ap = zip(*curve, strict=True)
        axes.plot(images, [100 * one for one in ap], color=color, linewidth=0.7, alpha=0.5)
    common, mean = mean_curve(curves)
    if common:
        axes.plot(common, [100 * one for one in mean], color=color, linewidth=2, marker="o", markersize=3, label=label)
    return bool(common)


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib inside, the same results give the same file.
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None}))
