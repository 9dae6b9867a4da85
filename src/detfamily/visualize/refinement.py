"""The boxes that the decoder says, layer by layer, for one query after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from detfamily.blocks.boxes import to_xyxy
from detfamily.visualize.canvas import mark_box, mark_place, panels, show, surroundings, to_picture


@dataclass(frozen=True)
class Steps:
    """What a query says, layer by layer.

    Attributes:
        words: of the query and its answer.
        boxes: (D, 4) cx, cy, w, h in (0, 1).
        scores: (D,) of the class that it answers in the end.
        references: (R,) that the first layer looks from, or None.
    """

    words: str
    boxes: Tensor
    scores: Tensor
    reference: Sequence[float] | None


def draw_refinement(pixels: Tensor, queries: Sequence[Steps], title: str) -> Image.Image:
    """Draw the boxes of all decoder layers, from dark (first) to bright (last), in a panel for each query.

    A panel shows the surroundings of its boxes.

    Args:
        pixels: (3, H, W) uint8.
        queries: one or more.
        title: of the picture.
    """
    columns = min(4, len(queries))
    figure, rows = panels(-(-len(queries) // columns), columns, torch.empty(3, 1, 1), title, side=3.2, legend=0.3)
    every = [axes for row in rows for axes in row]
    for axes in every[len(queries) :]:
        axes.set_axis_off()
    for axes, query in zip(every, queries, strict=False):
        show(axes, pixels, query.words, dim=0.2)
        colors = _colors(len(query.boxes))
        if query.reference is not None:
            if len(query.reference) == 4:
                mark_box(axes, query.reference, pixels, "white", "--")
            mark_place(axes, query.reference[:2], pixels)
        for box, color in zip(query.boxes.tolist(), colors, strict=True):
            mark_box(axes, box, pixels, color, width=1.6)
        corners = to_xyxy(query.boxes)
        left, top, right, bottom = surroundings(torch.cat([corners[:, :2], corners[:, 2:]]), pixels)
        axes.set(xlim=(left, right), ylim=(bottom, top))
        axes.set_xlabel("score " + "  ".join(f"{score:.2f}" for score in query.scores.tolist()), fontsize=8)
    colors = _colors(len(queries[0].boxes))
    handles = [Line2D([], [], color=color, label=f"layer {layer}") for layer, color in enumerate(colors)]
    if queries[0].reference is not None:
        handles.insert(0, Line2D([], [], color="grey", linestyle="--", marker="+", label="reference"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return to_picture(figure)


def _colors(layers: int) -> list[str]:
    return [to_hex(colormaps["plasma"](0.1 + 0.85 * layer / max(layers - 1, 1))) for layer in range(layers)]
