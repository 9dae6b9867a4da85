"""Codes of position for feature maps, and where in the transformer they enter.

A position code is called with the padding masks of all levels, a list of (B, h, w), and gives a list of (B, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from detfamily.structures import Tokens


def sine_code(x: Tensor, num_features: int, temperature: float) -> Tensor:
    """Sines and cosines of x at geometrically falling frequencies, interleaved (arXiv 1706.03762, 3.5).

    Args:
        x: (...) positions, 2 pi for the whole image.
        num_features: features for each position, an even number.
        temperature: the ratio between the fastest and the slowest frequency.

    Returns:
        (..., num_features)
    """
    index = torch.arange(num_features // 2, dtype=torch.float32, device=x.device)
    angles = x[..., None] / temperature ** (2 * index / num_features)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


class SinePosition(nn.Module):
    """Fixed code of y and x over the un-padded image; half the channels each, y first (DETR, A.4).

    Args:
        embed_dim: the width C; a multiple of 4.
        temperature: 10000, or 20 in DAB-DETR and DINO.
        temperature_x: of the columns, where it is another one than that of the rows; None for the same.
        offset: added to the 1-based row and column before the division by their number: 0 in DETR (a cell's far
            border), -0.5 in Deformable DETR (its centre).

    Raises:
        ValueError: embed_dim is not a multiple of 4; a temperature is not above 0.
    """

    def __init__(
        self, embed_dim: int, temperature: float = 10000.0, offset: float = 0.0, temperature_x: float | None = None
    ) -> None:
        super().__init__()
        for name, one in (("temperature", temperature), ("temperature_x", temperature_x)):
            if one is not None and one <= 0:
                raise ValueError(f"position.{name}={one}: expected a number above 0")
        if embed_dim % 4:
            raise ValueError(f"a sine position code needs a width that is a multiple of 4, got embed_dim={embed_dim}")
        self.embed_dim = embed_dim
        self.temperatures = (temperature, temperature if temperature_x is None else temperature_x)
        self.offset = offset

    def forward(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """[(B, h, w)] -> [(B, C, h, w)]"""
        return [self._code(mask) for mask in masks]

    def _code(self, mask: Tensor) -> Tensor:
        codes = []
        for axis, temperature in zip((1, 2), self.temperatures, strict=True):
            count = (~mask).cumsum(axis, dtype=torch.float32)
            share = (count + self.offset) / (count.narrow(axis, -1, 1) if count.shape[axis] else count).add(1e-6)
            codes.append(sine_code(share * (2 * math.pi), self.embed_dim // 2, temperature))
        return torch.cat(codes, -1).permute(0, 3, 1, 2)


class LearnedPosition(nn.Module):
    """A learned vector for each column and each row, x first (DETR's ``--position_embedding learned``).

    Args:
        embed_dim: the width C, an even number.
        size: rows and columns that have a vector.

    Raises:
        ValueError: a map has more rows or columns than size.
    """

    def __init__(self, embed_dim: int, size: int = 50) -> None:
        super().__init__()
        if embed_dim % 2:
            raise ValueError(f"a learned position code needs an even width, got embed_dim={embed_dim}")
        self.row_embed = nn.Embedding(size, embed_dim // 2)
        self.col_embed = nn.Embedding(size, embed_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """[(B, h, w)] -> [(B, C, h, w)]"""
        return [self._code(mask) for mask in masks]

    def _code(self, mask: Tensor) -> Tensor:
        batch, h, w = mask.shape
        size = self.row_embed.num_embeddings
        if max(h, w) > size:
            raise ValueError(
                f"a feature map of {h}x{w} has more rows or columns than the {size} learned positions: "
                f"use smaller images or position.size={max(h, w)}"
            )
        columns = self.col_embed.weight[:w].T[:, None].expand(-1, h, -1)
        rows = self.row_embed.weight[:h].T[:, :, None].expand(-1, -1, w)
        return torch.cat([columns, rows])[None].expand(batch, -1, -1, -1)


class LevelEmbed(nn.Module):
    """Adds a learned vector per level, which tells the levels apart (Deformable DETR, section 4.1)."""

    def __init__(self, embed_dim: int, num_levels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_levels, embed_dim))

    def forward(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """[(B, C, h, w)] -> [(B, C, h, w)]"""
        return [code + level[:, None, None] for code, level in zip(codes, self.weight, strict=True)]


class AtAttention(nn.Module):
    """Positions stay beside the tokens, and every attention adds them to its queries and keys (the default)."""

    def forward(self, tokens: Tokens, pos: Tensor) -> Tokens:
        return replace(tokens, pos=pos)


class AtInput(nn.Module):
    """Positions are added to the tokens once, and no attention sees them again (DETR, table 3)."""

    def forward(self, tokens: Tokens, pos: Tensor) -> Tokens:
        return replace(tokens, content=tokens.content + pos, pos=None)


class Nowhere(nn.Module):
    """No positions at all (DETR, table 3)."""

    def forward(self, tokens: Tokens, pos: Tensor) -> Tokens:
        return replace(tokens, pos=None)
