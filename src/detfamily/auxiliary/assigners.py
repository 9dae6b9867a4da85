"""Which object each anchor or region answers for; many may answer for one.

What assigners give, (N,) int64, are indices of objects, ``BACKGROUND`` or ``IGNORED``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detfamily.auxiliary.structures import BACKGROUND, IGNORED
from detfamily.blocks.boxes import to_cxcywh

_MARGIN = 0.01
"""Pixels by which the centre of an anchor has to lie inside an object to count as inside."""


class MaxIoUAssigner:
    """By overlap with the object that overlaps most (Faster R-CNN, arXiv 1506.01497, 3.1.2).

    Boxes between the two thresholds are ignored.

    Args:
        positive_iou: boxes answer for an object from this overlap on.
        negative_iou: below this they answer for none.
        least_iou: objects get the boxes that overlap them most, if by this much, in any case; of two such objects the
            later one gets a box. None gives them none.

    Raises:
        ValueError: thresholds are not in [0, 1], or the negative one is above the positive one.
    """

    def __init__(self, positive_iou: float, negative_iou: float, least_iou: float | None = None) -> None:
        if not 0 <= negative_iou <= positive_iou <= 1:
            raise ValueError(
                f"assigner.negative_iou={negative_iou}, assigner.positive_iou={positive_iou}: expected overlaps from 0 "
                "to 1, the negative one not above the positive one"
            )
        if least_iou is not None and not 0 < least_iou <= 1:
            raise ValueError(f"assigner.least_iou={least_iou}: expected an overlap above 0 and up to 1, or null")
        self.positive_iou = positive_iou
        self.negative_iou = negative_iou
        self.least_iou = least_iou

    def __call__(self, boxes_xyxy: Tensor, objects_xyxy: Tensor) -> Tensor:
        """(N, 4), (n, 4) of one image -> (N,)"""
        if not len(objects_xyxy):
            return torch.full_like(boxes_xyxy[:, 0], BACKGROUND, dtype=torch.int64)
        iou = box_iou(objects_xyxy, boxes_xyxy)
        most, nearest = iou.max(0)
        assigned = torch.where(most < self.negative_iou, BACKGROUND, IGNORED)
        assigned = torch.where(most >= self.positive_iou, nearest, assigned)
        return assigned if self.least_iou is None else self._with_low_quality(assigned, iou, self.least_iou)

    def _with_low_quality(self, assigned: Tensor, iou: Tensor, least: float) -> Tensor:
        if not iou.shape[1]:
            return assigned
        best = iou.amax(1, keepdim=True)
        order = torch.arange(len(iou), device=iou.device)[:, None]
        last = torch.where((iou == best) & (best >= least), order, BACKGROUND).amax(0)
        return torch.where(last >= 0, last, assigned)


class ATSSAssigner:
    """By overlap above a threshold that each object has of its own (ATSS, arXiv 1912.02424, algorithm 1).

    Of every level, the anchors whose centres are nearest to the object's are candidates. The threshold is the mean of
    their overlaps with it plus their standard deviation. Positive are those above it whose centres lie in the object.

    Args:
        nearest: candidates of each object in each level.

    Raises:
        ValueError: there are no candidates.
    """

    def __init__(self, nearest: int = 9) -> None:
        if nearest < 1:
            raise ValueError(f"assigner.nearest={nearest}: expected 1 candidate or more in each level")
        self.nearest = nearest

    def __call__(self, boxes_xyxy: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """The objects of anchors.

        Args:
            boxes_xyxy: (N, 4) of one image, level by level.
            level_counts: how many of them each level has.
            objects_xyxy: (n, 4) of that image.

        Returns:
            (N,), never ``IGNORED``.
        """
        if not len(objects_xyxy) or not len(boxes_xyxy):
            return torch.full_like(boxes_xyxy[:, 0], BACKGROUND, dtype=torch.int64)
        center = to_cxcywh(boxes_xyxy)[:, :2]
        candidates = self._candidates(center, level_counts, objects_xyxy)
        iou = box_iou(boxes_xyxy, objects_xyxy).gather(0, candidates)
        deviation = iou.std(0) if len(iou) > 1 else torch.zeros_like(iou[0])
        low = center[candidates] - objects_xyxy[:, :2]
        high = objects_xyxy[:, 2:] - center[candidates]
        inside = torch.cat([low, high], -1).amin(-1) > _MARGIN
        positive = inside & (iou >= iou.mean(0) + deviation)
        score = iou.new_full((len(boxes_xyxy), len(objects_xyxy)), -1.0)
        best, nearest = score.scatter(0, candidates, torch.where(positive, iou, -1.0)).max(1)
        return torch.where(best >= 0, nearest, BACKGROUND)

    def _candidates(self, center: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(K, n) the nearest anchors of all levels together."""
        distance = (center[:, None] - to_cxcywh(objects_xyxy)[:, :2]).square().sum(-1).sqrt()
        found, start = [], 0
        for level in distance.split(list(level_counts)):
            found.append(start + level.topk(min(self.nearest, len(level)), dim=0, largest=False).indices)
            start += len(level)
        return torch.cat(found)


