"""Spatial-reduction attention (Pyramid Vision Transformer, arXiv 2102.12122, section 3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.deformable import FewKeysAttention
from detfamily.attention.maps import conv_on_map, without_padding


class PyramidAttention(FewKeysAttention):
    """All tokens look at a map reduced by a convolution with stride.

    Rows and columns that fill no cell at the border are dropped, as officially; a map smaller than a cell is filled up
    with zeros instead, and has one key.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        reduction: side of the cells that become keys, in tokens; 1 leaves the map as it is.

    Raises:
        ValueError: num_heads does not divide embed_dim; the reduction is less than one.
    """

    def __init__(self, embed_dim: int, num_heads: int, reduction: int) -> None:
        if reduction < 1:
            raise ValueError(f"reduction={reduction}: expected cells of at least 1 token a side")
        super().__init__(embed_dim, num_heads, stride=reduction)
        if reduction > 1:
            self.reduce = nn.Conv2d(embed_dim, embed_dim, reduction, stride=reduction)
            self.reduced_norm = nn.LayerNorm(embed_dim)

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        x = without_padding(padding_mask, x)
        compared = x if pos is None else x + without_padding(padding_mask, pos)
        values = self._reduced(x)
        keys = values if pos is None else self._reduced(compared)
        q = self.q(compared)
        added = self.hide(None, padding_mask, (keys.shape[1], keys.shape[2]), q.dtype)
        projected: Tensor = self.proj(self.read(q, keys.flatten(1, 2), values.flatten(1, 2), added))
        return projected

    def _reduced(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        below, right = (max(self.stride - side, 0) for side in x.shape[1:3])
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        reduced: Tensor = self.reduced_norm(conv_on_map(self.reduce, x))
        return reduced
