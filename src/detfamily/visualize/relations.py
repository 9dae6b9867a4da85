"""What object queries read from each other: self-attention in the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from detfamily.visualize.canvas import GREEN, HALO, mark_box, panels, show, to_picture

_MOST = 8
_ORANGE = "#ff9500"


@dataclass(frozen=True)
class Related:
    """What one query reads from all queries.

    Attributes:
        query: its number.
        weights: (M, N) for each head.
        boxes: (N, 4) cx, cy, w, h in (0, 1), what the queries of this layer say.
    """

    query: int
    weights: Tensor
    boxes: Tensor


def draw_relations(pixels: Tensor, states: Mapping[str, Related], title: str) -> Image.Image:
    """Draw a query's box and those that it reads most from, in the mean of the heads.

    Args:
        pixels: (3, H, W) uint8.
        states: name ("trained", "at initialisation") -> what is read.
        title: of the picture.
    """
    figure, (row,) = panels(1, len(states), pixels, title, side=4.0, legend=0.3)
    height, width = pixels.shape[1:]
    for axes, (name, state) in zip(row, states.items(), strict=True):
        mean = state.weights.mean(0).cpu()
        chosen = mean.topk(min(_MOST, len(mean))).indices.tolist()
        show(axes, pixels, f"{name}: {float(mean[chosen].sum()):.0%} of the weight is drawn", dim=0.3)
        boxes = state.boxes.cpu()
        here = (boxes[state.query, :2].clamp(0, 1)).tolist()
        for other in reversed(chosen):
            share = float(mean[other] / mean[chosen[0]])
            mark_box(axes, boxes[other].tolist(), pixels, _ORANGE, width=0.6 + 1.6 * share)
            there = boxes[other, :2].clamp(0, 1).tolist()
            axes.plot(
                [here[0] * width, there[0] * width],
                [here[1] * height, there[1] * height],
                color=_ORANGE,
                linewidth=0.6 + 1.6 * share,
                path_effects=HALO,
            )
        for other in _apart(chosen, boxes):
            x, y = boxes[other, :2].clamp(0.03, 0.97).tolist()
            words = f"{float(mean[other]):.2f}"
            axes.text(
                x * width, y * height, words, fontsize=7, color="white", ha="center", va="center", path_effects=HALO
            )
        mark_box(axes, boxes[state.query].tolist(), pixels, GREEN, width=1.8)
    handles = [
        Line2D([], [], color=GREEN, label="the query"),
        Line2D([], [], color=_ORANGE, label=f"the {_MOST} queries that it reads most from, with their weights"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return to_picture(figure)


def _apart(chosen: Sequence[int], boxes: Tensor) -> list[int]:
    """Those whose words do not cover the words of one before."""
    kept: list[int] = []
    for one in chosen:
        gaps = [(boxes[one, :2] - boxes[other, :2]).abs() for other in kept]
        if all(float(gap[0]) > 0.07 or float(gap[1]) > 0.04 for gap in gaps):
            kept.append(one)
    return kept
