"""How attention to moved keys knows where query and key lie (DAT, arXiv 2201.00520, section 3.2).

Keys lie between the tokens, so a bias needs a value for any displacement. Places are (y, x) from -1 to 1, the first and
the last row and column of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.maps import conv_on_map


@dataclass(frozen=True)
class Layout:
    """The numbers of the attention that a position bias belongs to; attentions give it to the factory.

    Attributes:
        embed_dim: the width C of the tokens.
        num_heads: heads M.
        num_groups: groups of heads G, each of which has its own keys.
        stride: distance of the keys on their grid, in tokens.
    """

    embed_dim: int
    num_heads: int
    num_groups: int
    stride: int


class PositionBias(nn.Module):
    """What positions add: to the logits, or to what was read. Subclasses define one of the two."""

    def to_logits(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """(B, M, Nq, Nk) is added to the logits; None adds nothing.

        Args:
            queries: (Nq, 2) places of the queries.
            keys: (B, G, Nk, 2) places of the keys of each group of heads.
        """
        return None

    def to_output(self, q: Tensor) -> Tensor | None:
        """(B, h, w, C) is added to what the heads have read, before it is projected; None adds nothing.

        Args:
            q: (B, h, w, C) the map of queries, as it is before it is compared.
        """
        return None


class TableBias(PositionBias):
    """A table of the displacements, one for each head, read between its entries (DAT, equation 8).

    The table covers all displacements, so it is stretched over maps of any size; on maps of its own size its entries
    are one token apart. Memory: the displacements are (B, G, Nq, Nk, 2), the bias (B, M, Nq, Nk).

    Args:
        layout: of the attention.
        size: (h, w) of the maps whose displacements are entries: the table has 2h - 1 rows and 2w - 1 columns.
    """

    def __init__(self, layout: Layout, size: Sequence[int]) -> None:
        super().__init__()
        height, width = check_size(size)
        self.table = nn.Parameter(torch.zeros(layout.num_heads, 2 * height - 1, 2 * width - 1))
        nn.init.trunc_normal_(self.table, std=0.01)

    def to_logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, M, Nq, Nk)"""
        batch, groups = keys.shape[:2]
        tables = self.table.to(keys.dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1)
        grid = displacements(queries.flip(-1) / 2, keys.flip(-1) / 2)  # -1 to 1, and x, y, as grid_sample has it
        bias = F.grid_sample(tables.flatten(0, 1), grid.flatten(0, 1), align_corners=True)
        return bias.view(batch, -1, *bias.shape[2:])


class FixedBias(PositionBias):
    """A number for each pair of a query and a key, wherever the key was moved to ("fixed" in DAT's table 6).

    On maps of another size the table is interpolated over queries and keys, both in raster order: the official code for
    detection does so. Memory: the table is (M, Nq, Nk).

    Args:
        layout: of the attention.
        size: (h, w) of the maps that the table fits.
    """

    def __init__(self, layout: Layout, size: Sequence[int]) -> None:
        super().__init__()
        height, width = check_size(size)
        keys = (height // layout.stride) * (width // layout.stride)
        if keys == 0:
            raise ValueError(
                f"size={list(size)}: there is no key on such a map, as they are {layout.stride} tokens apart"
            )
        self.table = nn.Parameter(torch.zeros(layout.num_heads, height * width, keys))
        nn.init.trunc_normal_(self.table, std=0.01)

    def to_logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(1, M, Nq, Nk), the same for all images"""
        size = (queries.shape[0], keys.shape[2])
        if self.table.shape[1:] == size:
            return self.table[None]
        return F.interpolate(self.table[None], size, mode="bilinear", align_corners=True)


class LogBias(PositionBias):
    """An MLP of the logarithm of the displacement (Swin V2, arXiv 2111.09883, section 3.3), one for all groups.

    Memory: the MLP's hidden layer is (B, G, Nq, Nk, 32).

    Args:
        layout: of the attention.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 32)
        self.out = nn.Linear(32, layout.num_heads // layout.num_groups, bias=False)

    def to_logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, M, Nq, Nk)"""
        scaled = 4 * displacements(queries, keys)  # -8 to 8
        logs = scaled.sign() * (scaled.abs() + 1).log2() / math.log2(8)
        bias: Tensor = self.out(self.hidden(logs.to(self.hidden.weight.dtype)).relu())
        return bias.permute(0, 1, 4, 2, 3).flatten(1, 2)


class ConvPosition(PositionBias):
    """A depth-wise 3 x 3 convolution of the queries, added to what they read ("DWConv" in DAT's table 6).

    Args:
        layout: of the attention.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.conv = nn.Conv2d(layout.embed_dim, layout.embed_dim, 3, padding=1, groups=layout.embed_dim)

    def to_output(self, q: Tensor) -> Tensor:
        """(B, h, w, C)"""
        return conv_on_map(self.conv, q)


def displacements(queries: Tensor, keys: Tensor) -> Tensor:
    """(B, G, Nq, Nk, 2) from keys (B, G, Nk, 2) to queries (Nq, 2): -2 to 2 within a map."""
    return queries[:, None] - keys[:, :, None]


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(h, w) of a map that a table is made for.

    Raises:
        ValueError: it is none.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size={list(size)}: expected the height and the width of a map, in tokens")
    return size[0], size[1]
