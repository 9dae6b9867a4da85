"""Neighborhood attention in plain PyTorch: dense attention of tiles of the map to what their windows cover.

Queries of a tile of 4 x 8 share most of their windows of 7 x 7: they are compared with the 10 x 14 keys of all their
windows in one product of matrices, and what lies outside the own window is hidden. That is three times the products
that are needed, but at the speed of matrices, where gathering each query's own keys is at the speed of memory. The
backward pass computes the weights again, and large maps are computed part by part: nothing is kept but the inputs, and
memory is linear in the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.ops.neighborhood.windows import axis_windows
from detfamily.structures import Size

TILE = (4, 8)
"""Tokens of a tile at most, dilated as the windows are: (along y, along x)."""

LOGITS_AT_ONCE = {"cpu": 2**20}
"""By device: logits of the tiles that are computed together. Half as many suit heads of width 32 a little better, twice
as many those of width 8; much fewer are slow on several threads, which wait for each other after every step."""

MANY_LOGITS = 2**26
"""The same elsewhere: enough to fill any GPU, and at most some hundred MiB."""


@dataclass(frozen=True)
class Tiles:
    """n tiles of q queries and k keys each; p patterns in which windows lie in them.

    Attributes:
        queries: (n, q) tokens of the map, row by row.
        repeated: (n, q) bool, True at queries that another place has, too, and which only fill up a tile; None if there
            are none.
        keys: (n, k) tokens that lie in any window of the tile, then some of them again where a tile has fewer.
        kinds: (n,) the pattern of each tile.
        relative: (p, q, k) the entry of the flat table of biases for each pair; one past its last entry for keys
            outside the query's window.
    """

    queries: Tensor
    repeated: Tensor | None
    keys: Tensor
    kinds: Tensor
    relative: Tensor


# -- the plan of a map ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def tiles_of(size: Size, kernel_size: int, dilation: int, device: torch.device) -> Tiles:
    """The tiles of a map; every token is a query of one of them. Those of the last few maps are kept."""
    with torch.inference_mode(False):  # or training could not use what an evaluation made
        y, x = (_runs(length, kernel_size, dilation, most) for length, most in zip(size, TILE, strict=True))
        repeated = _flat(y.repeated[:, None, :, None] | x.repeated[:, None])
        side = 2 * kernel_size - 1
        dy, dx = y.offsets[:, None, :, None, :, None], x.offsets[:, None, :, None, :]
        relative = torch.where((dy < 0) | (dx < 0), side * side, dy * side + dx)
        return Tiles(
            _flat(y.queries[:, None, :, None] * size[1] + x.queries[:, None]).to(device),
            repeated.to(device) if bool(repeated.any()) else None,
            _flat(y.keys[:, None, :, None] * size[1] + x.keys[:, None]).to(device),
            (y.kinds[:, None] * len(x.offsets) + x.kinds).flatten().to(device),
            relative.flatten(4).flatten(2, 3).flatten(0, 1).to(device),
        )


def _flat(x: Tensor) -> Tensor:
    """(rows, columns, y, x) -> (rows * columns, y * x)"""
    return x.flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class _Runs:
    """The same along one axis: n runs of q queries and k keys, and (p, q, k) offsets, -1 outside windows."""

    queries: Tensor
    repeated: Tensor
    keys: Tensor
    kinds: Tensor
    offsets: Tensor


def _runs(length: int, kernel_size: int, dilation: int, most: int) -> _Runs:
    firsts, counts = (one.tolist() for one in axis_windows(length, kernel_size, dilation))
    classes = [range(residue, length, dilation) for residue in range(min(dilation, length))]
    size = math.ceil(len(classes[0]) / math.ceil(len(classes[0]) / most))
    cut = [members[start : start + size] for members in classes for start in range(0, len(members), size)]
    keys = [range(firsts[run[0]], firsts[run[-1]] + dilation * counts[run[-1]], dilation) for run in cut]
    widest = max(map(len, keys))
    patterns: dict[tuple[tuple[int, ...], ...], int] = {}
    kinds = []
    for queries, seen in zip(cut, keys, strict=True):
        pattern = []
        for query in _filled(queries, size):
            window = range(firsts[query], firsts[query] + dilation * counts[query], dilation)
            offsets = [(key - query) // dilation + kernel_size - 1 if key in window else -1 for key in seen]
            pattern.append((*offsets, *[-1] * (widest - len(seen))))
        kinds.append(patterns.setdefault(tuple(pattern), len(patterns)))
    return _Runs(
        torch.tensor([_filled(run, size) for run in cut]),
        torch.tensor([[place >= len(run) for place in range(size)] for run in cut]),
        torch.tensor([_filled(run, widest) for run in keys]),
        torch.tensor(kinds),
        torch.tensor(list(patterns)),
    )


def _filled(run: range, size: int) -> list[int]:
    """The last one again until there are enough."""
    return [*run, *[run[-1]] * (size - len(run))]


# -- the kernels ------------------------------------------------------------------------------------------------------
# Products whose result is one head wide are written transposed: their other side is longer, which libraries prefer.
# A row more than there are tokens takes what nobody wants, that of repeated queries.


def forward(
    qkv: Tensor, position_bias: Tensor | None, padding_mask: Tensor | None, kernel_size: int, dilation: int
) -> Tensor:
    """(B, h, w, M * D), what ``neighborhood_attn`` computes, without gradients."""
    batch, h, w, _, heads, depth = qkv.shape
    tiles = tiles_of((h, w), kernel_size, dilation, qkv.device)
    rows = qkv.reshape(-1, depth)
    output = qkv.new_empty(batch * h * w + 1, heads * depth)
    with torch.autocast(qkv.device.type, enabled=False):
        added = _added(position_bias, tiles, kernel_size, qkv)
        for part in _portions(tiles, batch, h * w, heads):
            q, k, v = _gather_qkv(rows, part, heads)
            weights = _weights(q, k, added, padding_mask, part)
            output.index_copy_(0, part.written.flatten(), _side_by_side(v.mT @ weights.mT))
    return output[:-1].view(batch, h, w, -1)


def backward(
    grad_output: Tensor,
    qkv: Tensor,
    position_bias: Tensor | None,
    padding_mask: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and of the table of biases; of the latter an empty tensor if there is none."""
    batch, h, w, _, heads, depth = qkv.shape
    tiles = tiles_of((h, w), kernel_size, dilation, qkv.device)
    rows, grad_rows = qkv.reshape(-1, depth), grad_output.reshape(-1, depth)
    precise = torch.promote_types(qkv.dtype, torch.float32)  # sums over tiles
    grad_qkv = qkv.new_zeros(batch * h * w + 1, 3, heads * depth, dtype=precise)
    with torch.autocast(qkv.device.type, enabled=False):
        added = _added(position_bias, tiles, kernel_size, qkv)
        grad_added = torch.zeros_like(added, dtype=precise)
        for part in _portions(tiles, batch, h * w, heads):
            q, k, v = _gather_qkv(rows, part, heads)
            grad = _gather(grad_rows, part.queries * heads, heads)
            if part.repeated is not None:
                grad.masked_fill_(part.repeated[:, None, :, None], 0.0)
            weights = _weights(q, k, added, padding_mask, part)
            grad_logits = torch._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
            grad_q = _side_by_side(k.mT @ grad_logits.mT).to(precise)
            grad_kv = torch.stack([_side_by_side(q.mT @ grad_logits), _side_by_side(grad.mT @ weights)], 1)
            grad_qkv[:, 0].index_copy_(0, part.written.flatten(), grad_q.mul_(depth**-0.5))
            grad_qkv[:, 1:].index_add_(0, part.keys.flatten(), grad_kv.to(precise))
            if position_bias is not None:
                grad_added.index_add_(0, part.kinds, grad_logits.to(precise))
    grad_qkv = grad_qkv[:-1].to(qkv.dtype).view(qkv.shape)
    if position_bias is None:
        return grad_qkv, qkv.new_empty(0)
    grad_table = qkv.new_zeros(heads, (2 * kernel_size - 1) ** 2 + 1, dtype=precise)
    grad_table.scatter_add_(1, tiles.relative.flatten().expand(heads, -1), grad_added.transpose(0, 1).flatten(1))
    return grad_qkv, grad_table[:, :-1].to(position_bias.dtype).reshape(position_bias.shape)


