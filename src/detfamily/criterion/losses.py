"""Losses of predictions against their assigned targets, for all layers at once.

A loss is called with the predictions of a group, its targets, the assignment and the normaliser, and gives one number
per layer, (D,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detfamily.blocks.boxes import iou_and_giou, iou_of
from detfamily.blocks.focal import background, focal_exchange, quality_exchange
from detfamily.criterion.matcher import Assignment
from detfamily.structures import Predictions, Targets


@dataclass(frozen=True)
class Normalizer:
    """What losses are divided by: it counts the objects of a whole optimiser step, not of one process or micro-batch.

    Attributes:
        counts: (I,) float, the number of objects of every image of the step: all ranks, all micro-batches.
        world_size: processes whose gradients are averaged.
        copies: queries that answer for each object.
        answered: () queries that answer for an object per process, where they are not known by the counts.
    """

    counts: Tensor
    world_size: int = 1
    copies: int = 1
    answered: Tensor | None = None

    def num_boxes(self) -> Tensor:
        """Objects that are answered for per process, 1 of them at least."""
        if self.answered is not None:
            return self.answered.clamp(min=1)
        return (self.counts.sum() / self.world_size).clamp(min=1) * self.copies

    def num_matched(self, group: Predictions) -> tuple[Tensor, Tensor]:
        """Queries per process that are and that are not matched, known before any matching.

        Where it is given who answers for what, the unmatched ones are those of this process.
        """
        if group.given is not None:
            return self.num_boxes(), (group.given.counted & ~group.given.matched).sum()
        num_queries = group.logits.shape[2]
        matched = self.counts.clamp(max=num_queries).sum()
        everything = self.counts.numel() * num_queries
        return matched / self.world_size, (everything - matched) / self.world_size


class SoftmaxClassLoss(nn.Module):
    """Weighted cross entropy over classes and "no object" (DETR, eq. 2).

    It is divided by the sum of the weights of all queries of the step; the official code sums them per process.

    Args:
        no_object_weight: of queries without an object, against 1.
    """

    no_object_weight: Tensor

    def __init__(self, no_object_weight: float = 0.1) -> None:
        super().__init__()
        # float32 whatever the logits are: the official code keeps its class weights so
        self.register_buffer("no_object_weight", torch.tensor(no_object_weight), persistent=False)

    def forward(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizer: Normalizer
    ) -> Tensor:
        """(D,)"""
        minus_log = -predictions.logits.log_softmax(-1)
        empty = self.no_object_weight * minus_log[..., -1]
        wrongly_empty = assignment.gather(empty[..., None])[..., 0]
        of_class = _of_targets(minus_log, targets, assignment)
        total = _counted(empty, predictions).sum((1, 2)) + _sum(of_class - wrongly_empty, assignment)
        matched, unmatched = (count.to(total.dtype) for count in normalizer.num_matched(predictions))
        return total / (matched + self.no_object_weight * unmatched)


class FocalClassLoss(nn.Module):
    """Sigmoid focal loss (arXiv 1708.02002, eq. 5), summed over queries and classes, divided by the objects.

    Args:
        alpha: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: focusing power.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizer: Normalizer
    ) -> Tensor:
        """(D,)"""
        empty = background(predictions.logits, self.gamma, 1 - self.alpha).sum(3)
        own = _of_targets(predictions.logits, targets, assignment)
        exchanged = _sum(focal_exchange(own, self.alpha, self.gamma), assignment)
        return (_counted(empty, predictions).sum((1, 2)) + exchanged) / normalizer.num_boxes()


class QualityFocalClassLoss(nn.Module):
    """Cross entropy to the overlap that a query's box has, weighted by how far it is off (arXiv 2006.04388, eq. 5).

    The column of the target's class is to say the IoU of box and target, all others are to say 0.

    Args:
        beta: power of the distance.
    """

    def __init__(self, beta: float = 2.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizer: Normalizer
    ) -> Tensor:
        """(D,)"""
        empty = background(predictions.logits, self.beta).sum(3)
        own = _of_targets(predictions.logits, targets, assignment)
        quality = iou_of(assignment.gather(predictions.boxes).detach(), targets.boxes).to(own.dtype)
        exchanged = _sum(quality_exchange(own, quality, self.beta), assignment)
        return (_counted(empty, predictions).sum((1, 2)) + exchanged) / normalizer.num_boxes()


class L1Loss(nn.Module):
    """Sum of the absolute differences of cx, cy, w, h, divided by the objects (DETR, A.2)."""

    def forward(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizer: Normalizer
    ) -> Tensor:
        """(D,)"""
        distance = (assignment.gather(predictions.boxes) - targets.boxes).abs().sum(-1)
        return _sum(distance, assignment) / normalizer.num_boxes()


class GIoULoss(nn.Module):
    """1 - generalised IoU, divided by the objects (arXiv 1902.09630).

    Args:
        eps: in the denominators of IoU.
    """

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizer: Normalizer
    ) -> Tensor:
        """(D,)"""
        _, giou = iou_and_giou(assignment.gather(predictions.boxes), targets.boxes, self.eps)
        return _sum(1 - giou, assignment) / normalizer.num_boxes()


def _of_targets(scores: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
    """(D, B, N, K) -> (D, B, T), each target's class column of its query."""
    labels = targets.labels[None].expand_as(assignment.query)
    index = assignment.query * scores.shape[-1] + labels
    return scores.flatten(2).gather(2, index)


def _counted(values: Tensor, predictions: Predictions) -> Tensor:
    """(D, B, N), with zeros where a query is no one's."""
    return values if predictions.given is None else values.masked_fill(~predictions.given.counted, 0.0)


def _sum(values: Tensor, assignment: Assignment) -> Tensor:
    """(D, B, T) -> (D,), over matched targets; where instead of a product, since unmatched slots may hold anything."""
    return torch.where(assignment.matched, values, torch.zeros_like(values)).sum((1, 2))
