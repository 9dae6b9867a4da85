"""GFL (arXiv 2006.04388) as an auxiliary head: classes that say the overlap, and edges as distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner
from detfamily.auxiliary.dense import DenseHead, DensePredictions, counted, pairs_of, positives_of
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.divisors import mean_over_processes
from detfamily.auxiliary.losses import distribution_focal, giou, quality_focal
from detfamily.auxiliary.quality import iou_of
from detfamily.auxiliary.structures import Objects
from detfamily.blocks.boxes import to_cxcywh

_MARGIN = 0.1
"""By which the distances that are learned stay below the largest one."""


class GFL(DenseHead):
    """Classes, and for each edge how probable which distance in strides is; anchors and assignment are ATSS's.

    Queries are its positive anchors.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        num_classes: columns K.
        depth: convolutions of a tower, each with a norm and a ReLU.
        num_groups: groups of the norms.
        anchors: factory of the levels' anchors, one at a cell.
        assigner: of anchors to objects.
        weights: of the losses "class", "giou" and "distribution".
        selection: of what the head detects on its own.
        reg_max: n, the largest distance of an edge from a cell, in strides.
        beta: of the quality focal loss: focusing power.

    Raises:
        ValueError: as ``DenseHead``; there is no distance but 0.
    """

    name: ClassVar[str] = "gfl"
    losses: ClassVar[tuple[str, ...]] = ("class", "giou", "distribution")

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        depth: int,
        num_groups: int,
        anchors: Callable[..., Anchors],
        assigner: ATSSAssigner,
        weights: Mapping[str, float],
        selection: BestBoxes,
        reg_max: int = 16,
        beta: float = 2.0,
    ) -> None:
        box_channels = 4 * (reg_max + 1)
        super().__init__(strides, embed_dim, num_classes, depth, num_groups, anchors, weights, selection, box_channels)
        if reg_max < 1:
            raise ValueError(f"gfl.reg_max={reg_max}: expected 1 stride or more")
        self.assigner = assigner
        self.reg_max = reg_max
        self.beta = beta

    def assign_one(self, anchors: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(N, 4), (n, 4) of one image -> (N,)"""
        return self.assigner(anchors, level_counts, objects_xyxy)

    def decode(self, anchors: Tensor, steps: Tensor) -> Tensor:
        """(..., 4), (..., 4 * (n + 1)) logits of distances of left, top, right, bottom -> (..., 4)"""
        # no matrix product, which autocast would do in 16 bits
        shares = steps.unflatten(-1, (4, -1)).softmax(-1)
        mean = (shares * torch.arange(self.reg_max + 1, device=steps.device)).sum(-1)
        center, stride = to_cxcywh(anchors)[..., :2], self.anchors.stride_at(anchors)
        return torch.cat([center - mean[..., :2] * stride, center + mean[..., 2:] * stride], -1)

    def losses_of(
        self, predictions: DensePredictions, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        """Losses "class", "giou" and "distribution", the latter two of positive anchors, by how sure the class is."""
        pairs = pairs_of(assigned, anchors, objects)
        steps, target = predictions.steps[pairs.place], pairs.boxes_xyxy
        boxes = self.decode(pairs.anchors, steps)
        overlap = torch.zeros_like(predictions.logits[..., 0])
        overlap[pairs.place] = iou_of(boxes, target).to(overlap.dtype)
        wrong = quality_focal(predictions.logits, assigned >= 0, objects.at(assigned)[1], overlap, self.beta)
        sure = predictions.logits.detach()[pairs.place].sigmoid().amax(-1)
        blurred = distribution_focal(steps.unflatten(-1, (4, -1)), self._distances(pairs.anchors, target)).mean(-1)
        total = mean_over_processes(positives_of(assigned, predictions.logits)).clamp(min=1)
        divisor = mean_over_processes(sure.sum()).clamp(min=1)
        return {
            "class": counted(wrong, assigned) / total,
            "giou": (giou(boxes, target) * sure).sum() / divisor,
            "distribution": (blurred * sure).sum() / divisor,
        }

    def _distances(self, anchors: Tensor, boxes_xyxy: Tensor) -> Tensor:
        """(..., 4) from the centres of anchors to the edges of boxes, in strides, in the range of the distributions."""
        center = to_cxcywh(anchors)[..., :2]
        far = torch.cat([center - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - center], -1)
        return (far / self.anchors.stride_at(anchors)).clamp(0, self.reg_max - _MARGIN)
