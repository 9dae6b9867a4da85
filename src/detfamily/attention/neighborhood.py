"""Each token of a map attends to the tokens around it (NAT, arXiv 2204.07143; dilated, DiNAT, arXiv 2209.15001)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.dense import check_heads
from detfamily.attention.maps import MapAttention, project_qkv
from detfamily.ops.neighborhood import Backend, neighborhood_attn


class NeighborhoodAttention(MapAttention):
    """Each token looks at the kernel_size x kernel_size tokens around it (NAT, section 3.1, equations 1 to 3).

    Near the borders of a map the window is shifted inside, so that every token sees as many others. With a dilation it
    sees every dilation-th token, of those at whose places it stands itself (DiNAT, section 3.2). A learned bias by the
    relative position can be added to the logits, as in NAT and in DAT++; NATTEN has it no longer since version 0.20.

    A padding mask hides tokens; it does not move windows: these are shifted inside the padded map.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        kernel_size: side of a window, in tokens.
        dilation: step between the tokens of a window.
        qkv_bias: whether queries, keys and values have biases.
        position_bias: whether logits depend on the relative position.
        pad_small_maps: what happens along an axis of fewer than kernel_size * dilation tokens. True: zeros follow the
            last token, whose keys and values are the projection's biases; nobody hides them, as officially (DAT++),
            unless there is a padding mask. False: the window is the whole axis (of the token's own places).
        backend: what computes it, see ``detfamily.ops.neighborhood.neighborhood_attn``.

    Raises:
        ValueError: num_heads does not divide embed_dim; there is no such window.
        ConfigError: when it is called, if the backend asked for cannot compute it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int = 1,
        qkv_bias: bool = True,
        position_bias: bool = True,
        pad_small_maps: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        if kernel_size < 1 or dilation < 1:
            raise ValueError(f"kernel_size={kernel_size}, dilation={dilation}: expected at least 1 of both")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.pad_small_maps = pad_small_maps
        self.backend: Backend = backend
        side = 2 * kernel_size - 1
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.position_bias = nn.Parameter(torch.zeros(num_heads, side, side)) if position_bias else None
        for linear in (self.qkv, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.position_bias is not None:
            nn.init.trunc_normal_(self.position_bias, std=0.02)

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C), for a map of any size."""
        h, w = x.shape[1:3]
        if self.pad_small_maps:
            x, pos, padding_mask = self._padded(x, pos, padding_mask)
        qkv = project_qkv(self.qkv, x, pos).unflatten(-1, (3, self.num_heads, -1))
        out = neighborhood_attn(
            qkv, self.kernel_size, self.dilation, self.position_bias, padding_mask, backend=self.backend
        )
        projected: Tensor = self.proj(out[:, :h, :w])
        return projected

    def _padded(
        self, x: Tensor, pos: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same, with zeros to the right and at the bottom until a window fits in."""
        down, right = (max(0, self.kernel_size * self.dilation - length) for length in x.shape[1:3])
        if not down and not right:
            return x, pos, padding_mask
        tokens = (0, 0, 0, right, 0, down)
        return (
            F.pad(x, tokens),
            None if pos is None else F.pad(pos, tokens),
            None if padding_mask is None else F.pad(padding_mask, tokens[2:], value=True),
        )
