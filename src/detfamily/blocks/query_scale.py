"""How the content of a query changes the code of its place: Conditional DETR's forms of the spatial query.

Each is called with the layer's index, the content and the code, both (B, N, C), and gives a code (B, N, C). The first
layer's content says nothing yet, so the code stays as it is there (arXiv 2108.06152, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detfamily.blocks.layers import MLP


class ElementwiseScale(nn.Module):
    """The content says a factor for each channel: a diagonal transformation, which both papers chose (eq. 6)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.mlp = MLP(embed_dim, embed_dim, embed_dim, num_layers=2, xavier=True)

    def forward(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        return code if layer_index == 0 else code * self.mlp(content)


class ScalarScale(nn.Module):
    """The content says one factor for all channels (Conditional DETR, figure 5, "single")."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.mlp = MLP(embed_dim, embed_dim, 1, num_layers=2, xavier=True)

    def forward(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        return code if layer_index == 0 else code * self.mlp(content)


class BlockTransform(nn.Module):
    """The content says a matrix of square blocks along the diagonal (Conditional DETR, figure 5, "block" and "full").

    Args:
        embed_dim: the width C.
        num_blocks: blocks, which must divide C; 1 is a full matrix, the number of heads keeps heads apart.

    Raises:
        ValueError: num_blocks does not divide embed_dim.
    """

    def __init__(self, embed_dim: int, num_blocks: int) -> None:
        super().__init__()
        if num_blocks < 1 or embed_dim % num_blocks:
            raise ValueError(f"query_scale.num_blocks={num_blocks} does not divide embed_dim={embed_dim}")
        self.num_blocks = num_blocks
        side = embed_dim // num_blocks
        self.mlp = MLP(embed_dim, embed_dim, num_blocks * side * side, num_layers=2, xavier=True)

    def forward(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        if layer_index == 0:
            return code
        vectors = code.unflatten(-1, (self.num_blocks, -1))
        side = vectors.shape[-1]
        matrices = self.mlp(content).unflatten(-1, (self.num_blocks, side, side))
        return torch.einsum("bnkij,bnkj->bnki", matrices, vectors).flatten(-2)


class LayerScale(nn.Module):
    """A learned factor for each channel and layer, whatever the content is (DAB-DETR's code, "fix_elewise").

    Args:
        embed_dim: the width C.
        num_layers: decoder layers.
    """

    def __init__(self, embed_dim: int, num_layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_layers, embed_dim)))

    def forward(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        return code * self.weight[layer_index]


class OnlyScale(ElementwiseScale):
    """What the content would scale by, without the code (Conditional DETR, table 3, "CSQ-T")."""

    def forward(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        return code if layer_index == 0 else self.mlp(content)


class OnlyContent(nn.Module):
    """The content itself in the place of the code (Conditional DETR, table 3, "CSQ-C")."""

    def forward(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        return code if layer_index == 0 else content
