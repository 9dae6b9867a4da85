"""Heat maps of attention weights: what a token or a query reads, from which cells of the maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image
from torch import Tensor

from detfamily.visualize.canvas import GREEN, Box, mark_box, mark_place, name_row, panels, show, to_picture
from detfamily.visualize.look import Heat

_COLUMNS = 5
_COLORS = "inferno"


@dataclass(frozen=True)
class Weighed:
    """What one token or query reads.

    Attributes:
        heats: the weights of the maps' cells.
        reference: (R,) the point or box that it looks from, in (0, 1), or None.
        box: what it answers, cx, cy, w, h in (0, 1), or None.
    """

    heats: Sequence[Heat]
    reference: Sequence[float] | None
    box: Box | None = None


def draw_heat(pixels: Tensor, states: Mapping[str, Weighed], title: str) -> Image.Image:
    """Draw the weights, the mean of the heads and each of them, in rows for each state of the detector.

    Where an attention cannot look everywhere, as one in windows, a line is drawn around what it sees.

    Args:
        pixels: (3, H, W) uint8.
        states: name ("trained", "at initialisation") -> what is read.
        title: of the picture.
    """
    maps = {name: _with_mean(on_one_map(state.heats)) for name, state in states.items()}
    most = max(len(one) for one in maps.values())
    columns = min(_COLUMNS, most)
    rows_each = -(-most // columns)
    count = rows_each * len(states)
    figure, rows = panels(count, columns, pixels, title, side=2.2, legend=0.2 * count)
    for index, (name, state) in enumerate(states.items()):
        block = rows[index * rows_each : (index + 1) * rows_each]
        name_row(block[0][0], name)
        for number, axes in enumerate(axes for row in block for axes in row):
            if number >= len(maps[name]):
                axes.set_axis_off()
                continue
            heat = maps[name][number]
            words = _shares(state.heats) if number == 0 else f"head {number - 1}"
            show(axes, pixels, f"{words}, max {_short(float(heat.max()))}", grey=True, dim=0.15)
            _overlay(axes, heat, pixels)
            if state.box is not None:
                mark_box(axes, state.box, pixels, GREEN, width=1.1)
            if state.reference is not None:
                mark_place(axes, state.reference[:2], pixels)
    return to_picture(figure)


def on_one_map(heats: Sequence[Heat]) -> Tensor:
    """(M, h, w): the weights of several levels on the finest of them, where a weight spreads over the cells below it.

    The sum stays the same where sizes divide each other.
    """
    if len(heats) == 1:
        return heats[0].weights.cpu()
    size = heats[0].weights.shape[-2:]
    total = torch.zeros(len(heats[0].weights), *size)
    for heat in heats:
        h, w = heat.weights.shape[-2:]
        spread = F.interpolate(heat.weights.cpu()[None], size=size, mode="nearest-exact")[0]
        total += spread * (h * w / (size[0] * size[1]))
    return total


def _with_mean(weights: Tensor) -> list[Tensor]:
    return [weights.mean(0), *weights]


def _shares(heats: Sequence[Heat]) -> str:
    if len(heats) == 1:
        return "mean of heads"
    shares = " ".join(f"{float(heat.weights.sum((1, 2)).mean()):.0%}" for heat in heats)
    return f"mean; levels {shares}"


def _short(weight: float) -> str:
    return f"{weight:.2f}" if weight >= 0.01 else f"{weight:.0e}"


def _overlay(axes: Axes, heat: Tensor, pixels: Tensor) -> None:
    height, width = pixels.shape[1:]
    share = (heat / heat.max().clamp(min=1e-30)).numpy()
    axes.imshow(
        share,
        cmap=_COLORS,
        vmin=0,
        vmax=1,
        alpha=0.15 + 0.75 * share**0.5,
        extent=(0, width, height, 0),
        interpolation="nearest",
        zorder=2,
    )
    seen = heat > 0
    if not bool(seen.all()):
        axes.add_collection(LineCollection(outline(seen, width, height), colors="cyan", linewidths=0.8, zorder=3))


def outline(seen: Tensor, width: float, height: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The edges between cells (h, w) that are True and those that are not, on a map of that many pixels."""
    h, w = seen.shape
    padded = F.pad(seen, (1, 1, 1, 1))
    across = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist()  # (row, column of the edge)
    along = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist()
    x, y = width / w, height / h
    upright = [((column * x, row * y), (column * x, (row + 1) * y)) for row, column in across]
    level = [((column * x, row * y), ((column + 1) * x, row * y)) for row, column in along]
    return upright + level
