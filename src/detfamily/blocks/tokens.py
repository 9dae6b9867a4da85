"""From feature maps to one row of tokens with its geometry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.structures import Grid, Size, Tokens


def resize_mask(padding_mask: Tensor, size: Size) -> Tensor:
    """(B, H, W) to (B, h, w): cell i takes pixel floor(i * H / h), the official nearest rule, not every n-th pixel."""
    return F.interpolate(padding_mask[None].float(), size=size)[0].to(torch.bool)


def flatten_maps(maps: Sequence[Tensor], masks: Sequence[Tensor], padded: bool) -> Tokens:
    """Lay the maps of all levels out as tokens, finest level first, row by row.

    Args:
        maps: (B, C, h, w) for each level.
        masks: (B, h, w) for each level, True at padding.
        padded: whether any mask has a True; known on the host, so that nobody needs to look.

    Returns:
        Tokens without positions; reference_points are the (B, S, 2) centres of the cells over the un-padded image.
    """
    shapes = tuple((int(one.shape[-2]), int(one.shape[-1])) for one in maps)
    ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)
    grid = Grid(
        shapes=shapes,
        padding_mask=torch.cat([mask.flatten(1) for mask in masks], 1) if padded else None,
        valid_ratios=ratios,
    )
    return Tokens(
        content=flatten(maps),
        reference_points=torch.cat([_centers(shape, ratios[:, level]) for level, shape in enumerate(shapes)], 1),
        grid=grid,
    )


def flatten(maps: Sequence[Tensor]) -> Tensor:
    """[(B, C, h, w)] to (B, S, C)."""
    return torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)


def valid_ratio(mask: Tensor) -> Tensor:
    """(B, 2) share of the width and of the height that is image, by the first row and the first column."""
    return torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)


def _centers(shape: Size, ratio: Tensor) -> Tensor:
    """(B, h * w, 2) x, y of the cells' centres; beyond 1 in the padding."""
    h, w = shape
    y = (torch.arange(h, dtype=torch.float32, device=ratio.device) + 0.5) / (ratio[:, 1:] * h)
    x = (torch.arange(w, dtype=torch.float32, device=ratio.device) + 0.5) / (ratio[:, :1] * w)
    return torch.stack([x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)], -1).flatten(1, 2)
