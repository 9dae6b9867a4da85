"""Scaled dot-product attention of every token with every token (Attention Is All You Need, arXiv 1706.03762, 3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.weights import token_at, weights_of
from detfamily.structures import Tokens


class MultiHead(nn.Module):
    """What dense attentions share: heads, and what happens between the projections in and the one out.

    Subclasses define ``compare``.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        dropout: of the attention weights, in training.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, X) -> (B, M, N, X / M)"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, C) of all heads from split queries, keys and values; mask is True where a query may look."""
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)

    def compare(self, query: Tokens, source: Tokens) -> tuple[Tensor, Tensor]:
        """Queries (B, M, N, X) and keys (B, M, S, X) of the heads."""
        raise NotImplementedError

    def mix(self, query: Tokens, source: Tokens, values: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, N, M * X), what each token of ``query`` reads from values (B, M, S, X)."""
        q, k = self.compare(query, source)
        return self.attend(q, k, values, allowed(source, attention_mask))

    def weights(self, query: Tokens, source: Tokens, index: int, attention_mask: Tensor | None = None) -> Tensor:
        """(B, M, S): how the heads weigh the tokens of ``source`` for one token of ``query``; in evaluation mode."""
        mask = None if attention_mask is None else attention_mask[index : index + 1]
        batch, tokens, _ = source.content.shape
        values = source.content.new_zeros(batch, self.num_heads, tokens, 1)
        return weights_of(lambda values: self.mix(token_at(query, index), source, values, mask), values)[..., 0]


class DenseAttention(MultiHead):
    """Multi-head attention; positions are added to queries and keys, not to values (DETR, arXiv 2005.12872, A.3).

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads; must divide embed_dim.
        dropout: of the attention weights, in training.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        # one matrix for query, key and value, and Xavier over the whole of it, as in torch.nn.MultiheadAttention
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        for linear in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tokens, source: Tokens, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N, C); attention_mask (N, N') is True where a query may not look."""
        first = 2 * self.out_proj.in_features
        values = F.linear(source.content, self.in_proj.weight[first:], self.in_proj.bias[first:])
        projected: Tensor = self.out_proj(self.mix(query, source, self.split_heads(values), attention_mask))
        return projected

    def compare(self, query: Tokens, source: Tokens) -> tuple[Tensor, Tensor]:
        """Queries and keys, both of content and position."""
        width = self.out_proj.in_features
        weights, biases = self.in_proj.weight, self.in_proj.bias
        if query is source:
            q, k = F.linear(query.with_pos(), weights[: 2 * width], biases[: 2 * width]).chunk(2, dim=-1)
        else:
            q = F.linear(query.with_pos(), weights[:width], biases[:width])
            k = F.linear(source.with_pos(), weights[width : 2 * width], biases[width : 2 * width])
        return self.split_heads(q), self.split_heads(k)


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Refuse heads that do not divide the width."""
    if embed_dim % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")


def allowed(source: Tokens, attention_mask: Tensor | None) -> Tensor | None:
    """Our masks are True where hidden; PyTorch's attention wants True where visible."""
    padding = source.grid.padding_mask if source.grid is not None else None
    allowed = None if padding is None else ~padding[:, None, None, :]
    if attention_mask is not None:
        allowed = ~attention_mask if allowed is None else allowed & ~attention_mask
    return allowed
