"""Where learned queries look from: the points or boxes that they start at.

A reference is built with the number of queries, called with their positions (N, C) or None, and gives (N, R) in (0, 1),
in float32 at least. ``dim`` is R, ``needs_pos`` says whether it reads the positions, ``differs`` whether queries differ
by it alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detfamily.blocks.boxes import inverse_sigmoid
from detfamily.blocks.heads import full_precision
from detfamily.blocks.layers import MLP


class LinearReference(nn.Linear):
    """A point, by a linear layer from the position (Deformable DETR, A.3)."""

    dim, needs_pos, differs = 2, True, False

    def __init__(self, embed_dim: int, num_queries: int) -> None:
        super().__init__(embed_dim, 2)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, pos: Tensor) -> Tensor:
        """(N, C) -> (N, 2)"""
        return full_precision(super().forward(pos)).sigmoid()


class MLPReference(MLP):
    """A point, by a perceptron of two layers from the position (Conditional DETR, section 3.3)."""

    dim, needs_pos, differs = 2, True, False

    def __init__(self, embed_dim: int, num_queries: int) -> None:
        super().__init__(embed_dim, embed_dim, 2, num_layers=2, xavier=True)

    def forward(self, pos: Tensor) -> Tensor:
        """(N, C) -> (N, 2)"""
        return full_precision(super().forward(pos)).sigmoid()


class CenterReference(nn.Module):
    """The image's centre for all queries (Conditional DETR, section 4.3, "(0, 0)": before the sigmoid)."""

    dim, needs_pos, differs = 2, False, False

    def __init__(self, num_queries: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.full((num_queries, 2), 0.5), persistent=False)

    center: Tensor

    def forward(self, pos: Tensor | None) -> Tensor:
        """(N, 2)"""
        return self.center


class LearnedReference(nn.Module):
    """Points or boxes that are parameters: DAB-DETR's anchors (arXiv 2201.12329, section 4.2).

    Args:
        num_queries: N.
        dim: 2 for points, 4 for boxes.
        random_centers: start with centres that are spread evenly over the image (DAB-DETR, appendix E).
        freeze_centers: never move the centres that all images start from; the official ``--random_refpoints_xy`` means
            to, and does not (its ``requires_grad = False`` reaches a copy), so its weights need False.

    Raises:
        ValueError: dim is neither.
    """

    needs_pos, differs = False, True

    def __init__(
        self, num_queries: int, dim: int = 4, random_centers: bool = False, freeze_centers: bool = False
    ) -> None:
        super().__init__()
        if dim not in (2, 4):
            raise ValueError(f"query_source.reference.dim={dim}: an anchor is a point (2) or a box (4)")
        self.dim = dim
        centers = torch.randn(num_queries, 2)
        if random_centers:
            centers = inverse_sigmoid(torch.rand(num_queries, 2), eps=1e-3)
        if freeze_centers:
            self.register_buffer("center_logit", centers)
        else:
            self.center_logit = nn.Parameter(centers)
        self.size_logit = nn.Parameter(torch.randn(num_queries, 2)) if dim == 4 else None

    center_logit: Tensor

    def forward(self, pos: Tensor | None) -> Tensor:
        """(N, R)"""
        parts = [self.center_logit] if self.size_logit is None else [self.center_logit, self.size_logit]
        return full_precision(torch.cat(parts, -1)).sigmoid()
