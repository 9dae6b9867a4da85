"""The picture of a sweep: the metric of all trials against each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from detfamily.experiments.results import FINISHED
from detfamily.files import write_atomically
from detfamily.sweeps.distribution import Choice, override_text
from detfamily.sweeps.sweep import LOSS, Sweep
from detfamily.sweeps.trial import PRUNED, Trial

DPI = 90
ACROSS = 4
"""Panels beside each other."""
WIDE = 36
"""Characters of all names below a panel that stand beside each other."""


def plot_trials(sweep: Sweep, trials: Sequence[Trial], path: Path) -> bool:
    """Draw a panel for each parameter: filled points finished, hollow ones were given up, numbers name the trials.

    Args:
        sweep: the file.
        trials: those with a value are drawn.
        path: the PNG.

    Returns:
        False where no trial has a value; then nothing is written.
    """
    drawn = [one for one in trials if one.value is not None and one.state in (FINISHED, PRUNED)]
    if not drawn:
        return False
    count = len(sweep.parameters)
    across = min(count, ACROSS)
    down = -(-count // across)
    figure = Figure(figsize=(1.0 + 3.0 * across, 0.6 + 2.8 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes, key in zip(panels, sweep.parameters, strict=False):
        _draw(axes, sweep, key, drawn)
    for axes in panels[count:]:
        axes.set_visible(False)
    for row in range(down):
        panels[row * across].set_ylabel(sweep.label if sweep.metric == LOSS else f"{sweep.label} (%)")
    if any(one.state == PRUNED for one in drawn):
        panels[0].scatter([], [], facecolors="none", edgecolors="C1", label="given up early")
        panels[0].scatter([], [], color="C0", label="finished")
        figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None}))
    return True


def _draw(axes: Axes, sweep: Sweep, key: str, trials: Sequence[Trial]) -> None:
    one = sweep.parameters[key]
    names = [override_text(value) for value in one.ends] if isinstance(one, Choice) else []
    for trial in trials:
        value = trial.point[key]
        place = names.index(override_text(value)) if names else float(value or 0)
        height = (trial.value or 0.0) * (1 if sweep.metric == LOSS else 100)
        finished = trial.state == FINISHED
        axes.scatter(
            place, height, s=36, facecolors="C0" if finished else "none", edgecolors="C0" if finished else "C1"
        )
        axes.annotate(str(trial.number), (place, height), (4, 4), textcoords="offset points", fontsize=7, color="0.35")
    if names:
        axes.set_xticks(range(len(names)), names, rotation=20 if sum(map(len, names)) > WIDE else 0)
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif one.is_logarithmic:
        axes.set_xscale("log")
        _label_logarithmic(axes)
    axes.set_xlabel(key)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)


def _label_logarithmic(axes: Axes) -> None:
    """Numbers as people write them, and no more of them than fit."""
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.3 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
