"""What object queries are compared by in each decoder layer, besides their content.

A query position is called with the layer's index, the queries and the memory, and gives the queries with ``pos`` (added
to the content) and, where the cross-attention reads it, ``sine`` (compared on its own). It is built by the decoder,
which says by ``cross_sine`` whether it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from detfamily.blocks.layers import MLP
from detfamily.blocks.position import sine_code
from detfamily.structures import Queries, Tokens

TEMPERATURE = 10000.0
"""Of the codes of references; officially a constant, also where the memory's positions have another one."""

_LEAST_SIZE = 1e-4
"""Sides that codes are divided by; those of anchors are larger by far."""


class QueryPosition(nn.Module):
    """What every query position tells about itself.

    Attributes:
        reads_pos: whether it hands on the queries' own position vectors.
        reference_dim: how many numbers of the references it reads and so must be kept; None keeps all.
        needs_reference: the fewest numbers that it needs; 0 where it needs no references.
    """

    reads_pos: bool
    reference_dim: int | None = None
    needs_reference: int = 0


class FixedPosition(QueryPosition):
    """The query's own position vector, the same in every layer (DETR, Deformable DETR).

    Raises:
        ValueError: the cross-attention reads a sine code.
    """

    reads_pos = True

    def __init__(self, cross_sine: bool = False) -> None:
        super().__init__()
        if cross_sine:
            raise ValueError(
                "query_position=fixed gives no code of a place, and this cross-attention compares one: use "
                "query_position=center or query_position=anchor, or cross_attention=dense"
            )

    def forward(self, layer_index: int, queries: Queries, memory: Tokens) -> Queries:
        """The queries as they are."""
        return queries


class CenterSine(QueryPosition):
    """The query's own position vector, and a code of its reference's centre (Conditional DETR, section 3.3).

    Args:
        embed_dim: the width C.
        scale: factory of what makes the conditional spatial query of content and code (eq. 6); None leaves the code.
        cross_sine: whether the cross-attention reads the code; without, this is ``FixedPosition``.
    """

    reads_pos = True
    needs_reference = 2

    def __init__(self, embed_dim: int, scale: Callable[[], nn.Module] | None = None, cross_sine: bool = True) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.cross_sine = cross_sine
        self.scale = scale() if scale is not None and cross_sine else None

    def forward(self, layer_index: int, queries: Queries, memory: Tokens) -> Queries:
        """Adds sine (B, N, C)."""
        if not self.cross_sine:
            return queries
        assert queries.reference_points is not None
        code = anchor_code(queries.reference_points[..., :2], self.embed_dim).to(queries.content.dtype)
        return replace(queries, sine=code if self.scale is None else self.scale(layer_index, queries.content, code))


class AnchorPosition(QueryPosition):
    """Positions from dynamic anchors, anew in every layer (DAB-DETR, arXiv 2201.12329, sections 4.2 to 4.4).

    The position vector is made of the code of the whole anchor (eq. 3). Where the cross-attention reads a sine code, it
    is that of the anchor's centre, scaled by the content (eq. 4) and by the anchor's size (eq. 6); otherwise the scale
    goes to the position vector (the official DAB-Deformable-DETR).

    Args:
        embed_dim: the width C.
        dim: numbers of an anchor: 4, or 2 for a point.
        scale: factory of the scale by content; None leaves it out (DINO).
        modulate_wh: scale the code's y half by a height that the content says over the anchor's height, the x half by
            the widths.
        scale_by_valid: take anchors over the padded batch, by the valid ratios of the finest level (as the deformable
            line does).
        cross_sine: whether the cross-attention reads a sine code.

    Raises:
        ValueError: anchors without a size are to be modulated by it.
    """

    reads_pos = False

    def __init__(
        self,
        embed_dim: int,
        dim: int = 4,
        scale: Callable[[], nn.Module] | None = None,
        modulate_wh: bool = False,
        scale_by_valid: bool = False,
        cross_sine: bool = False,
    ) -> None:
        super().__init__()
        if dim not in (2, 4):
            raise ValueError(f"query_position.dim={dim}: an anchor is a point (2) or a box (4)")
        if modulate_wh and dim == 2:
            raise ValueError(
                "query_position.modulate_wh=true needs anchors with a size: model.anchor_dim=4, or "
                "query_position.modulate_wh=false"
            )
        self.embed_dim = embed_dim
        self.reference_dim = self.needs_reference = dim
        self.scale_by_valid = scale_by_valid
        self.cross_sine = cross_sine
        self.position_head = MLP(dim * embed_dim // 2, embed_dim, embed_dim, num_layers=2, xavier=True)
        self.scale = scale() if scale is not None else None
        size_head = MLP(embed_dim, embed_dim, 2, num_layers=2, xavier=True) if modulate_wh and cross_sine else None
        self.size_head = size_head

    def forward(self, layer_index: int, queries: Queries, memory: Tokens) -> Queries:
        """Sets pos (B, N, C), and sine (B, N, C) where it is read."""
        assert queries.reference_points is not None and memory.grid is not None
        anchors = queries.reference_points[..., : self.reference_dim]
        if self.scale_by_valid:
            ratios = memory.grid.valid_ratios[:, None, 0]
            anchors = anchors * torch.cat([ratios] * (anchors.shape[-1] // 2), -1)
        code = anchor_code(anchors, self.embed_dim).to(queries.content.dtype)
        pos = self.position_head(code)
        if not self.cross_sine:
            return replace(queries, pos=self._scaled(layer_index, queries.content, pos))
        sine = self._scaled(layer_index, queries.content, code[..., : self.embed_dim])
        return replace(queries, pos=pos, sine=self._modulated(queries.content, sine, anchors))

    def _scaled(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        if self.scale is None:
            return code
        scaled: Tensor = self.scale(layer_index, content, code)
        return scaled

    def _modulated(self, content: Tensor, sine: Tensor, anchors: Tensor) -> Tensor:
        if self.size_head is None:
            return sine
        # what auxiliary heads fill up with may have no size
        sizes = anchors[..., 2:].clamp(min=_LEAST_SIZE)
        width, height = (self.size_head(content).sigmoid() / sizes).split(1, dim=-1)
        y, x = sine.chunk(2, dim=-1)
        return torch.cat([y * height, x * width], -1)


def anchor_code(anchors: Tensor, embed_dim: int) -> Tensor:
    """(B, N, R) points or boxes in (0, 1) to (B, N, R * C / 2): codes of y, x and, of boxes, w, h, in this order."""
    order = [1, 0, 2, 3][: anchors.shape[-1]]
    return sine_code(anchors[..., order] * (2 * math.pi), embed_dim // 2, TEMPERATURE).flatten(-2)
