"""Boxes as steps from other boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detfamily.blocks.boxes import to_cxcywh

_LARGEST_LOG = math.log(1000 / 16)
"""Of the ratio of two boxes' sides: a decoded box is at most that many times larger or smaller."""


class DeltaCoder:
    """Shifts in shares of the other box's sides, and logarithms of ratios of the sides (R-CNN, arXiv 1311.2524, C).

    Args:
        stds: what the four numbers are divided by.

    Raises:
        ValueError: stds are not four numbers above 0.
    """

    def __init__(self, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> None:
        if len(stds) != 4 or min(stds) <= 0:
            raise ValueError(f"coder.stds={[*stds]}: expected four numbers above 0, of x, y, w, h")
        self.stds = tuple(stds)

    def encode(self, source_xyxy: Tensor, boxes_xyxy: Tensor) -> Tensor:
        """The steps from ``source_xyxy`` (..., 4) to ``boxes_xyxy`` (..., 4), (..., 4)."""
        source, boxes = to_cxcywh(source_xyxy), to_cxcywh(boxes_xyxy)
        shift = (boxes[..., :2] - source[..., :2]) / source[..., 2:]
        return torch.cat([shift, (boxes[..., 2:] / source[..., 2:]).log()], -1) / self._stds(source)

    def decode(self, source_xyxy: Tensor, delta: Tensor) -> Tensor:
        """The boxes that steps (..., 4) lead to from ``source_xyxy`` (..., 4), corners (..., 4)."""
        source = to_cxcywh(source_xyxy)
        delta = delta * self._stds(delta)
        center = source[..., :2] + source[..., 2:] * delta[..., :2]
        half = source[..., 2:] * delta[..., 2:].clamp(-_LARGEST_LOG, _LARGEST_LOG).exp() * 0.5
        return torch.cat([center - half, center + half], -1)

    def _stds(self, like: Tensor) -> Tensor:
        return torch.tensor(self.stds, dtype=like.dtype).to(like.device, non_blocking=True)
