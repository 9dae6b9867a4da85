"""Attention within windows of a map, which lie half a window further in every other layer (Swin, arXiv 2103.14030)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from detfamily.attention.dense import check_heads
from detfamily.attention.maps import MapAttention, hiding, project_qkv
from detfamily.structures import Size

APART = -100.0
"""Added to the logits of tokens that only the shift brought into one window. The official number, not infinity: where
logits lie further apart than that, such tokens do look at each other."""


class WindowAttention(MapAttention):
    """Each token of a map looks at the tokens of its window (section 3.2).

    Windows tile the map from its upper left corner, or from ``shift`` tokens to the lower right of it; the tokens
    before the first of these fill up the last window of their row or column, and look only at each other. A learned
    bias by the relative position of two tokens is added to their logit (equation 4). Where windows hang over the map
    they see zeros, whose keys and values are the projection's biases: nobody hides them, as officially, unless there is
    a padding mask.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        window_size: side of a window, in tokens.
        shift: of the windows to the lower right, in tokens: 0, or half a window in every other layer, which None stands
            for. It stays the same on a map smaller than a window.
        qkv_bias: whether queries, keys and values have biases.
        position_bias: whether logits depend on the relative position.

    Raises:
        ValueError: num_heads does not divide embed_dim; there is no such window or shift.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: int,
        shift: int | None = 0,
        qkv_bias: bool = True,
        position_bias: bool = True,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        shift = window_size // 2 if shift is None else shift
        if window_size < 1 or not 0 <= shift < window_size:
            raise ValueError(
                f"window_size={window_size}, shift={shift}: expected at least one token, and a shift of 0 to "
                "less than a window"
            )
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.position_bias = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads)) if position_bias else None
        for linear in (self.qkv, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.position_bias is not None:
            nn.init.trunc_normal_(self.position_bias, std=0.02)

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C), for a map of any size."""
        batch, h, w, width = x.shape
        windows = windows_of((h, w), self.window_size, self.shift, x.device)
        # Projected before it is cut into windows: what lies beyond the map then costs one token, and everything that
        # moves tokens (shift, padding, windows) is one copy.
        qkv = project_qkv(self.qkv, _padded(x, windows), None if pos is None else _padded(pos, windows))
        qkv = qkv.index_select(1, windows.tokens)
        qkv = qkv.view(-1, self.window_size**2, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        out = attend(q, k, v, self._added(windows, batch, q.dtype, padding_mask))
        projected: Tensor = self.proj(out.reshape(batch, len(windows.tokens), -1).index_select(1, windows.places))
        return projected.view(x.shape)

    def _added(self, windows: Windows, batch: int, dtype: torch.dtype, padding_mask: Tensor | None) -> Tensor | None:
        """What is added to the logits: (1 or B * windows, 1 or M, n, n), n tokens in a window."""
        added = None
        if self.position_bias is not None:
            n = self.window_size**2
            added = self.position_bias.t().index_select(1, windows.relative).view(1, self.num_heads, n, n)
        if windows.apart is not None:
            added = windows.apart if added is None else added + windows.apart
            added = added.index_select(0, windows.kinds.repeat(batch))
        if added is not None:
            added = added.to(dtype)
        if padding_mask is None:
            return added
        hidden = F.pad(padding_mask.flatten(1), (0, 1), value=True).index_select(1, windows.tokens)
        return hiding(hidden.view(-1, 1, 1, self.window_size**2), added, dtype)


def _padded(x: Tensor, windows: Windows) -> Tensor:
    """(B, h * w, C) tokens, and one zero for all places beyond the map where there are any."""
    tokens = x.flatten(1, 2)
    return F.pad(tokens, (0, 0, 0, 1)) if windows.overhang else tokens


def attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
    """(B, N, C) of all heads, from those of queries, keys and values (B, M, N, C / M) and what is added to the logits.

    PyTorch's fused kernel for CPUs gives no gradient to what is added, and what then takes its place passes over the
    logits three times more than is needed.
    """
    if added is None or not added.requires_grad or q.device.type != "cpu":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    else:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        out = logits.add_(added).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Windows:
    """How the tokens of a map, row by row, lie in windows of n tokens.

    Attributes:
        tokens: (windows * n,) the token at each place of each window; h * w at places beyond the map.
        places: (h * w,) the place of each token: the way back.
        relative: (n * n,) the row of the table of biases for each pair of places of a window.
        overhang: whether any place lies beyond the map.
        apart: (4, 1, n, n) what the shift adds to the logits of pairs, for each kind of window; None without a shift.
        kinds: (windows,) 0 for most, 1 in the last column, 2 in the last row, 3 at the corner.
    """

    tokens: Tensor
    places: Tensor
    relative: Tensor
    overhang: bool
    apart: Tensor | None
    kinds: Tensor


def windows_of(size: Size, window_size: int, shift: int, device: torch.device) -> Windows:
    """The windows of a map; those of the last few maps are kept, since all layers of a stage have the same."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # what is made there is of no use later
        return _make(size, window_size, shift, device)
    return _make_and_keep(size, window_size, shift, device)


