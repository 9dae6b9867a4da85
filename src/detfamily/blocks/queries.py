"""Where object queries come from: here the learned ones; those that the encoder proposes are in ``proposals``.

A query source is called with the encoder's tokens and the decoder's heads, and gives the queries, and what its
proposals say (or None).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from detfamily.blocks.heads import Heads
from detfamily.structures import Predictions, Queries, Tokens


class QuerySource(nn.Module):
    """What every query source tells about itself, and the queries that only training has.

    Attributes:
        num_queries: N, without those that only training has.
        num_one_to_many: queries that only training has: several of them answer for each object (H-DETR).
        reference_dim: 2 for points, 4 for boxes, None where its queries look from nowhere.
        has_pos: whether its queries have position vectors.
        has_content: whether their content is anything but zero.
    """

    reference_dim: int | None
    has_pos: bool
    has_content: bool

    def __init__(self, num_queries: int, num_one_to_many: int = 0) -> None:
        super().__init__()
        if num_one_to_many < 0:
            raise ValueError(f"one_to_many.num_queries={num_one_to_many}: expected 0 for none, or more")
        self.num_queries = num_queries
        self.num_one_to_many = num_one_to_many

    def forward(self, memory: Tokens, heads: Heads) -> tuple[Queries, Predictions | None]:
        """The queries, and what proposals say."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Queries that there are now."""
        return self.num_queries + (self.num_one_to_many if self.training else 0)

    def grouped(self, queries: Queries) -> Queries:
        """Name the groups of the queries, the one-to-many ones last; groups do not look at each other (H-DETR, 3.2)."""
        first, count = self.num_queries, queries.content.shape[1]
        if count == first:
            return replace(queries, groups={"match": slice(0, count)})
        late = torch.arange(count, device=queries.content.device) >= first
        return replace(
            queries,
            attention_mask=late[:, None] != late,
            groups={"match": slice(0, first), "one_to_many": slice(first, count)},
        )

    def drop_unread_positions(self) -> None:
        """Do without what makes positions alone: the decoder's query position does not read them."""


class LearnedQueries(QuerySource):
    """Queries that are parameters, the same for every image.

    DETR learns positions and starts with zero content; Deformable DETR learns both, and reads a reference point from
    the position; DAB-DETR learns references alone.

    Args:
        num_queries: N.
        embed_dim: the width C.
        learn_pos: learn a position vector for each query.
        learn_content: learn the initial content; without it the content starts at zero.
        reference: factory of what gives references, called with the positions; None where queries look from nowhere.
        indicator: leave the content's last channel at zero: denoising marks its copies there (``Denoising``).
        num_one_to_many: queries beyond N, in training only.

    Raises:
        ValueError: nothing that is learned tells queries apart, or references are wanted from positions that are not
            there.
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        learn_pos: bool,
        learn_content: bool,
        reference: Callable[..., nn.Module] | None = None,
        indicator: bool = False,
        num_one_to_many: int = 0,
    ) -> None:
        super().__init__(num_queries, num_one_to_many)
        self.embed_dim = embed_dim
        self.has_pos = learn_pos
        self.has_content = learn_content
        total = num_queries + num_one_to_many
        self.pos = nn.Parameter(torch.randn(total, embed_dim)) if learn_pos else None
        width = embed_dim - 1 if indicator else embed_dim
        self.content = nn.Parameter(torch.randn(total, width)) if learn_content else None
        self.reference = reference(num_queries=total) if reference is not None else None
        self.reference_dim = None if self.reference is None else cast("int", self.reference.dim)
        self._check()

    def _check(self) -> None:
        if self.pos is None and self.reference is not None and self.reference.needs_pos:
            raise ValueError("query_source.reference is read from the position: learn_pos=true")
        if self.pos is None and self.content is None and (self.reference is None or not self.reference.differs):
            raise ValueError("query_source: learn_pos=false and learn_content=false would make all queries equal")

    def forward(self, memory: Tokens, heads: Heads) -> tuple[Queries, None]:
        """Queries of the group "match" and, in training, "one_to_many"; reference points (B, N, R)."""
        batch = memory.content.shape[0]
        content = memory.content.new_zeros(self.count, self.embed_dim)
        if self.content is not None:
            content = F.pad(self.content[: self.count], (0, self.embed_dim - self.content.shape[-1]))
        reference = None
        if self.reference is not None:
            reference = self.reference(self.pos)[: self.count].expand(batch, -1, -1)
        queries = Queries(
            content=content.expand(batch, -1, -1),
            pos=None if self.pos is None else self.pos[: self.count].expand(batch, -1, -1),
            reference_points=reference,
        )
        return self.grouped(queries), None
