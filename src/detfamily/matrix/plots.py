"""Pictures of a matrix: families x attentions as a heat map for each measure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from detfamily.files import write_atomically
from detfamily.matrix.cell import OK
from detfamily.matrix.measures import Measure, measures_of
from detfamily.matrix.results import Record

DPI = 90
COLORS = 64
_MAP = "YlGnBu"


def plot_matrix(records: Sequence[Record], title: str, path: Path) -> bool:
    """Draw all measures of the cells of one backbone side by side.

    Args:
        records: of its cells.
        title: of the picture.
        path: the PNG.

    Returns:
        False where no cell has a figure; then nothing is written.
    """
    measures = measures_of(records)
    if not measures:
        return False
    families = list(dict.fromkeys(one["family"] for one in records))
    attentions = list(dict.fromkeys(one["attention"] for one in records))
    columns = min(2, len(measures))
    rows = -(-len(measures) // columns)
    size = (columns * (2.2 + 0.5 * len(attentions)), rows * (1.6 + 0.28 * len(families)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, measure in zip(panels, measures, strict=False):
        _draw(axes, records, families, attentions, measure)
    for axes in panels[len(measures) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize="medium")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as picture:  # a third of the size with so many colors
        small = picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: small.save(file, format="png", optimize=True))
    return True


def _draw(
    axes: Axes, records: Sequence[Record], families: Sequence[str], attentions: Sequence[str], measure: Measure
) -> None:
    values = np.full((len(families), len(attentions)), np.nan)
    words = {}
    for one in records:
        place = families.index(one["family"]), attentions.index(one["attention"])
        value = one.get(measure.key)
        values[place] = np.nan if value is None else value / measure.unit
        words[place] = measure.text(one) if one["status"] == OK else one["status"]
    axes.imshow(values, aspect="auto", cmap=_MAP)
    low, high = np.nanmin(values), np.nanmax(values)
    for (row, column), word in words.items():
        value = values[row, column]
        dark = value - low > 0.6 * (high - low)
        color = "firebrick" if np.isnan(value) else "white" if dark else "black"
        axes.text(column, row, word, ha="center", va="center", fontsize=6.5, color=color)
    axes.set_title(measure.title, fontsize="medium")
    axes.set_xticks(range(len(attentions)), attentions, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(families)), families, fontsize=8)
