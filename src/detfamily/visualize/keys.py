"""The few keys of a map that all its tokens look at, and how they have moved (DAT, arXiv 2201.00520, figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

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
    to_picture,
)
from detfamily.visualize.look import Keys
from detfamily.visualize.sampling import Key, Point, dot, head_color, level_color, scatter, weight_legend

_KEYS: tuple[Key, ...] = ("head", "weight")
_GROUPS = 3
"""Panels at the most."""


@dataclass(frozen=True)
class Moved:
    """The keys of a map, and what one token makes of them.

    Attributes:
        keys: the keys.
        reference: (2,) the token's place, in (0, 1).
        box: drawn as the answer, cx, cy, w, h in (0, 1), or None.
    """

    keys: Keys
    reference: Sequence[float]
    box: Box | None = None


def draw_keys(pixels: Tensor, states: Mapping[str, Moved], title: str) -> Image.Image:
    """Draw the grid and the moved keys, a panel for each group, and the weights that one token's heads give them.

    Args:
        pixels: (3, H, W) uint8.
        states: name ("trained", "at initialisation") -> the keys.
        title: of the picture.
    """
    largest = max(float(state.keys.weights.max()) for state in states.values())
    first = next(iter(states.values()))
    heads, groups = len(first.keys.weights), min(len(first.keys.places), _GROUPS)
    titles = [f"keys of group {group}" for group in range(groups)] if groups > 1 else ["keys"]
    titles += ["one token's weights, by head", "by weight"]
    figure, rows = panels(len(states), len(titles), pixels, title, legend=0.25)
    for row, (name, state) in zip(rows, states.items(), strict=True):
        for axes, words in zip(row, titles, strict=True):
            show(axes, pixels, words if row is rows[0] else "", grey=True)
        for group in range(groups):
            _grid(row[group], state.keys, group, pixels)
        points = _points(state.keys, pixels)
        for axes, key in zip(row[groups:], _KEYS, strict=True):
            scatter(axes, points, largest, key)
            mark_place(axes, state.reference, pixels)
            if state.box is not None:
                mark_box(axes, state.box, pixels, GREEN)
        name_row(row[0], name)
    grid = Line2D([], [], marker="o", linestyle="", markerfacecolor="none", color="black", markersize=4, label="grid")
    legend_below(rows[-1][0], [grid, dot(level_color(0), "moved")], 2)
    legend_below(rows[-1][-2], [dot(head_color(m, heads), f"head {m}") for m in range(heads)], 4)
    legend_below(rows[-1][-1], [*weight_legend(largest), *marks(first.reference, first.box)], 5)
    return to_picture(figure)


def _grid(axes: Axes, keys: Keys, group: int, pixels: Tensor) -> None:
    scale = torch.tensor([pixels.shape[2], pixels.shape[1]])
    start, places = keys.start.cpu() * scale, keys.places[group].cpu() * scale
    color = level_color(group)
    axes.add_collection(LineCollection(torch.stack([start, places], 1).tolist(), colors=color, linewidths=0.7))
    size = 14 * min(1, 100 / len(start))
    for points, face in ((start, "none"), (places, color)):
        axes.scatter(
            points[:, 0].tolist(),
            points[:, 1].tolist(),
            s=size,
            facecolors=face,
            edgecolors="black",
            linewidths=0.4,
            zorder=3,
        )


def _points(keys: Keys, pixels: Tensor) -> list[Point]:
    height, width = pixels.shape[1:]
    heads, groups = len(keys.weights), len(keys.places)
    found = []
    for head, weights in enumerate(keys.weights.cpu().tolist()):
        group = head * groups // heads
        for weight, (x, y) in zip(weights, keys.places[group].cpu().tolist(), strict=True):
            found.append(Point(x * width, y * height, weight, head_color(head, heads), level_color(group)))
    return sorted(found, key=lambda one: one.weight)