@lru_cache(maxsize=8)
def _make_and_keep(size: Size, window_size: int, shift: int, device: torch.device) -> Windows:
    with torch.inference_mode(False):  # or training could not use what an evaluation made
        return _make(size, window_size, shift, device)


def _make(size: Size, window_size: int, shift: int, device: torch.device) -> Windows:
    h, w = size
    rows, columns = -(-h // window_size), -(-w // window_size)
    padded_h, padded_w = rows * window_size, columns * window_size
    grid = torch.arange(h * w, device=device).view(h, w)
    grid = F.pad(grid, (0, padded_w - w, 0, padded_h - h), value=h * w).roll((-shift, -shift), (0, 1))
    tokens = grid.view(rows, window_size, columns, window_size).transpose(1, 2).flatten()
    places = torch.arange(padded_h * padded_w, device=device).view(rows, columns, window_size, window_size)
    places = places.transpose(1, 2).reshape(padded_h, padded_w).roll((shift, shift), (0, 1))[:h, :w].flatten()
    last_row, last_column = (torch.arange(count, device=device) == count - 1 for count in (rows, columns))
    return Windows(
        tokens=tokens,
        places=places,
        relative=relative_positions(window_size, device).flatten(),
        overhang=(padded_h, padded_w) != size,
        apart=_apart(window_size, shift, device) if shift else None,
        kinds=(2 * last_row[:, None] + last_column).flatten(),
    )


def relative_positions(window_size: int, device: torch.device | str = "cpu") -> Tensor:
    """(n, n) int64, n tokens in a window: the row of the table of biases for a query (first axis) and a key.

    The table has a row for each of the (2 * window_size - 1)^2 offsets between two tokens of a window, in raster order.
    """
    steps = torch.arange(window_size, device=device)
    offsets = steps[:, None] - steps + window_size - 1
    rows, columns = offsets[:, None, :, None], offsets[None, :, None, :]
    return (rows * (2 * window_size - 1) + columns).reshape(window_size**2, window_size**2)


def _apart(window_size: int, shift: int, device: torch.device) -> Tensor:
    """(4, 1, n, n): the shift wraps rows into the last row of windows and columns into the last column."""
    wrapped = torch.arange(window_size, device=device) >= window_size - shift
    rows, columns = wrapped[:, None].expand(-1, window_size), wrapped.expand(window_size, -1)
    nowhere = torch.zeros_like(rows)
    kinds = [(nowhere, nowhere), (nowhere, columns), (rows, nowhere), (rows, columns)]
    parts = torch.stack([(2 * one + other).flatten() for one, other in kinds])  # of a window, up to four
    return APART * (parts[:, None, :, None] != parts[:, None, None, :])
