"""Neighborhood attention in plain PyTorch: dense attention of tiles of the map to what their windows cover.

Queries of a tile of 4 x 8 share most of their windows of 7 x 7: they are compared with the 10 x 14 keys of all their
windows in one product of matrices, and what lies outside the own window is hidden. That is three times the products
that are needed, but at the speed of matrices, where gathering each query's own keys is at the speed of memory. Tiles
with the same pattern of windows are computed together, a few at a time, so that logits stay in the cache; the backward
pass computes them again. So nothing is kept but the inputs, and memory is linear in the tokens.
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

LOGITS_AT_ONCE = {"cpu": 2**18}
"""By device: logits of the tiles that are computed together; a MiB of float32 stays in a core's cache."""

MANY_LOGITS = 2**26
"""The same elsewhere: enough to fill any GPU, and at most some hundred MiB."""


@dataclass(frozen=True)
class Tiles:
    """n tiles of q queries and k keys each, whose windows lie alike.

    Attributes:
        queries: (n, q) tokens of the map, row by row.
        keys: (n, k) tokens that lie in any window of the tile.
        relative: (q, k) the entry of the flat table of biases for each pair; one past its last entry for keys outside
            the query's window.
    """

    queries: Tensor
    keys: Tensor
    relative: Tensor


# -- the plan of a map ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def tiles_of(size: Size, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tiles, ...]:
    """All tiles of a map, by pattern; every token is a query of one of them. Those of the last few maps are kept."""
    rows, columns = (_runs(length, kernel_size, dilation, most) for length, most in zip(size, TILE, strict=True))
    with torch.inference_mode(False):  # or training could not use what an evaluation made
        return tuple(_product(y, x, size[1], kernel_size, device) for y in rows for x in columns)


@dataclass(frozen=True)
class _Runs:
    """The same along one axis: (n, q) queries and (n, k) keys of n runs, (q, k) their offsets, -1 outside windows."""

    queries: Tensor
    keys: Tensor
    offsets: Tensor


def _runs(length: int, kernel_size: int, dilation: int, most: int) -> list[_Runs]:
    firsts, counts = (one.tolist() for one in axis_windows(length, kernel_size, dilation))
    patterns: dict[tuple[tuple[int, ...], ...], tuple[list[range], list[range]]] = {}
    for residue in range(min(dilation, length)):
        members = range(residue, length, dilation)
        size = math.ceil(len(members) / math.ceil(len(members) / most))
        for start in range(0, len(members), size):
            queries = members[start : start + size]
            windows = [range(firsts[one], firsts[one] + dilation * counts[one], dilation) for one in queries]
            keys = range(windows[0].start, windows[-1].stop, dilation)
            pattern = tuple(
                tuple((key - query) // dilation + kernel_size - 1 if key in window else -1 for key in keys)
                for query, window in zip(queries, windows, strict=True)
            )
            known = patterns.setdefault(pattern, ([], []))
            known[0].append(queries)
            known[1].append(keys)
    return [_Runs(torch.tensor(q), torch.tensor(k), torch.tensor(pattern)) for pattern, (q, k) in patterns.items()]


def _product(y: _Runs, x: _Runs, width: int, kernel_size: int, device: torch.device) -> Tiles:
    def tokens(rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, None, :, None] * width + columns[:, None, :]).flatten(2).flatten(0, 1)

    dy, dx = y.offsets[:, None, :, None], x.offsets[None, :, None, :]
    side = 2 * kernel_size - 1
    relative = torch.where((dy < 0) | (dx < 0), side * side, dy * side + dx).flatten(2).flatten(0, 1)
    return Tiles(tokens(y.queries, x.queries).to(device), tokens(y.keys, x.keys).to(device), relative.to(device))


# -- the kernels ------------------------------------------------------------------------------------------------------
# Products whose result is one head wide are written transposed: their other side is longer, which libraries prefer.


