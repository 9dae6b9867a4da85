"""Where deformable attention samples (Deformable DETR, arXiv 2010.04159, figure 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from detfamily.attention.ms_deform import Sampling
from detfamily.blocks.boxes import to_xyxy
from detfamily.visualize.canvas import (
    GREEN,
    Box,
    legend_below,
    mark_box,
    mark_place,
    marks,
    name_row,
    panels,
    show,
    surroundings,
    to_picture,
)

_LEVELS = ("#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#56b4e9", "#000000")
_WEIGHTS = colormaps["inferno_r"]

Key = Literal["head", "level", "weight"]
"""What the color of a point says."""
KEYS: tuple[Key, ...] = ("head", "level", "weight")


@dataclass(frozen=True)
class Sampled:
    """What one token or query samples.

    Attributes:
        sampling: of an image that is not padded.
        reference: (R,) the point or box that it looks from, in (0, 1).
        box: what it answers, cx, cy, w, h in (0, 1), or None.
    """

    sampling: Sampling
    reference: Sequence[float]
    box: Box | None = None


def draw_sampling(pixels: Tensor, states: Mapping[str, Sampled], title: str) -> Image.Image:
    """Draw the points by head, by level and by weight, a row for each state of the detector.

    The first panel of a row shows the image, the others its part around the points. The area of a point is its weight,
    on one scale for all rows.

    Args:
        pixels: (3, H, W) uint8.
        states: name ("trained", "at initialisation") -> what is sampled.
        title: of the picture.
    """
    largest = max(float(state.sampling.weights.max()) for state in states.values())
    figure, rows = panels(len(states), 4, pixels, title, legend=0.25)
    for row, (name, state) in zip(rows, states.items(), strict=True):
        points = _points(state.sampling, pixels)
        corners = _corners(state)
        shown = surroundings(torch.cat([state.sampling.locations.reshape(-1, 2).cpu(), corners]), pixels)
        for axes, words in zip(row, ("", "by head", "by level", "by weight"), strict=True):
            show(axes, pixels, words if row is rows[0] else "", grey=axes is not row[0])
            _mark(axes, state, pixels)
            if axes is not row[0]:
                left, top, right, bottom = _in_proportion(shown, pixels)
                axes.set(xlim=(left, right), ylim=(bottom, top))
        for axes, key in zip(row[1:], KEYS, strict=True):
            scatter(axes, points, largest, key)
        name_row(row[0], name)
    first = next(iter(states.values()))
    heads = first.sampling.weights.shape[1]
    legend_below(rows[-1][0], marks(first.reference, first.box), 3)
    legend_below(rows[-1][1], [dot(head_color(m, heads), f"head {m}") for m in range(heads)], 4)
    legend_below(rows[-1][2], [dot(level_color(at), f"level {at}") for at in first.sampling.levels], 4)
    legend_below(rows[-1][3], weight_legend(largest), 3)
    return to_picture(figure)


@dataclass(frozen=True)
class Point:
    """A point in pixels of the image, with its weight and the colors of its head and its level."""

    x: float
    y: float
    weight: float
    head: str
    level: str


def _points(sampling: Sampling, pixels: Tensor) -> list[Point]:
    """In pixels, the heaviest last: it is drawn over the others."""
    height, width = pixels.shape[1:]
    weights, locations = sampling.weights[0].cpu(), sampling.locations[0].cpu()
    heads, levels, points = weights.shape
    found = []
    for head, level, point in product(range(heads), range(levels), range(points)):
        x, y = locations[head, level, point].tolist()
        colors = head_color(head, heads), level_color(sampling.levels[level])
        found.append(Point(x * width, y * height, float(weights[head, level, point]), *colors))
    return sorted(found, key=lambda one: one.weight)


def scatter(axes: Axes, points: Sequence[Point], largest: float, key: Key) -> None:
    """Draw points, those that come last over the others; areas say their weights, as shares of the largest."""
    shares = [one.weight / largest for one in points]
    colors = {
        "head": [one.head for one in points],
        "level": [one.level for one in points],
        "weight": [_weight_color(share) for share in shares],
    }
    axes.scatter(
        [one.x for one in points],
        [one.y for one in points],
        s=[_area(share) for share in shares],
        c=[to_rgba(color, 0.45 + 0.55 * share) for color, share in zip(colors[key], shares, strict=True)],
        edgecolors="black",
        linewidths=0.4,
        zorder=3,
    )


def _corners(state: Sampled) -> Tensor:
    """(n, 2) of what has to be seen beside the points."""
    boxes = [one for one in (state.reference, state.box) if one is not None and len(one) == 4]
    corners = to_xyxy(torch.tensor(boxes)).view(-1, 2) if boxes else torch.zeros(0, 2)
    return torch.cat([corners, torch.tensor([state.reference[:2]])])


def _in_proportion(shown: tuple[float, float, float, float], pixels: Tensor) -> tuple[float, float, float, float]:
    """Wider or higher, so that panels have the proportions of the image; no more than the whole image."""
    height, width = pixels.shape[1:]
    left, top, right, bottom = shown
    factor = (right - left) / min(height, width)
    if factor >= 1:
        return 0, 0, width, height
    x = min(max((left + right - factor * width) / 2, 0), (1 - factor) * width)
    y = min(max((top + bottom - factor * height) / 2, 0), (1 - factor) * height)
    return x, y, x + factor * width, y + factor * height


def _mark(axes: Axes, state: Sampled, pixels: Tensor) -> None:
    if state.box is not None:
        mark_box(axes, state.box, pixels, GREEN)
    if len(state.reference) == 4:
        mark_box(axes, state.reference, pixels, "white", "--")
    mark_place(axes, state.reference[:2], pixels)


def head_color(head: int, heads: int) -> str:
    """The color of a head."""
    return to_hex(colormaps["tab10"](head) if heads <= 10 else colormaps["hsv"](head / heads))


def level_color(level: int) -> str:
    """The color of a level."""
    return _LEVELS[level % len(_LEVELS)]


def _weight_color(share: float) -> str:
    return to_hex(_WEIGHTS(0.1 + 0.8 * share))


def _area(share: float) -> float:
    return 8 + 72 * share


def dot(color: str, label: str, size: float = 5.0) -> Line2D:
    """A point for a legend."""
    return Line2D([], [], marker="o", linestyle="", color=color, markeredgecolor="black", markersize=size, label=label)


def weight_legend(largest: float) -> list[Line2D]:
    """Points of some weights, for a legend."""
    return [dot(_weight_color(share), f"{share * largest:.2f}", _area(share) ** 0.5) for share in (0.1, 0.5, 1.0)]
