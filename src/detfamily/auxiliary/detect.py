"""From the scores and the boxes of a head to what it detects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from detfamily.structures import Detections, Size

_LEAST_IOU = 0.01
"""What a box needs to have a vote."""


class BestBoxes:
    """The best pairs of box and class of one image, of which those are suppressed that overlap better ones (NMS).

    Boxes are clipped to the image; what has no area left is dropped.

    Args:
        nms_iou: of two boxes of a class that overlap more, the better one is kept.
        per_level: the best pairs of each level that are compared; None compares all.
        min_score: scores have to be above it, before any factor.
        num_select: detections of an image, at most.
        voting: None, or how much less overlap a suppressed box may have and still pull at the box that suppressed it
            ("score voting" of PAA, arXiv 2007.08103; 0.025 there).

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        nms_iou: float,
        per_level: int | None = 1000,
        min_score: float = 0.0,
        num_select: int = 100,
        voting: float | None = None,
    ) -> None:
        if not 0 < nms_iou <= 1:
            raise ValueError(f"selection.nms_iou={nms_iou}: expected an overlap above 0 and up to 1")
        if per_level is not None and per_level < 1:
            raise ValueError(f"selection.per_level={per_level}: expected 1 or more, or null for all")
        if not 0 <= min_score < 1:
            raise ValueError(f"selection.min_score={min_score}: expected a number from 0 to below 1")
        if num_select < 1:
            raise ValueError(f"selection.num_select={num_select}: expected 1 or more")
        if voting is not None and voting <= 0:
            raise ValueError(f"selection.voting={voting}: expected a number above 0, or null for none")
        self.nms_iou = nms_iou
        self.per_level = per_level
        self.min_score = min_score
        self.num_select = num_select
        self.voting = voting

    def __call__(
        self,
        scores: Tensor,
        boxes_xyxy: Tensor,
        level_counts: Sequence[int],
        size: Size,
        original_size: Size,
        factors: Tensor | None = None,
    ) -> Detections:
        """The detections of one image, best first.

        Args:
            scores: (N, K) in (0, 1), level by level.
            boxes_xyxy: (N, 4), or (N, K, 4) where each class has a box of its own; corners in pixels of the batch.
            level_counts: how many of the N each level has.
            size: (height, width) of the image inside the padding.
            original_size: (height, width) of the image that the detections are for.
            factors: (N,) of the scores; they decide between the pairs that ``per_level`` has let through.
        """
        index = self._best(scores, level_counts)
        box, labels = index // scores.shape[1], index % scores.shape[1]
        found = scores.flatten()[index]
        if factors is not None:
            found = found * factors[box]
        boxes = boxes_xyxy[box] if boxes_xyxy.dim() == 2 else boxes_xyxy[box, labels]
        height, width = size
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
        real = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        boxes, found, labels = boxes[real], found[real], labels[real]
        kept = batched_nms(boxes, found, labels, self.nms_iou)[: self.num_select]
        best = boxes[kept] if self.voting is None else _voted(boxes, found, labels, kept, self.voting)
        stretch = boxes.new_tensor([original_size[1] / width, original_size[0] / height]).repeat(2)
        return Detections(found[kept], labels[kept], best * stretch)

    def _best(self, scores: Tensor, level_counts: Sequence[int]) -> Tensor:
        """(P,) pairs, as indices into (N * K)."""
        classes, start, best = scores.shape[1], 0, []
        for level in scores.flatten().split([count * classes for count in level_counts]):
            most = len(level) if self.per_level is None else min(self.per_level, len(level))
            top, place = level.topk(most)
            best.append(start + place[top > self.min_score])
            start += len(level)
        return torch.cat(best)


def _voted(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, kept: Tensor, spread: float) -> Tensor:
    """(M, 4) means of the boxes of the same class around each kept one, by score and overlap."""
    iou = box_iou(boxes_xyxy[kept], boxes_xyxy)
    around = (labels[kept][:, None] == labels) & (iou > _LEAST_IOU)
    votes = torch.where(around, (-((1 - iou) ** 2) / spread).exp() * scores, 0.0)[..., None]
    return (votes * boxes_xyxy).sum(1) / votes.sum(1)
