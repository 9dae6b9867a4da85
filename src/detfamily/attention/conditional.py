"""Attention whose content and position parts are projected apart (Conditional DETR, arXiv 2108.06152, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from detfamily.attention.dense import MultiHead, allowed
from detfamily.blocks.layers import MLP
from detfamily.structures import Queries, Tokens


class SplitDenseAttention(MultiHead):
    """Self-attention whose queries and keys are the sum of a projected content and a projected position.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads; must divide embed_dim.
        dropout: of the attention weights, in training.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.query_content_proj = _linear(embed_dim)
        self.query_pos_proj = _linear(embed_dim)
        self.key_content_proj = _linear(embed_dim)
        self.key_pos_proj = _linear(embed_dim)
        self.value_proj = _linear(embed_dim)
        self.out_proj = _out_proj(embed_dim)

    def forward(self, query: Tokens, source: Tokens, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N, C); attention_mask (N, N') is True where a query may not look."""
        values = self.split_heads(self.value_proj(source.content))
        projected: Tensor = self.out_proj(self.mix(query, source, values, attention_mask))
        return projected

    def compare(self, query: Tokens, source: Tokens) -> tuple[Tensor, Tensor]:
        """Queries and keys, each a sum of content and position."""
        q, k = self.query_content_proj(query.content), self.key_content_proj(source.content)
        if query.pos is not None:
            q = q + self.query_pos_proj(query.pos)
        if source.pos is not None:
            k = k + self.key_pos_proj(source.pos)
        return self.split_heads(q), self.split_heads(k)


class ConditionalAttention(MultiHead):
    """Cross-attention that compares content with content and place with position, and adds the two scores (eq. 2).

    Within each head, the query's content and its sine code stand side by side, and so do the memory's content and
    position: heads of twice the width for the comparison, of the usual one for the values.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads; must divide embed_dim.
        dropout: of the attention weights, in training.
        add_query_pos: also add the query's position to its content, and the memory's to its own: officially in the
            first layer, whose content is still empty.

    Raises:
        ValueError: num_heads does not divide embed_dim; the queries have no sine code, or no positions that are to be
            added; the memory has no positions.
    """

    reads_sine = True

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, add_query_pos: bool = False) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.query_content_proj = _linear(embed_dim)
        self.query_pos_proj = _linear(embed_dim) if add_query_pos else None
        self.query_sine_proj = _linear(embed_dim)
        self.key_content_proj = _linear(embed_dim)
        self.key_pos_proj = _linear(embed_dim)
        self.value_proj = _linear(embed_dim)
        self.out_proj = _out_proj(embed_dim)

    def forward(self, query: Queries, source: Tokens, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N, C)"""
        values = self.split_heads(self.value_proj(source.content))
        projected: Tensor = self.out_proj(self.mix(query, source, values, attention_mask))
        return projected

    def compare(self, query: Tokens, source: Tokens) -> tuple[Tensor, Tensor]:
        """Queries (B, M, N, 2C/M) and keys (B, M, S, 2C/M) of the heads."""
        if not isinstance(query, Queries) or query.sine is None:
            raise ValueError("conditional attention compares a sine code, and these queries have none")
        if source.pos is None:
            raise ValueError(
                "conditional attention compares positions, and the memory has none: memory_position=at_attention"
            )
        q, k = self.query_content_proj(query.content), self.key_content_proj(source.content)
        key_pos = self.key_pos_proj(source.pos)
        if self.query_pos_proj is not None:
            if query.pos is None:
                raise ValueError("add_query_pos=true adds the queries' positions to their content, and they have none")
            q, k = q + self.query_pos_proj(query.pos), k + key_pos
        return self._beside(q, self.query_sine_proj(query.sine)), self._beside(k, key_pos)

    def _beside(self, content: Tensor, place: Tensor) -> Tensor:
        split = (x.unflatten(-1, (self.num_heads, -1)) for x in (content, place))
        return torch.cat(list(split), -1).transpose(1, 2)


class LevelConditionalAttention(ConditionalAttention):
    """Conditional attention to each feature level on its own; the query says what each level is worth.

    The decoder of "DAB-Deformable-DETR, deformable encoder only" (official DN-DETR code), but that its levels are
    weighed by the queries of the self-attention, ours by content and position.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads; must divide embed_dim.
        num_levels: levels of the maps read from.
        dropout: of the attention weights, in training.
        add_query_pos: as in ``ConditionalAttention``.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, num_levels: int, dropout: float = 0.0, add_query_pos: bool = False
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, add_query_pos)
        self.level_weights = nn.Linear(embed_dim, num_levels)
        nn.init.xavier_uniform_(self.level_weights.weight)

    def mix(self, query: Tokens, source: Tokens, values: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, N, M * X), what the levels give, weighed by the query."""
        if source.grid is None or len(source.grid.shapes) != self.level_weights.out_features:
            found = 0 if source.grid is None else len(source.grid.shapes)
            raise ValueError(f"got {found} feature levels, built for num_levels={self.level_weights.out_features}")
        q, k = self.compare(query, source)
        sizes = [h * w for h, w in source.grid.shapes]
        masks = allowed(source, attention_mask)
        parts = [None] * len(sizes) if masks is None else masks.split(sizes, dim=-1)
        outputs = [
            self.attend(q, key, value, mask)
            for key, value, mask in zip(k.split(sizes, dim=2), values.split(sizes, dim=2), parts, strict=True)
        ]
        weights = self.level_weights(query.with_pos()).softmax(-1)
        # the weights sum to one, so that mixing before the common projection is mixing after it
        return torch.einsum("bnl,lbnc->bnc", weights, torch.stack(outputs))


class RescaledSine(nn.Module):
    """A cross-attention whose sine code is scaled by the output of the self-attention before it.

    Conditional DETR, table 3, "CSQ-I". The content that a cross-attention gets is what the self-attention gave.

    Args:
        attention: factory of the cross-attention.
        embed_dim: the width C.
    """

    def __init__(self, attention: Callable[[], nn.Module], embed_dim: int) -> None:
        super().__init__()
        self.attention = attention()
        self.scale = MLP(embed_dim, embed_dim, embed_dim, num_layers=2, xavier=True)

    def forward(self, query: Queries, source: Tokens, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N, C)"""
        output: Tensor = self.attention(self._rescaled(query), source)
        return output

    def weights(self, query: Tokens, source: Tokens, index: int, attention_mask: Tensor | None = None) -> Tensor:
        """(B, M, S), as ``MultiHead.weights``."""
        weights: Tensor = cast("MultiHead", self.attention).weights(self._rescaled(query), source, index)
        return weights

    def _rescaled(self, query: Tokens) -> Queries:
        assert isinstance(query, Queries) and query.sine is not None
        return replace(query, sine=query.sine * self.scale(query.content))


def _linear(embed_dim: int) -> nn.Linear:
    linear = nn.Linear(embed_dim, embed_dim)
    nn.init.xavier_uniform_(linear.weight)
    return linear


def _out_proj(embed_dim: int) -> nn.Linear:
    linear = _linear(embed_dim)
    nn.init.zeros_(linear.bias)
    return linear