class CenterAssigner:
    """The cells near the centre of an object, in the level for its size (FCOS, arXiv 1904.01355, 3.1 and 3.2).

    A cell whose farthest edge would be beyond what its level is for, or within what the level below is for, answers for
    none; the finest level has no lower limit, the coarsest no upper one. Of several objects, the smallest one counts.

    Args:
        strides: pixels between neighbouring cells of each level, finest first.
        size: the distance of edges, in strides, that each level is for at most; 8 in the paper.
        radius: how far from the centre of the object a cell may lie along each axis, in strides; null: as far as the
            object reaches.

    Raises:
        ValueError: the radius is not above 0.
    """

    def __init__(self, strides: Sequence[int], size: float, radius: float | None = 1.5) -> None:
        if radius is not None and radius <= 0:
            raise ValueError(f"assigner.radius={radius}: expected strides, more than 0, or null for all of the object")
        self.strides = tuple(strides)
        self.size = size
        self.radius = radius

    def __call__(self, centers: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """The objects of cells.

        Args:
            centers: (N, 2) x, y of the middle of the cells of one image, level by level.
            level_counts: how many of them each level has.
            objects_xyxy: (n, 4) of that image.

        Returns:
            (N,), never ``IGNORED``.
        """
        if not len(objects_xyxy):
            return torch.full_like(centers[:, 0], BACKGROUND, dtype=torch.int64)
        low, high = self._limits(level_counts, centers)
        edges = torch.cat([centers[:, None] - objects_xyxy[:, :2], objects_xyxy[:, 2:] - centers[:, None]], -1)
        farthest = edges.amax(-1)
        suits = (edges.amin(-1) > 0) & (farthest >= low) & (farthest <= high)
        if self.radius is not None:
            away = (centers[:, None] - to_cxcywh(objects_xyxy)[:, :2]).abs().amax(-1)
            suits = suits & (away < self.radius * self._of_cells(self.strides, level_counts, centers))
        area = (objects_xyxy[:, 2:] - objects_xyxy[:, :2]).prod(-1)
        smallest, nearest = torch.where(suits, area, torch.inf).min(1)
        return torch.where(smallest < torch.inf, nearest, BACKGROUND)

    def _limits(self, level_counts: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1), (N, 1) the nearest and the farthest edge of each cell."""
        between = [self.size * stride for stride in self.strides[:-1]]
        low = self._of_cells([0.0, *between], level_counts, like)
        return low, self._of_cells([*between, torch.inf], level_counts, like)

    def _of_cells(self, of_levels: Sequence[float], level_counts: Sequence[int], like: Tensor) -> Tensor:
        """(N, 1) a number of each level, for its cells."""
        cells = [like.new_full((count, 1), one) for one, count in zip(of_levels, level_counts, strict=True)]
        return torch.cat(cells)
