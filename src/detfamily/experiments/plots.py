"""Pictures: differences beside the published ones, the metric against images seen and against speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from detfamily.experiments.claims import Claim
from detfamily.experiments.findings import Cost, frontier
from detfamily.experiments.results import FINISHED, Record
from detfamily.experiments.statistics import Difference
from detfamily.files import write_atomically

DPI = 90
"""Some 30 KB a picture: they are committed."""


def plot_differences(
    found: Mapping[str, Difference], published: Mapping[str, float | None], path: Path, metric: str
) -> None:
    """Draw the difference of each row to its baseline, with its interval, and the published one.

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
    drawn = [label for place, label in enumerate(labels) if _draw_row(axes, records, label, *_look(place))]
    if not drawn:
        return False
    axes.set_xlabel("images seen")
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path)
    return True


def plot_tradeoff(costs: Mapping[str, Cost], path: Path, metric: str) -> bool:
    """Draw the metric against images per second in training, areas by peak memory, and the Pareto frontier.

    Args:
        costs: by label.
        path: the PNG.
        metric: in words.

    Returns:
        False where fewer than three rows can be drawn; then nothing is written.
    """
    if len(costs) < 3:
        return False
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    line = [costs[label] for label in frontier(costs)]
    axes.plot(
        [one.images_per_second for one in line], [one.reached for one in line], color="0.6", linewidth=1, zorder=1
    )
    memories = [one.memory_gib for one in costs.values() if one.memory_gib]
    for place, (label, one) in enumerate(costs.items()):
        size = 60.0 * (one.memory_gib / max(memories)) if one.memory_gib else 30.0
        reach = None if math.isnan(one.spread) else one.spread
        color, marker = _look(place)
        axes.errorbar(one.images_per_second, one.reached, yerr=reach, color=color, capsize=3, linewidth=0.8, zorder=2)
        axes.scatter(one.images_per_second, one.reached, s=size, color=color, marker=marker, label=label, zorder=3)
    axes.set_xlabel("images per second in training")
    axes.set_ylabel(f"{metric} (bars: standard deviation over seeds)")
    axes.grid(alpha=0.3)
    title = f"area: peak memory, up to {max(memories):.2f} GiB" if memories else None
    figure.legend(loc="outside right upper", fontsize=8, title=title, title_fontsize=8)
    _save(figure, path)
    return True


def plot_overview(found: Mapping[str, Sequence[Claim]], path: Path) -> None:
    """Draw the published difference of every row against ours with its interval; where signs agree is shaded.

    Ours stand on an axis that is linear up to five points and logarithmic beyond, as they spread over more.

    Args:
        found: table -> rows that have both.
        path: the PNG.
    """
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, claims) in enumerate(found.items()):
        color, marker = f"C{place % 10}", "os^Dv*"[place % 6]
        axes.plot([], [], marker, color=color, label=name)
        for one in claims:
            _draw_claim(axes, one, color, marker)
    axes.set_yscale("symlog", linthresh=_LINEAR)
    wide, high = (max(map(abs, limits)) for limits in (axes.get_xlim(), axes.get_ylim()))
    for x, y in ((wide, high), (-wide, -high)):
        axes.fill([0, x, x, 0], [0, 0, y, y], color="C2", alpha=0.08, linewidth=0, zorder=0)
    line = np.linspace(-wide, wide, 200)
    axes.plot(line, line, color="0.5", linewidth=1, linestyle=":", label="ours as published")
    axes.set_xlim(-wide, wide)
    axes.set_ylim(-high, high)
    ticks = [one for one in _TICKS if abs(one) <= high]
    axes.set_yticks(ticks, [f"{one:+d}" if one else "0" for one in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(0, color="0.5", linewidth=1)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.grid(alpha=0.3)
    axes.set_xlabel("published difference to the baseline, points")
    axes.set_ylabel("ours, points (bars: 95 % interval)")
    figure.legend(loc="outside right upper", fontsize=8, title="filled: resolved", title_fontsize=8)
    _save(figure, path)


_LINEAR = 5
_TICKS = (-200, -100, -50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100, 200)


def _draw_claim(axes: Axes, one: Claim, color: str, marker: str) -> None:
    if one.ours is None or one.published is None:
        return
    reach = [[one.ours.mean - one.ours.low], [one.ours.high - one.ours.mean]] if one.ours.has_interval else None
    axes.errorbar(
        one.published,
        one.ours.mean,
        yerr=reach,
        fmt=marker,
        color=color,
        markerfacecolor=color if one.resolved else "white",
        capsize=3,
        linewidth=0.9,
    )


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
    """The mean over curves of [images, AP], at the numbers of images that all of them have."""
    values = [{float(images): float(ap) for images, ap in curve} for curve in curves]
    common = sorted(set.intersection(*map(set, values))) if values else []
    return common, [float(np.mean([one[images] for one in values])) for images in common]


def _draw_row(axes: Axes, records: Sequence[Record], label: str, color: str, marker: str) -> bool:
    curves = [one["curve"] for one in records if one["row"] == label and one["status"] == FINISHED and one["curve"]]
    for curve in curves:
        images, ap = zip(*curve, strict=True)
        axes.plot(images, [100 * one for one in ap], color=color, linewidth=0.7, alpha=0.5)
    common, mean = mean_curve(curves)
    if common:
        percent = [100 * one for one in mean]
        axes.plot(common, percent, color=color, linewidth=2, marker=marker, markersize=3, label=label)
    return bool(common)


def _look(place: int) -> tuple[str, str]:
    """Colour and marker of a row; after ten rows the colours come again, with another marker."""
    return f"C{place % 10}", "os^D"[place // 10 % 4]


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib inside, the same results give the same file.
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None}))
