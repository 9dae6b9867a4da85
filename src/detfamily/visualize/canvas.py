"""Rows of panels that show one image each, with what is drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

Box = Sequence[float]
"""cx, cy, w, h in (0, 1)."""

HALO = [withStroke(linewidth=2.6, foreground="black", alpha=0.75)]
_DPI = 110
_TEXT = 9
_MARGIN = 0.25
_LEAST = 0.3
"""The least share of the image's shorter side that surroundings have."""
GREEN = "#39ff14"


@dataclass(frozen=True)
class Subject:
    """What a picture is about.

    Attributes:
        words: for titles ("query 12 (circle 0.93)").
        file: for file names ("query12").
        place: x, y in (0, 1).
        box: the answer, cx, cy, w, h in (0, 1); None for a mere place.
        query: the number of the object query; None for a mere place.
        label: the class that it answers; None for a mere place.
    """

    words: str
    file: str
    place: tuple[float, float]
    box: Box | None = None
    query: int | None = None
    label: int | None = None


def panels(
    rows: int, columns: int, pixels: Tensor, title: str, side: float = 2.6, legend: float = 0.0
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with equal panels for an image.

    Args:
        rows: of panels.
        columns: of panels.
        pixels: (3, H, W), for the proportions.
        title: of the figure; wrapped where it is too long.
        side: the longer side of a panel, inches.
        legend: height to leave for legends, inches.
    """
    height, width = pixels.shape[1:]
    scale = side / max(height, width)
    size = (max(columns * (width * scale + 0.12), 4.2), rows * height * scale + 0.6 + 0.05 * rows + legend)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, fontsize=_TEXT + 1, wrap=True)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def show(axes: Axes, pixels: Tensor, title: str = "", dim: float = 0.35, grey: bool = False) -> None:
    """Show an image, paler so that what is drawn on it stands out; the axes count its pixels.

    Args:
        axes: the panel.
        pixels: (3, H, W) uint8.
        title: of the panel.
        dim: share of white.
        grey: without colors.
    """
    image = pixels.float() / 255
    if grey:
        image = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True).expand(3, -1, -1)
    height, width = pixels.shape[1:]
    pale = (image * (1 - dim) + dim).permute(1, 2, 0).numpy()
    axes.imshow(pale, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=_TEXT, pad=3)


def surroundings(points: Tensor, pixels: Tensor) -> tuple[float, float, float, float]:
    """The square around some points, not all too small: left, top, right, bottom in pixels of the image.

    Args:
        points: (n, 2) x, y in (0, 1); those outside the image count as far as its edge.
        pixels: (3, H, W).
    """
    height, width = pixels.shape[1:]
    inside = points.clamp(0, 1) * torch.tensor([width, height])
    low, high = inside.amin(0), inside.amax(0)
    side = max(float((high - low).max()) * (1 + 2 * _MARGIN), _LEAST * min(height, width))
    x, y = ((low + high) / 2).tolist()
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def name_row(axes: Axes, words: str) -> None:
    """Words at the left of a row."""
    axes.set_ylabel(words, fontsize=_TEXT)


def mark_box(axes: Axes, box: Box, pixels: Tensor, color: str, style: str = "-", width: float = 1.4) -> None:
    """Draw a box with a dark edge, so that it is seen on any image."""
    high, wide = pixels.shape[1:]
    cx, cy, w, h = box
    axes.add_patch(
        Rectangle(
            ((cx - w / 2) * wide, (cy - h / 2) * high),
            w * wide,
            h * high,
            fill=False,
            edgecolor=color,
            linestyle=style,
            linewidth=width,
            path_effects=HALO,
        )
    )


def mark_place(axes: Axes, place: Sequence[float], pixels: Tensor) -> None:
    """Mark where a query or a token looks from."""
    high, wide = pixels.shape[1:]
    axes.plot(
        place[0] * wide, place[1] * high, "+", color="white", markersize=9, markeredgewidth=1.6, path_effects=HALO
    )


def legend_below(axes: Axes, handles: Sequence[Line2D], columns: int) -> None:
    """A legend under a panel."""
    axes.legend(
        handles=list(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=columns,
        fontsize=_TEXT - 2,
        frameon=False,
        handletextpad=0.2,
        columnspacing=0.8,
        borderpad=0.1,
    )


def marks(reference: Sequence[float] | None, box: Box | None) -> list[Line2D]:
    """What ``mark_place`` and boxes mean, for a legend."""
    found = []
    if reference is not None:
        found.append(Line2D([], [], linestyle="", marker="+", color="black", markeredgewidth=1.4, label="looks from"))
    if reference is not None and len(reference) == 4:
        found.append(Line2D([], [], linestyle="--", color="grey", label="reference"))
    if box is not None:
        found.append(Line2D([], [], color=GREEN, label="answer"))
    return found


def to_picture(figure: Figure) -> Image.Image:
    """The figure as pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
