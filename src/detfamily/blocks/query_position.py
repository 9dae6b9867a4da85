"""What is added to the object queries' content in each decoder layer, where they are compared."""

from __future__ import annotations

from torch import Tensor, nn

from detfamily.structures import Queries, Tokens


class FixedPosition(nn.Module):
    """The query's own position vector, the same in every layer (DETR, Deformable DETR)."""

    def forward(self, layer_index: int, queries: Queries, memory: Tokens) -> Tensor | None:
        """(B, N, C) or None"""
        return queries.pos
