"""Where object queries come from: learned, or proposed by the encoder's tokens.

A query source is called with the encoder's tokens and gives the queries, and what its proposals say (or None).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.blocks.heads import full_precision
from detfamily.blocks.position import sine_code
from detfamily.errors import DataError
from detfamily.structures import Predictions, Queries, Tokens


class QuerySource(nn.Module):
    """What every query source tells about itself.

    Attributes:
        num_queries: N.
        reference_dim: 2 for points, 4 for boxes, None where its queries look from nowhere.
        has_pos: whether its queries have position vectors.
        has_content: whether their content is anything but zero.
    """

    num_queries: int
    reference_dim: int | None
    has_pos: bool
    has_content: bool

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
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.embed_dim = embed_dim
        self.has_pos = learn_pos
        self.has_content = learn_content
        self.pos = nn.Parameter(torch.randn(num_queries, embed_dim)) if learn_pos else None
        width = embed_dim - 1 if indicator else embed_dim
        self.content = nn.Parameter(torch.randn(num_queries, width)) if learn_content else None
        self.reference = reference(num_queries=num_queries) if reference is not None else None
        self.reference_dim = None if self.reference is None else cast("int", self.reference.dim)
        self._check()

    def _check(self) -> None:
        if self.pos is None and self.reference is not None and self.reference.needs_pos:
            raise ValueError("query_source.reference is read from the position: learn_pos=true")
        if self.pos is None and self.content is None and (self.reference is None or not self.reference.differs):
            raise ValueError("query_source: learn_pos=false and learn_content=false would make all queries equal")

    def forward(self, memory: Tokens) -> tuple[Queries, None]:
        """Queries of one group "match"; reference points (B, N, R)."""
        batch = memory.content.shape[0]
        content = memory.content.new_zeros(self.num_queries, self.embed_dim)
        if self.content is not None:
            content = F.pad(self.content, (0, self.embed_dim - self.content.shape[-1]))
        reference = None if self.reference is None else self.reference(self.pos).expand(batch, -1, -1)
        queries = Queries(
            content=content.expand(batch, -1, -1),
            pos=None if self.pos is None else self.pos.expand(batch, -1, -1),
            reference_points=reference,
            groups={"match": slice(0, self.num_queries)},
        )
        return queries, None


def proposal_boxes(memory: Tokens, base_size: float = 0.05) -> tuple[Tensor, Tensor]:
    """A box around each token: centred on its cell, 0.05 * 2^level wide and high (Deformable DETR, A.4).

    Returns:
        (B, S, 4) logits of the boxes, +inf where the box is unusable, and (B, S) bool, True where it is usable: not in
        the padding, and all four numbers within (0.01, 0.99).
    """
    assert memory.grid is not None and memory.reference_points is not None
    sizes = [base_size * 2.0**level for level, (h, w) in enumerate(memory.grid.shapes) for _ in range(h * w)]
    centers = memory.reference_points
    wh = torch.tensor(sizes, dtype=centers.dtype, device=centers.device)[None, :, None].expand(len(centers), -1, 2)
    boxes = torch.cat([centers, wh], -1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if memory.grid.padding_mask is not None:
        usable = usable & ~memory.grid.padding_mask
    return torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], math.inf), usable


class ProposalQueries(QuerySource):
    """Two-stage: the encoder's tokens propose boxes, and the best of them become queries (Deformable DETR, A.4).

    Args:
        num_queries: N, proposals taken.
        embed_dim: the width C.
        class_head: factory of the class head that scores tokens; only its first column decides.
        box_head: factory of the box head, relative to a box around each token.
        mixed: learn the queries' content, and take only position and reference from the proposal (mixed query
            selection, DINO, arXiv 2203.03605, 3.4); otherwise the content comes from the box, too.
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        class_head: Callable[[], nn.Module],
        box_head: Callable[..., nn.Module],
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.embed_dim = embed_dim
        self.reference_dim = 4
        self.has_pos = self.has_content = True
        self.memory_proj = nn.Linear(embed_dim, embed_dim)
        self.memory_norm = nn.LayerNorm(embed_dim)
        self.class_head = class_head()
        self.box_head = box_head()
        code_width = embed_dim if mixed else 2 * embed_dim
        self.pos_proj: nn.Linear | None = nn.Linear(2 * embed_dim, code_width)
        self.pos_norm: nn.LayerNorm | None = nn.LayerNorm(code_width)
        self.content = nn.Parameter(torch.randn(num_queries, embed_dim)) if mixed else None
        for linear in (self.memory_proj, self.pos_proj):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, memory: Tokens) -> tuple[Queries, Predictions]:
        """Queries of one group "match" with boxes as references, and what all tokens say: (1, B, S, ...).

        Raises:
            DataError: fewer tokens than queries.
        """
        logits, box_logits = self._score(memory)
        if logits.shape[1] < self.num_queries:
            raise DataError(
                f"num_queries={self.num_queries} proposals are wanted from {logits.shape[1]} tokens: "
                "use fewer queries, more levels or larger images"
            )
        chosen = logits[..., 0].topk(self.num_queries, dim=1).indices
        references = box_logits.detach().gather(1, chosen[..., None].expand(-1, -1, 4)).sigmoid()
        pos, content = self._encode(references)
        queries = Queries(
            content=content,
            pos=pos,
            reference_points=references,
            groups={"match": slice(0, self.num_queries)},
        )
        return queries, Predictions(logits[None], box_logits.sigmoid()[None])

    def _score(self, memory: Tokens) -> tuple[Tensor, Tensor]:
        box_logits, usable = proposal_boxes(memory)
        tokens = self.memory_norm(self.memory_proj(memory.content.masked_fill(~usable[..., None], 0.0)))
        return full_precision(self.class_head(tokens)), full_precision(self.box_head(tokens)) + box_logits

    def drop_unread_positions(self) -> None:
        """With learned content the code serves nothing else; otherwise the content comes from it, too."""
        if self.content is not None:
            self.has_pos = False
            self.pos_proj = self.pos_norm = None

    def _encode(self, boxes: Tensor) -> tuple[Tensor | None, Tensor]:
        """Position and content (B, N, C) from the sine code of x, y, w, h, in this order."""
        if self.pos_proj is None or self.pos_norm is None:
            assert self.content is not None
            return None, self.content.expand(len(boxes), -1, -1)
        code = sine_code(boxes * (2 * math.pi), self.embed_dim // 2, temperature=10000.0).flatten(-2)
        code = self.pos_norm(self.pos_proj(code.to(self.pos_proj.weight.dtype)))
        if self.content is not None:
            return code, self.content.expand(len(boxes), -1, -1)
        pos, content = code.chunk(2, dim=-1)
        return pos, content
