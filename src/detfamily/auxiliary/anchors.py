"""Anchors: boxes of a few sizes and shapes at every cell of every level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detfamily.structures import Size


class Anchors:
    """Boxes at every cell (RetinaNet, arXiv 1708.02002, section 4), around its top left corner, as mmdet has it.

    Anchors of all levels are in one row: level by level, row by row, cell by cell, there by ratio and then by scale.

    Args:
        strides: pixels between neighbouring cells of each level, finest first.
        size: side of the smallest square, in strides.
        scales: sizes at each cell, from ``size`` on, a ``scales``-th part of an octave apart.
        ratios: height / width of the shapes.
        scale: multiplies all sizes; below 1 for images smaller than COCO's at 800 pixels.
        offset: how far right of and below that corner they lie, in strides; 0.5 is the middle of the cell.

    Raises:
        ValueError: a number is out of its range, or there are none.
    """

    def __init__(
        self,
        strides: Sequence[int],
        size: float,
        scales: int,
        ratios: Sequence[float],
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        if not strides or min(strides) < 1:
            raise ValueError(f"anchors.strides={[*strides]}: expected pixels between cells of each level, 1 or more")
        if size <= 0 or scales < 1:
            raise ValueError(
                f"anchors.size={size}, anchors.scales={scales}: expected sizes above 0 and 1 or more scales"
            )
        if scale <= 0:
            raise ValueError(f"anchors.scale={scale}: expected a number above 0")
        if not 0 <= offset <= 1:
            raise ValueError(f"anchors.offset={offset}: expected a share of a cell, from 0 to 1")
        if not ratios or min(ratios) <= 0:
            raise ValueError(f"anchors.ratios={[*ratios]}: expected ratios of height to width, above 0")
        self.strides = tuple(strides)
        self.size = size * scale
        self.scales = scales
        self.ratios = tuple(ratios)
        self.offset = offset

    @property
    def per_cell(self) -> int:
        """How many anchors each cell has."""
        return self.scales * len(self.ratios)

    def of_cell(self, level: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(A, 4) the anchors of a cell, corners in pixels from where the cell is."""
        octave = torch.tensor([self.size * 2 ** (step / self.scales) for step in range(self.scales)], dtype=dtype)
        tall = torch.tensor(self.ratios, dtype=dtype).sqrt()
        width = (self.strides[level] * (1 / tall)[:, None] * octave).flatten()
        height = (self.strides[level] * tall[:, None] * octave).flatten()
        sides = torch.stack([width, height], -1)
        return torch.cat([-0.5 * sides, 0.5 * sides], -1)

    def __call__(self, shapes: Sequence[Size], like: Tensor) -> Tensor:
        """Those of all levels.

        Args:
            shapes: (h, w) of the levels.
            like: a tensor of the type and the device that the anchors shall have.

        Returns:
            (N, 4) corners in pixels.
        """
        found = []
        for level, (height, width) in enumerate(shapes):
            stride = self.strides[level]
            rows, columns = (torch.arange(count, device=like.device, dtype=like.dtype) for count in (height, width))
            y, x = (rows + self.offset) * stride, (columns + self.offset) * stride
            place = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
            of_cell = self.of_cell(level, like.dtype).to(like.device, non_blocking=True)
            found.append((place.repeat(1, 1, 2)[:, :, None] + of_cell).reshape(-1, 4))
        return torch.cat(found)

    def stride_at(self, anchors_xyxy: Tensor) -> Tensor:
        """(..., 1) the stride of the levels that anchors (..., 4) belong to, where each cell has one size."""
        return (anchors_xyxy[..., 2:] - anchors_xyxy[..., :2]).prod(-1, keepdim=True).sqrt() / self.size

    def inside(self, shapes: Sequence[Size], size: Size, device: torch.device) -> tuple[Tensor, list[int]]:
        """The anchors whose cells lie in an image.

        Args:
            shapes: (h, w) of the levels.
            size: (height, width) of the image inside the padding, in pixels.
            device: where the indices shall be.

        Returns:
            (V,) int64 their indices among all, in order, and how many there are of each level.
        """
        found, start = [], 0
        for (height, width), stride in zip(shapes, self.strides, strict=True):
            count = height * width * self.per_cell
            index = torch.arange(start, start + count, device=device).view(height, width, self.per_cell)
            found.append(index[: math.ceil(size[0] / stride), : math.ceil(size[1] / stride)].flatten())
            start += count
        return torch.cat(found), [len(one) for one in found]


def by_anchor(maps: Tensor, width: int) -> Tensor:
    """(B, A * X, h, w) of a convolution that says X = ``width`` numbers of every anchor, to (B, h * w * A, X)."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, width)
