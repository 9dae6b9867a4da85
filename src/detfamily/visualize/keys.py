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
    """Draw the reference grid and the moved keys of each group, and the weights of one token's heads on them.

    Args:
        pixels: (3, H, W) uint8.
        states: name ("trained", "at initialisation") -> the keys.
        title: of the picture.
    """
    largest = max(float(state.keys.weights.max()) for state in states.values())
    figure, rows = panels(len(states), 3, pixels, title, side=3.3, legend=0.25)
    for row, (name, state) in zip(rows, states.items(), strict=True):
        for axes, words in zip(row, ("keys and their grid", "one token's weights, by head", "by weight"), strict=True):
            show(axes, pixels, words if row is rows[0] else "", grey=True)
        _grid(row[0], state.keys, pixels)
        points = _points(state.keys, pixels)
        for axes, key in zip(row[1:], _KEYS, strict=True):
            scatter(axes, points, largest, key)
            mark_place(axes, state.reference, pixels)
            if state.box is not None:
                mark_box(axes, state.box, pixels, GREEN)
        name_row(row[0], name)
    first = next(iter(states.values()))
    heads, groups = len(first.keys.weights), len(first.keys.places)
    grid = Line2D([], [], marker="o", linestyle="", markerfacecolor="none", color="black", markersize=4, label="grid")
    legend_below(rows[-1][0], [grid, *(dot(level_color(g), f"group {g}") for g in range(groups))], 5)
    legend_below(rows[-1][1], [dot(head_color(m, heads), f"head {m}") for m in range(heads)], 6)
    legend_below(rows[-1][2], [*weight_legend(largest), *marks(first.reference, first.box)], 5)
    return to_picture(figure)


def _grid(axes: Axes, keys: Keys, pixels: Tensor) -> None:
    scale = torch.tensor([pixels.shape[2], pixels.shape[1]])
    start = keys.start.cpu() * scale
    for group, places in enumerate(keys.places.cpu() * scale):
        moves = torch.stack([start, places], 1).tolist()
        color = level_color(group)
        axes.add_collection(LineCollection(moves, colors=color, linewidths=0.8, alpha=0.8))
        axes.scatter(
            places[:, 0].tolist(),
            places[:, 1].tolist(),
            s=14,
            color=color,
            edgecolors="black",
            linewidths=0.3,
            zorder=3,
        )
    axes.scatter(
        start[:, 0].tolist(),
        start[:, 1].tolist(),
        s=16,
        facecolors="none",
        edgecolors="black",
        linewidths=0.6,
        zorder=4,
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