def forward(
    qkv: Tensor, position_bias: Tensor | None, padding_mask: Tensor | None, kernel_size: int, dilation: int
) -> Tensor:
    """(B, h, w, M * D), what ``neighborhood_attn`` computes, without gradients."""
    batch, h, w, _, heads, depth = qkv.shape
    rows = qkv.reshape(-1, depth)
    output = qkv.new_empty(batch * h * w, heads * depth)
    with torch.autocast(qkv.device.type, enabled=False):
        for tiles in tiles_of((h, w), kernel_size, dilation, qkv.device):
            added = _added(position_bias, tiles, kernel_size, qkv)
            for queries, keys in _portions(tiles, batch, h * w, heads):
                q, k, v = _gather_qkv(rows, queries, keys, heads)
                weights = _weights(q, k, added, padding_mask, keys)
                output.index_copy_(0, queries.flatten(), _side_by_side(v.mT @ weights.mT))
    return output.view(batch, h, w, -1)


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
    rows, grad_rows = qkv.reshape(-1, depth), grad_output.reshape(-1, depth)
    precise = torch.promote_types(qkv.dtype, torch.float32)  # sums over tiles
    grad_qkv = qkv.new_zeros(batch * h * w, 3, heads * depth, dtype=precise)
    grad_table = qkv.new_zeros(heads, (2 * kernel_size - 1) ** 2 + 1, dtype=precise)
    with torch.autocast(qkv.device.type, enabled=False):
        for tiles in tiles_of((h, w), kernel_size, dilation, qkv.device):
            added = _added(position_bias, tiles, kernel_size, qkv)
            grad_added = qkv.new_zeros(heads, *tiles.relative.shape, dtype=precise)
            for queries, keys in _portions(tiles, batch, h * w, heads):
                q, k, v = _gather_qkv(rows, queries, keys, heads)
                grad = _gather(grad_rows, queries * heads, heads)
                weights = _weights(q, k, added, padding_mask, keys)
                grad_logits = torch._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
                grad_q = _side_by_side(k.mT @ grad_logits.mT).to(precise)
                grad_kv = torch.stack([_side_by_side(q.mT @ grad_logits), _side_by_side(grad.mT @ weights)], 1)
                grad_qkv[:, 0].index_copy_(0, queries.flatten(), grad_q.mul_(depth**-0.5))
                grad_qkv[:, 1:].index_add_(0, keys.flatten(), grad_kv.to(precise))
                if position_bias is not None:
                    grad_added += grad_logits.sum(0, dtype=precise)
            grad_table.scatter_add_(1, tiles.relative.flatten().expand(heads, -1), grad_added.flatten(1))
    grad_qkv = grad_qkv.to(qkv.dtype).view(qkv.shape)
    if position_bias is None:
        return grad_qkv, qkv.new_empty(0)
    return grad_qkv, grad_table[:, :-1].to(position_bias.dtype).reshape(position_bias.shape)


def _portions(tiles: Tiles, batch: int, tokens: int, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(c, q) queries and (c, k) keys of as many tiles as are computed at once, all images' tokens in one row."""
    at_once = LOGITS_AT_ONCE.get(tiles.keys.device.type, MANY_LOGITS) // (heads * tiles.relative.numel())
    first = torch.arange(0, batch * tokens, tokens, device=tiles.keys.device)[:, None, None]
    queries, keys = ((first + one).flatten(0, 1).split(max(1, at_once)) for one in (tiles.queries, tiles.keys))
    return zip(queries, keys, strict=True)


def _added(position_bias: Tensor | None, tiles: Tiles, kernel_size: int, like: Tensor) -> Tensor:
    """(M or 1, q, k) what is added to logits: the biases, and minus infinity outside the window."""
    flat = like.new_zeros(1, (2 * kernel_size - 1) ** 2) if position_bias is None else position_bias.flatten(1)
    return F.pad(flat.to(like.dtype), (0, 1), value=-math.inf)[:, tiles.relative]


def _gather_qkv(rows: Tensor, queries: Tensor, keys: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries (c, M, q, D), keys and values (c, M, k, D), from a row for each token, part and head."""
    q, k, v = (_gather(rows, (3 * one + part) * heads, heads) for part, one in enumerate((queries, keys, keys)))
    return q.mul_(q.shape[-1] ** -0.5), k, v


def _gather(rows: Tensor, first: Tensor, heads: int) -> Tensor:
    """(c, M, n, D): all heads' rows, from that of the first head (c, n) on."""
    places = first[:, None] + torch.arange(heads, device=first.device)[:, None]
    return rows.index_select(0, places.flatten()).view(*places.shape, -1)


def _weights(q: Tensor, k: Tensor, added: Tensor, padding_mask: Tensor | None, keys: Tensor) -> Tensor:
    """(c, M, q, k)"""
    logits = q @ k.mT
    if padding_mask is not None:  # finite, so that a window of nothing but padding gives numbers
        logits.masked_fill_(padding_mask.flatten()[keys][:, None, None], torch.finfo(logits.dtype).min / 2)
    return logits.add_(added).softmax(-1)


def _side_by_side(x: Tensor) -> Tensor:
    """(c, M, D, n) -> (c * n, M * D)"""
    return x.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
