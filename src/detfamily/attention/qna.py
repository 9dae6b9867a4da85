"""Local attention with learned queries (QnA, arXiv 2112.11435)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.dense import check_heads
from detfamily.attention.maps import MapAttention, without_padding


class LearnedQueryAttention(MapAttention):
    """The windows of k x k tokens around all tokens are asked the same few learned queries (section 3.2 and 3.3).

    As queries are the same everywhere, each key is weighed once, and two convolutions sum up the windows: one the
    weighed values, one the weights. The answers to the queries are added up. Padding weighs nothing, like what lies
    beyond the map, so an image gives the same in any batch; a token that sees nothing else reads zeros.

    Weights are exponentials, so that each window has a softmax; the official code has two other forms, the subclasses.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        num_queries: learned queries of each head.
        kernel_size: side k of a window, in tokens; odd.

    Raises:
        ValueError: num_heads does not divide embed_dim; the kernel is even; there is no query.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_queries: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number, with a token in the middle")
        if num_queries < 1:
            raise ValueError(f"num_queries={num_queries}: expected at least one")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.queries = nn.Parameter(torch.empty(num_queries, embed_dim))
        self.k = nn.Linear(embed_dim, embed_dim, bias=False)
        self.v = nn.Linear(embed_dim, embed_dim, bias=False)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.scale = nn.Parameter(torch.empty(num_queries * num_heads, kernel_size**2))
        self.position_bias = nn.Parameter(torch.empty(num_queries * num_heads, kernel_size**2))
        nn.init.trunc_normal_(self.queries, std=(num_heads / embed_dim) ** 0.5)
        nn.init.normal_(self.scale, std=0.02)
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def weigh(self, logits: Tensor) -> Tensor:
        """Weights from logits (X, Q, M, ...), whose common factor for the last axes does not matter."""
        largest = logits.detach().flatten(3).amax(-1).clamp(min=torch.finfo(logits.dtype).min)
        return (logits - largest.view(*largest.shape, *[1] * (logits.ndim - 3))).exp()

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C). Memory: weighed values are (B, Q, C, h, w)."""
        width = x.shape[-1]
        q = self.queries.unflatten(-1, (self.num_heads, -1)) * (self.num_heads / width) ** 0.5
        k = self.k(x if pos is None else x + pos).unflatten(-1, (self.num_heads, -1))
        v = without_padding(padding_mask, self.v(x)).unflatten(-1, (self.num_heads, -1))
        logits = torch.einsum("bhwmd,qmd->bqmhw", k, q.to(k.dtype))
        cost = self._without_padding(padding_mask, logits)
        places = self.weigh(self.position_bias.unflatten(0, (1, -1, self.num_heads)))[0]
        weighed = cost[:, :, :, None] * v.permute(0, 3, 4, 1, 2)[:, None]
        kernels = places * self.scale.unflatten(0, (-1, self.num_heads))
        sums = self._windows(weighed, kernels[:, :, None].expand(*weighed.shape[1:4], -1))
        total = self._windows(cost, places)[:, :, :, None]
        answers = sums / total.masked_fill(total == 0, 1)
        output: Tensor = self.proj(answers.sum(1).flatten(1, 2).permute(0, 2, 3, 1))
        return output

    def _without_padding(self, padding_mask: Tensor | None, logits: Tensor) -> Tensor:
        """Weights, 0 at padding, of which no logit may be the largest either."""
        if padding_mask is None:
            return self.weigh(logits)
        hidden = padding_mask[:, None, None]
        return self.weigh(logits.masked_fill(hidden, -torch.inf)).masked_fill(hidden, 0)

    def _windows(self, x: Tensor, kernels: Tensor) -> Tensor:
        """(B, ..., h, w) summed up over windows, with a kernel (..., k * k) for each map."""
        maps = x.flatten(1, -3)
        weight = kernels.reshape(-1, 1, self.kernel_size, self.kernel_size)
        return F.conv2d(maps, weight.to(maps.dtype), padding=self.kernel_size // 2, groups=maps.shape[1]).view(x.shape)


class SigmoidQueryAttention(LearnedQueryAttention):
    """With sigmoids as weights."""

    def weigh(self, logits: Tensor) -> Tensor:
        """Weights in (0, 1) from logits of any shape."""
        return logits.sigmoid()


class LinearQueryAttention(LearnedQueryAttention):
    """With the logits themselves as weights, which may be negative and sum up to about zero."""

    def weigh(self, logits: Tensor) -> Tensor:
        """The logits."""
        return logits
