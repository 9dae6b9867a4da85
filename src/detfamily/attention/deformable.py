"""Attention to a few keys that move to where they are needed (DAT, arXiv 2201.00520; DAT++, arXiv 2309.01430).

Not the deformable attention of Deformable DETR (``ms_deform.py``): there each query has points of its own; here the
queries of a group of heads share one set of moved keys, and each compares itself with all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.deformable_position import Layout, PositionBias
from detfamily.attention.dense import check_heads
from detfamily.attention.maps import MapAttention, conv_on_map, hiding, without_padding
from detfamily.attention.weights import ZeroValues
from detfamily.attention.window import attend
from detfamily.ops import ms_deform_attn
from detfamily.structures import Size


class FewKeysAttention(MapAttention):
    """Each token of a map is a query, and all look at the same few keys. Subclasses say what the keys are made from.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        stride: distance of the keys on their grid, in tokens.

    Raises:
        ValueError: num_heads does not divide embed_dim; the stride is less than one.
    """

    def __init__(self, embed_dim: int, num_heads: int, stride: int) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        if stride < 1:
            raise ValueError(f"stride={stride}: expected at least 1 token from key to key")
        self.num_heads = num_heads
        self.stride = stride
        self.q = nn.Linear(embed_dim, embed_dim)
        self.k = nn.Linear(embed_dim, embed_dim)
        self.v = nn.Linear(embed_dim, embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def read(self, q: Tensor, keys: Tensor, values: Tensor, added: Tensor | None) -> Tensor:
        """(B, h, w, C) of all heads.

        Args:
            q: (B, h, w, C) the map of queries.
            keys: (B, Nk, C) what keys are made from.
            values: (B, Nk, C) what values are made from.
            added: (B or 1, M or 1, h * w or 1, Nk) to the logits, or None.
        """
        heads = (q.flatten(1, 2), self.k(keys), self.v(values))
        queries, keys, values = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in heads)
        return attend(queries, keys, values, None if added is None else added.to(q.dtype)).view(q.shape)

    def hide(self, added: Tensor | None, padding_mask: Tensor | None, keys: Size, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits, with the keys hidden that stand for padding alone.

        The key in row i and column j stands for the tokens from (i * stride, j * stride) on; as images are padded at
        the bottom and the right, these are padding if the first of them is. So some key is left of any image.
        """
        if padding_mask is None:
            return added
        h, w = padding_mask.shape[1:]
        rows, columns = (
            (torch.arange(count, device=padding_mask.device) * self.stride).clamp(max=side - 1)
            for count, side in zip(keys, (h, w), strict=True)
        )
        hidden = padding_mask[:, rows][:, :, columns].flatten(1)[:, None, None]
        return hiding(hidden, added, dtype)

    def key_weights(
        self, x: Tensor, place: Size, pos: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """(B, M, Nk): how the heads weigh the keys for the token at ``place`` (row, column); in evaluation mode."""
        bare = deepcopy(self)
        bare.v = values = ZeroValues()  # type: ignore[assignment]
        bare.proj = nn.Identity()  # type: ignore[assignment]
        with torch.enable_grad():
            out = bare.on_map(x if pos is None else x + pos, None, padding_mask)[:, place[0], place[1]]
            (weights,) = torch.autograd.grad(out.unflatten(-1, (self.num_heads, -1))[..., 0].sum(), values.given)
        return weights.unflatten(-1, (self.num_heads, -1))[..., 0].transpose(1, 2)

    def key_places(
        self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where keys start, (Nk, 2), and where they are, (B, G, Nk, 2): x, y in (0, 1) over the map.

        Here they do not move.
        """
        h, w = x.shape[1:3]
        rows, columns = (
            (torch.arange(max(n // self.stride, 1), device=x.device) + 0.5) * min(self.stride, n) / n for n in (h, w)
        )
        start = _grid(rows, columns).flip(-1).flatten(0, 1)
        return start, start.expand(len(x), 1, -1, -1)


class DeformableAttention(FewKeysAttention):
    """Keys move from a grid to places that the queries around them choose (DAT, section 3.2; the formulas of DAT++).

    Heads and channels form groups, and each group has places of its own. One small network says for all groups, from
    their part of the queries, how far keys move. The map is sampled there, and keys and values are made from what is
    found. Places are (y, x), -1 and 1 are the first and the last row or column.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        num_groups: groups G, which must divide num_heads.
        stride: distance of the keys on their grid, in tokens.
        kernel_size: of the convolution of queries that offsets come from. With kernel_size = stride it is not padded,
            and keys stand for whole cells only; otherwise for what is left of one at the border, too.
        offset_range_factor: how far a key may move, in keys; it may then leave the map, where there are zeros. With 0
            it stays where it is. Less than 0: as far as it likes, but not out of the map.
        position_bias: factory of what positions add, called with ``layout``; None adds nothing.

    Raises:
        ValueError: num_heads does not divide embed_dim; num_groups does not divide num_heads; the stride or the kernel
            is less than one; a map has one row or column of keys, and the offset_range_factor is not less than 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int,
        stride: int,
        kernel_size: int,
        offset_range_factor: float = -1.0,
        position_bias: Callable[..., PositionBias] | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, stride)
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_heads={num_heads}")
        self.num_groups = num_groups
        self.offset_range_factor = offset_range_factor
        padding = self.offset_padding(kernel_size, stride)
        self.offsets = OffsetNetwork(embed_dim // num_groups, kernel_size, stride, padding)
        layout = Layout(embed_dim, num_heads, num_groups, stride)
        self.position_bias = None if position_bias is None else position_bias(layout=layout)

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C). Memory: logits are (B, M, h * w, keys)."""
        x = without_padding(padding_mask, x)
        compared = x if pos is None else x + without_padding(padding_mask, pos)
        q = self.q(compared)
        visible = without_padding(padding_mask, q)
        places = self.places(visible)
        added = residual = None
        if self.position_bias is not None:
            queries = _grid(*(self.query_axis(n, places) for n in x.shape[1:3])).flatten(0, 1)
            added = self.position_bias.to_logits(queries, places.flatten(2, 3))
            residual = self.position_bias.to_output(visible)
        values = sample(x, places)
        keys = values if pos is None else sample(compared, places)
        out = self.read(q, keys, values, self.hide(added, padding_mask, (places.shape[2], places.shape[3]), q.dtype))
        projected: Tensor = self.proj(out if residual is None else out + residual)
        return projected

    def places(self, q: Tensor) -> Tensor:
        """(B, G, h', w', 2) where the keys of each group are, from queries (B, h, w, C); float32 or float64."""
        offsets = self.offsets(q.unflatten(-1, (self.num_groups, -1)).movedim(3, 1).flatten(0, 1))
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32)).unflatten(0, (-1, self.num_groups))
        grid = _grid(*(self.key_axis(n, offsets) for n in offsets.shape[2:4]))
        return self.move(grid, offsets)

    def key_places(
        self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where keys start, (Nk, 2), and where they are, (B, G, Nk, 2): x, y in (0, 1) over the map."""
        compared = without_padding(padding_mask, x if pos is None else x + pos)
        with torch.no_grad():
            places = self.places(without_padding(padding_mask, self.q(compared)))
        start = _grid(*(self.key_axis(n, places) for n in places.shape[2:4]))
        sides = places.new_tensor(x.shape[1:3])

        def over_the_map(places: Tensor) -> Tensor:  # -1 and 1 are the centres of its first and its last token
            return (((places + 1) / 2 * (sides - 1) + 0.5) / sides).flip(-1).flatten(-3, -2)

        return over_the_map(start.nan_to_num(0, 1, -1)), over_the_map(places)

    @staticmethod
    def offset_padding(kernel_size: int, stride: int) -> int:
        """Of the convolution in the offset network."""
        return kernel_size // 2 if kernel_size != stride else 0

    def key_axis(self, count: int, like: Tensor) -> Tensor:
        """(count,) the rows or columns of keys: half a cell further than the corners of the map, as officially.

        A single one is infinitely far, which ``move`` brings back to the last token.
        """
        return (_steps(count, like) + 0.5) / (count - 1) * 2 - 1

    def query_axis(self, count: int, like: Tensor) -> Tensor:
        """(count,) the rows or columns of queries."""
        return _steps(count, like) / max(count - 1, 1) * 2 - 1

    def move(self, grid: Tensor, offsets: Tensor) -> Tensor:
        """(B, G, h', w', 2) from the grid (h', w', 2) and what the network says."""
        if self.offset_range_factor < 0:
            return (grid + offsets).clamp(-1, 1)
        rows, columns = grid.shape[:2]
        if min(rows, columns) == 1:
            raise ValueError(
                f"a map has {rows} x {columns} keys {self.stride} tokens apart, and offset_range_factor="
                f"{self.offset_range_factor} counts in distances between keys, which a single one does not have: use "
                "-1, or a smaller stride"
            )
        return grid + self._bounded(offsets, rows - 1, columns - 1)

    def _bounded(self, offsets: Tensor, rows: int, columns: int) -> Tensor:
        distances = torch.tensor([1 / rows, 1 / columns], device=offsets.device)  # of the default type, as officially
        return offsets.tanh() * distances * self.offset_range_factor


class DeformableAttention2022(DeformableAttention):
    """With the formulas of DAT (CVPR 2022), which its published models need; DAT++ has others.

    Keys and queries lie in the centres of cells, of which a map has as many as it has keys or tokens. Less than 0 as
    ``offset_range_factor`` means tanh(place + offset), 0 that offsets are not bounded at all.
    """

    @staticmethod
    def offset_padding(kernel_size: int, stride: int) -> int:
        """Of the convolution in the offset network."""
        return kernel_size // 2

    def key_axis(self, count: int, like: Tensor) -> Tensor:
        """(count,) the rows or columns of keys."""
        return (_steps(count, like) + 0.5) / count * 2 - 1

    def query_axis(self, count: int, like: Tensor) -> Tensor:
        """(count,) the rows or columns of queries."""
        return self.key_axis(count, like)

    def move(self, grid: Tensor, offsets: Tensor) -> Tensor:
        """(B, G, h', w', 2) from the grid (h', w', 2) and what the network says."""
        if self.offset_range_factor < 0:
            return (grid + offsets).tanh()
        if self.offset_range_factor == 0:
            return grid + offsets
        return grid + self._bounded(offsets, *grid.shape[:2])


class PooledAttention(FewKeysAttention):
    """Keys that do not move: means of cells of stride x stride tokens ("no offsets" in the code of DAT++).

    What is left of a cell at the border has no key, unless the map is smaller than a cell.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        stride: side of a cell, in tokens.

    Raises:
        ValueError: num_heads does not divide embed_dim; the stride is less than one.
    """

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        x = without_padding(padding_mask, x)
        compared = x if pos is None else x + without_padding(padding_mask, pos)
        q = self.q(compared)
        values = self._means(x)
        keys = values if pos is None else self._means(compared)
        added = self.hide(None, padding_mask, (keys.shape[1], keys.shape[2]), q.dtype)
        projected: Tensor = self.proj(self.read(q, keys.flatten(1, 2), values.flatten(1, 2), added))
        return projected

    def _means(self, x: Tensor) -> Tensor:
        cell = [min(self.stride, side) for side in x.shape[1:3]]
        return F.avg_pool2d(x.permute(0, 3, 1, 2), cell, stride=cell).permute(0, 2, 3, 1)


class OffsetNetwork(nn.Module):
    """How far keys move: depth-wise convolution, LayerNorm, GELU, linear without bias (DAT, figure 2 (b)).

    Args:
        channels: of a group.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: of the convolution, with zeros. A map smaller than the kernel is filled up with zeros besides.

    Raises:
        ValueError: the kernel is less than one.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size}: expected at least 1 token")
        self.kernel_size = kernel_size
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, 2, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        """(B, h, w, channels) -> (B, h', w', 2) y, x"""
        below, right = (max(self.kernel_size - 2 * self.padding - side, 0) for side in q.shape[1:3])
        if below or right:
            q = F.pad(q, (0, 0, 0, right, 0, below))
        offsets: Tensor = self.out(F.gelu(self.norm(conv_on_map(self.conv, q))))
        return offsets


def sample(x: Tensor, places: Tensor) -> Tensor:
    """What lies at some places of a map, between tokens as well; beyond the map lie zeros.

    One level, and one point of weight 1, for the op of Deformable DETR: with gradients twice as fast on CPUs as
    grid_sample on large maps, and places stay exact where the map has 16 bits (docs/benchmarks/sampling.md).

    Args:
        x: (B, h, w, C) the map.
        places: (B, G, h', w', 2) y, x for each of G groups of channels.

    Returns:
        (B, h' * w', C)
    """
    h, w = x.shape[1:3]
    # from -1 and 1 at the centres of the first and the last token, to 0 and 1 at the borders of the map
    scale = places.new_tensor([(w - 1) / (2 * w), (h - 1) / (2 * h)])
    locations = (places.flip(-1) * scale + 0.5).flatten(2, 3).transpose(1, 2)[:, :, :, None, None]
    value = x.flatten(1, 2).unflatten(-1, (places.shape[1], -1))
    return ms_deform_attn(value, ((h, w),), locations, locations.new_ones(locations.shape[:-1]))


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)


def _grid(rows: Tensor, columns: Tensor) -> Tensor:
    """(h, w, 2)"""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
