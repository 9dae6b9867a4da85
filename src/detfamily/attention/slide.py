"""Local attention whose neighbours are gathered by convolutions (Slide-Transformer, arXiv 2304.04237, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.maps import MapAttention, without_padding


class SlideAttention(MapAttention):
    """Each token of a map looks at the k x k tokens around it.

    Neighbours are gathered by a convolution that only shifts the map, and a learned one beside it moves them (section
    4.3, "deformed shifting"). Beyond the map lie zeros, which take part: their keys and values are the biases of the
    convolutions. Padding counts as lying beyond the map, so an image gives the same in any batch.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M.
        kernel_size: side k of the neighbourhood, in tokens; odd.
        reduction: the attention is C / reduction wide, which num_heads must divide.
        qkv_bias: whether queries, keys and values have biases.
        position_bias: whether a number for each head and neighbour is added to all channels of its key.
        shared_gather: whether values are moved like keys, or by a convolution of their own.

    Raises:
        ValueError: the reduction does not divide embed_dim, or num_heads what is left; the kernel is even.
    """

    shift: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int = 3,
        reduction: int = 4,
        qkv_bias: bool = True,
        position_bias: bool = True,
        shared_gather: bool = True,
    ) -> None:
        super().__init__()
        if reduction < 1 or embed_dim % reduction or (embed_dim // reduction) % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim}, reduction={reduction}, num_heads={num_heads}: expected a reduction that "
                "divides embed_dim, and heads that divide what is left"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number, with a token in the middle")
        width, neighbours = embed_dim // reduction, kernel_size**2
        depth = width // num_heads
        self.num_heads = num_heads
        self.neighbours = neighbours
        self.qkv = nn.Linear(embed_dim, 3 * width, bias=qkv_bias)  # the q, k and v of a head lie side by side
        self.proj = nn.Linear(width, embed_dim)
        self.gather = _gathering(depth, kernel_size)
        self.gather_values = None if shared_gather else _gathering(depth, kernel_size)
        self.shift_bias = nn.Parameter(torch.empty(depth * neighbours))
        bound = 1 / kernel_size  # that of PyTorch's convolution
        nn.init.uniform_(self.shift_bias, -bound, bound)
        self.position_bias = nn.Parameter(torch.zeros(num_heads, neighbours)) if position_bias else None
        if self.position_bias is not None:
            nn.init.trunc_normal_(self.position_bias, std=0.02)
        shift = torch.eye(neighbours).view(neighbours, 1, kernel_size, kernel_size).repeat(depth, 1, 1, 1)
        self.register_buffer("shift", shift, persistent=False)

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C). Memory: keys and values are (B, k * k, h, w, C / reduction) each."""
        projected = without_padding(padding_mask, self.qkv(x))
        compared = projected if pos is None else without_padding(padding_mask, self.qkv(x + pos))
        q, k, _ = self._heads(compared)
        v = self._heads(projected)[2]
        k, v = self._neighbours(k, self.gather), self._neighbours(v, self.gather_values or self.gather)
        if self.position_bias is not None:
            k = k + self.position_bias[:, None, :, None, None]
        q = q * (x.shape[-1] / self.num_heads) ** -0.5  # of the full width, as officially
        weights = torch.einsum("bmdhw,bmdnhw->bmnhw", q, k).softmax(2)
        out = torch.einsum("bmnhw,bmdnhw->bhwmd", weights, v.to(weights.dtype))
        output: Tensor = self.proj(out.flatten(3))
        return output

    def _heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, M, d, h, w) of queries, keys and values."""
        q, k, v = projected.unflatten(-1, (self.num_heads, 3, -1)).permute(4, 0, 3, 5, 1, 2).unbind(0)
        return q, k, v

    def _neighbours(self, x: Tensor, gather: nn.Conv2d) -> Tensor:
        """(B, M, d, h, w) -> (B, M, d, k * k, h, w), in raster order. Both convolutions at once: they are linear."""
        assert gather.bias is not None
        weight, bias = gather.weight + self.shift, gather.bias + self.shift_bias
        gathered = F.conv2d(x.flatten(0, 1), weight, bias, padding=gather.padding, groups=gather.groups)
        return gathered.unflatten(0, x.shape[:2]).unflatten(2, (-1, self.neighbours))


def _gathering(channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution from each channel to its k * k neighbours."""
    return nn.Conv2d(channels, channels * kernel_size**2, kernel_size, padding=kernel_size // 2, groups=channels)
