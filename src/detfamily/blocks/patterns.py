"""Patterns: several queries at each place that differ by a learned vector (Anchor DETR, arXiv 2109.07107, 3.2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from detfamily.structures import Queries


class Patterns(nn.Module):
    """Repeats all queries once for each pattern and adds the pattern to their content.

    Args:
        num_patterns: P; 0 leaves the queries as they are.
        embed_dim: the width C.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, num_patterns: int, embed_dim: int) -> None:
        super().__init__()
        if num_patterns < 0:
            raise ValueError(f"model.num_patterns={num_patterns}: expected 0 for none, or more")
        self.num_patterns = num_patterns
        self.weight = nn.Parameter(torch.randn(num_patterns, embed_dim)) if num_patterns else None

    def forward(self, queries: Queries) -> Queries:
        """N queries to P * N, all of the first pattern first."""
        if self.weight is None:
            return queries
        if queries.attention_mask is not None or [*queries.groups] != ["match"]:
            raise ValueError("patterns repeat the queries of one group without a mask")
        count = queries.content.shape[1]
        content = queries.content[:, None] + self.weight[:, None]
        return replace(
            queries,
            content=content.flatten(1, 2),
            pos=self._repeat(queries.pos),
            reference_points=self._repeat(queries.reference_points),
            groups={"match": slice(0, self.num_patterns * count)},
        )

    def _repeat(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat(1, self.num_patterns, 1)