@dataclass(frozen=True)
class _Portion:
    """c tiles of any images, all images' tokens in one row; and where their queries' results are written."""

    queries: Tensor
    written: Tensor
    repeated: Tensor | None
    keys: Tensor
    kinds: Tensor


def _portions(tiles: Tiles, batch: int, tokens: int, heads: int) -> Iterator[_Portion]:
    """As many tiles as are computed at once."""
    at_once = LOGITS_AT_ONCE.get(tiles.keys.device.type, MANY_LOGITS) // (heads * tiles.relative[0].numel())
    first = torch.arange(0, batch * tokens, tokens, device=tiles.keys.device)[:, None, None]
    queries, keys = ((first + one).flatten(0, 1) for one in (tiles.queries, tiles.keys))
    repeated = None if tiles.repeated is None else tiles.repeated.repeat(batch, 1)
    written = queries if repeated is None else queries.masked_fill(repeated, batch * tokens)
    kinds = tiles.kinds.repeat(batch)
    for start in range(0, len(kinds), max(1, at_once)):
        part = slice(start, start + max(1, at_once))
        some = None if repeated is None else repeated[part]
        yield _Portion(queries[part], written[part], some, keys[part], kinds[part])


def _added(position_bias: Tensor | None, tiles: Tiles, kernel_size: int, like: Tensor) -> Tensor:
    """(p, M or 1, q, k) what is added to logits: the biases, and minus infinity outside the window."""
    flat = like.new_zeros(1, (2 * kernel_size - 1) ** 2) if position_bias is None else position_bias.flatten(1)
    return F.pad(flat.to(like.dtype), (0, 1), value=-math.inf)[:, tiles.relative].transpose(0, 1).contiguous()


def _gather_qkv(rows: Tensor, part: _Portion, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries (c, M, q, D), keys and values (c, M, k, D), from a row for each token, part and head."""
    places = (part.queries, part.keys, part.keys)
    q, k, v = (_gather(rows, (3 * one + index) * heads, heads) for index, one in enumerate(places))
    return q.mul_(q.shape[-1] ** -0.5), k, v


def _gather(rows: Tensor, first: Tensor, heads: int) -> Tensor:
    """(c, M, n, D): all heads' rows, from that of the first head (c, n) on."""
    places = first[:, None] + torch.arange(heads, device=first.device)[:, None]
    return rows.index_select(0, places.flatten()).view(*places.shape, -1)


def _weights(q: Tensor, k: Tensor, added: Tensor, padding_mask: Tensor | None, part: _Portion) -> Tensor:
    """(c, M, q, k)"""
    logits = q @ k.mT
    if padding_mask is not None:  # finite, so that a window of nothing but padding gives numbers
        logits.masked_fill_(padding_mask.flatten()[part.keys][:, None, None], torch.finfo(logits.dtype).min / 2)
    return logits.add_(added.index_select(0, part.kinds)).softmax(-1)


def _side_by_side(x: Tensor) -> Tensor:
    """(c, M, D, n) -> (c * n, M * D)"""
    return x.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
