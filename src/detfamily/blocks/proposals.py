"""Two stages: the encoder's tokens propose boxes, and the best of them become object queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from detfamily.blocks.heads import Heads, full_precision
from detfamily.blocks.position import sine_code
from detfamily.blocks.queries import QuerySource
from detfamily.errors import DataError
from detfamily.structures import Predictions, Queries, Tokens

BASE_SIZE = 0.05
"""Width and height of the boxes around the finest level's tokens."""


def proposal_boxes(memory: Tokens, base_size: Tensor | float = BASE_SIZE) -> tuple[Tensor, Tensor]:
    """A box around each token: centred on its cell, base_size * 2^level wide and high (Deformable DETR, A.4).

    Args:
        memory: tokens of feature maps.
        base_size: one number, or (1, 2) width and height.

    Returns:
        (B, S, 4) logits of the boxes, +inf where the box is unusable, and (B, S) bool, True where it is usable: not in
        the padding, and all four numbers within (0.01, 0.99).
    """
    assert memory.grid is not None and memory.reference_points is not None
    centers = memory.reference_points
    scales = [2.0**level for level, (h, w) in enumerate(memory.grid.shapes) for _ in range(h * w)]
    sizes = torch.tensor(scales, dtype=centers.dtype, device=centers.device)[:, None] * base_size
    boxes = torch.cat([centers, sizes.expand(len(centers), -1, 2)], -1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if memory.grid.padding_mask is not None:
        usable = usable & ~memory.grid.padding_mask
    # a harmless number first: the gradient of a logarithm of nothing would be NaN, also where it is hidden
    inside = boxes.masked_fill(~usable[..., None], 0.5)
    return torch.log(inside / (1 - inside)).masked_fill(~usable[..., None], math.inf), usable


class ProposalQueries(QuerySource):
    """Two-stage: the encoder's tokens propose boxes, and the best of them become queries (Deformable DETR, A.4).

    Args:
        num_queries: N, proposals taken.
        embed_dim: the width C.
        class_head: factory of the class head that scores tokens; None for the decoder's, which all its layers share.
        box_head: factory of the box head, relative to a box around each token; None for the decoder's.
        content: what the queries start with: "code", made of the code of the proposed box, as their positions are
            (Deformable DETR); "learned", parameters (mixed query selection, DINO, arXiv 2203.03605, 3.4); "memory", the
            proposing token's own features ("pure" selection there).
        class_agnostic: proposals only say "object", in the first column, which decides; otherwise they say classes, and
            the best of them decides.
        answer_all: all tokens are trained; otherwise the chosen ones.
        learn_size: learn the width and height of the boxes around the finest level's tokens.
        num_one_to_many: proposals taken beyond N, in training only.
    """

    reference_dim = 4
    has_content = True

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        class_head: Callable[[], nn.Module] | None,
        box_head: Callable[..., nn.Module] | None,
        content: Literal["code", "learned", "memory"] = "code",
        class_agnostic: bool = True,
        answer_all: bool = True,
        learn_size: bool = False,
        num_one_to_many: int = 0,
    ) -> None:
        super().__init__(num_queries, num_one_to_many)
        self.embed_dim = embed_dim
        self.has_pos = True
        self.class_agnostic = class_agnostic
        self.answer_all = answer_all
        self.content_from = content
        self.memory_proj = nn.Linear(embed_dim, embed_dim)
        self.memory_norm = nn.LayerNorm(embed_dim)
        self.class_head = None if class_head is None else class_head()
        self.box_head = None if box_head is None else box_head()
        # of position and content together, also where the content is another: officially the norm is over both
        self.pos_proj: nn.Linear | None = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.pos_norm: nn.LayerNorm | None = nn.LayerNorm(2 * embed_dim)
        learned = content == "learned"
        self.content = nn.Parameter(torch.randn(num_queries + num_one_to_many, embed_dim)) if learned else None
        self.size_logit = nn.Parameter(torch.full((1, 2), BASE_SIZE).logit()) if learn_size else None
        for linear in (self.memory_proj, self.pos_proj):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, memory: Tokens, heads: Heads) -> tuple[Queries, Predictions]:
        """Queries with boxes as references, and what the proposals say.

        Returns:
            Queries of the group "match" and, in training, "one_to_many"; predictions (1, B, S or N, ...) of all tokens
            or of those that became queries of the group "match".

        Raises:
            DataError: fewer tokens than queries.
        """
        boxes, usable = proposal_boxes(memory, BASE_SIZE if self.size_logit is None else self.size_logit.sigmoid())
        source = memory.content.masked_fill(~usable[..., None], 0.0)
        if self.answer_all:
            tokens = self._tokens(source)
            logits, box_logits = self._answer(tokens, boxes, heads)
            chosen = self._best(logits)
            chosen_tokens, references = _pick(tokens, chosen), _pick(box_logits, chosen)
        else:
            # most tokens are scored only, so nothing of theirs is kept for the gradient
            with torch.no_grad():
                chosen = self._best(full_precision(self._class_head(heads)(self._tokens(source))))
            chosen_tokens = self._tokens(_pick(source, chosen))
            logits, box_logits = self._answer(chosen_tokens, _pick(boxes, chosen), heads)
            references = box_logits
        references = references.detach().sigmoid()
        pos, content = self._encode(references)
        queries = Queries(
            content=chosen_tokens.detach() if content is None else content, pos=pos, reference_points=references
        )
        said = slice(None) if self.answer_all else slice(0, self.num_queries)
        return self.grouped(queries), Predictions(logits[None, :, said], box_logits[None, :, said].sigmoid())

    def _tokens(self, source: Tensor) -> Tensor:
        tokens: Tensor = self.memory_norm(self.memory_proj(source))
        return tokens

    def _answer(self, tokens: Tensor, boxes: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
        """Logits of classes, and of boxes."""
        box_head = heads.shared_box_head if self.box_head is None else self.box_head
        return full_precision(self._class_head(heads)(tokens)), full_precision(box_head(tokens)) + boxes

    def _class_head(self, heads: Heads) -> nn.Module:
        return heads.shared_class_head if self.class_head is None else self.class_head

    def _best(self, logits: Tensor) -> Tensor:
        """(B, N) indices of the best tokens, best first."""
        if logits.shape[1] < self.count:
            raise DataError(
                f"{self._wanted()} proposals are wanted from {logits.shape[1]} tokens: "
                "use fewer queries, more levels or larger images"
            )
        scores = logits[..., 0] if self.class_agnostic else logits.amax(-1)
        return scores.topk(self.count, dim=1).indices

    def _wanted(self) -> str:
        wanted = f"model.num_queries={self.num_queries}"
        return (
            wanted if self.count == self.num_queries else f"{wanted} and model.num_one_to_many={self.num_one_to_many}"
        )

    def drop_unread_positions(self) -> None:
        """Unless the content comes from it, too, the code serves nothing else."""
        if self.content_from != "code":
            self.has_pos = False
            self.pos_proj = self.pos_norm = None

    def _encode(self, boxes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Position and content (B, N, C), from the sine code of x, y, w, h, in this order, or learned."""
        learned = None if self.content is None else self.content[: self.count].expand(len(boxes), -1, -1)
        if self.pos_proj is None or self.pos_norm is None:
            return None, learned
        code = sine_code(boxes * (2 * math.pi), self.embed_dim // 2, temperature=10000.0).flatten(-2)
        code = self.pos_norm(self.pos_proj(code.to(self.pos_proj.weight.dtype)))
        pos, content = code.chunk(2, dim=-1)
        return pos, content if self.content_from == "code" else learned


def _pick(values: Tensor, chosen: Tensor) -> Tensor:
    """(B, S, X) and (B, N) to (B, N, X)."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
