"""Each token of a map attends to its row and to its column (Axial Attention, arXiv 1912.12180)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.dense import check_heads
from detfamily.attention.maps import MapAttention, hiding, project_qkv


class AxialAttention(MapAttention):
    """Dense attention along one axis at a time: among the tokens of a row, and among those of a column.

    Each has a softmax of its own, both share queries, keys and values, and what a token reads from its row and from its
    column is added before the output's projection. So a token of another row and column is reached in two layers. In
    the paper layers along rows and along columns take turns, in Axial-DeepLab (arXiv 2003.07853) modules of a block.

    For a map of h x w tokens it costs h * w * (h + w) comparisons, where dense attention costs (h * w)^2.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        qkv_bias: whether queries, keys and values have biases.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def __init__(self, embed_dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        for linear in (self.qkv, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C), for a map of any size."""
        qkv = project_qkv(self.qkv, x, pos).unflatten(-1, (3, self.num_heads, -1))
        along_rows = _attend(qkv, padding_mask)
        along_columns = _attend(qkv.transpose(1, 2), None if padding_mask is None else padding_mask.transpose(1, 2))
        projected: Tensor = self.proj(along_rows + along_columns.transpose(1, 2))
        return projected


def _attend(qkv: Tensor, padding_mask: Tensor | None) -> Tensor:
    """(B, h, w, C): what each token reads from its row, from qkv (B, h, w, 3, M, D)."""
    q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
    added = None
    if padding_mask is not None:
        added = hiding(padding_mask.flatten(0, 1)[:, None, None], None, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    return out.transpose(1, 2).flatten(2).unflatten(0, qkv.shape[:2])
