"""Neighborhood attention by PyTorch's FlexAttention: dense attention that skips blocks without any window in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from detfamily.ops.neighborhood.windows import axis_windows
from detfamily.structures import Size

BLOCK = 128
"""Tokens of a block along queries and keys, FlexAttention's own."""

HIDDEN = -1e30
"""The logit of hidden tokens: finite, so that a window of nothing but padding gives numbers."""

_compiled: Any = torch.compile(flex_attention)


def attend(
    qkv: Tensor, kernel_size: int, dilation: int, position_bias: Tensor | None, padding_mask: Tensor | None
) -> Tensor:
    """(B, h, w, M * D) from (B, h, w, 3, M, D); biases and padding as for ``neighborhood_attn``."""
    batch, h, w, _, heads, depth = qkv.shape
    windows = windows_of((h, w), kernel_size, dilation, qkv.device)
    hidden = None if padding_mask is None else padding_mask.flatten(1)
    side, middle = 2 * kernel_size - 1, kernel_size - 1
    table = None if position_bias is None else position_bias.flatten(1).to(qkv.dtype)
    rows, columns = windows.rows, windows.columns

    def score(logit: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if table is not None:
            dy = (rows[key] - rows[query]) // dilation + middle
            dx = (columns[key] - columns[query]) // dilation + middle
            # keys outside the window are masked, whatever they read here
            logit = logit + table[head, (dy * side + dx).clamp(0, side * side - 1)]
        return logit if hidden is None else torch.where(hidden[image, key], HIDDEN, logit)

    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    attention = _compiled if qkv.is_cuda and not torch.compiler.is_compiling() else flex_attention
    output: Tensor = attention(
        q, k, v, score_mod=None if table is None and hidden is None else score, block_mask=windows.mask
    )
    return output.transpose(1, 2).reshape(batch, h, w, heads * depth)


def obstacle(qkv: Tensor, needs_grad: bool) -> str:
    """Why FlexAttention cannot compute a call; empty where it can."""
    if not qkv.is_cuda:
        return f"FlexAttention has no gradients on {qkv.device.type}" if needs_grad else ""
    if qkv.dtype == torch.float64:
        return "FlexAttention knows no float64 on GPUs"
    depth = qkv.shape[-1]
    if depth < 16 or depth & (depth - 1):
        return f"FlexAttention wants heads whose width is a power of two from 16 on, not {depth}"
    return ""


class Windows:
    """The windows of a map as FlexAttention wants them. Everything is a tensor: numbers would be compiled in.

    Args:
        size: (h, w) of the map.
        kernel_size: side of a window, in tokens.
        dilation: step between them.
        device: of the tensors.
    """

    def __init__(self, size: Size, kernel_size: int, dilation: int, device: torch.device) -> None:
        h, w = size
        self.rows = torch.arange(h).repeat_interleave(w).to(device, torch.int32)
        self.columns = torch.arange(w).repeat(h).to(device, torch.int32)
        (y, y_count), (x, x_count) = (axis_windows(length, kernel_size, dilation) for length in size)
        tops, ends = (one.repeat_interleave(w).to(device, torch.int32) for one in (y, y + dilation * y_count))
        lefts, rights = (one.repeat(h).to(device, torch.int32) for one in (x, x + dilation * x_count))
        rows, columns = self.rows, self.columns

        def sees(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            inside = (rows[key] >= tops[query]) & (rows[key] < ends[query])
            inside = inside & (columns[key] >= lefts[query]) & (columns[key] < rights[query])
            if dilation == 1:
                return inside
            steps = (rows[key] - tops[query]) % dilation + (columns[key] - lefts[query]) % dilation
            return inside & (steps == 0)

        self.mask = _block_mask(sees, h * w, device)


@lru_cache(maxsize=16)
def windows_of(size: Size, kernel_size: int, dilation: int, device: torch.device) -> Windows:
    """Those of the last few maps are kept."""
    with torch.inference_mode(False):  # or training could not use what an evaluation made
        return Windows(size, kernel_size, dilation, device)


def _block_mask(sees: Callable[[Any, Any, Tensor, Tensor], Tensor], tokens: int, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees, found one after another: all pairs at once are too many."""
    blocks = -(-tokens // BLOCK)
    seen = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    keys = torch.arange(tokens, device=device)
    for block in range(blocks):
        pairs = sees(None, None, keys[block * BLOCK : (block + 1) * BLOCK, None], keys)
        seen[block] = F.pad(pairs.any(0), (0, blocks * BLOCK - tokens)).view(blocks, BLOCK).any(1)
    counts = seen.sum(1, dtype=torch.int32)
    order = seen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        counts[None, None], order[None, None], BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )
