"""RetinaNet (arXiv 1708.02002) as an auxiliary head: several anchors at each cell, and fixed thresholds of overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.dense import DenseHead, DensePredictions, counted, pairs_of, positives_of
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.losses import focal, giou
from detfamily.auxiliary.structures import Objects


class RetinaNet(DenseHead):
    """Classes and steps from anchors to boxes; GIoU in place of the L1 loss, as in Co-DETR (arXiv 2211.12860, table 1).

    Queries are its positive anchors; the anchors of a cell share the feature of the cell. The losses are divided by the
    positive anchors of this process, as in mmdet.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        num_classes: columns K.
        depth: convolutions of a tower, each with a norm and a ReLU.
        num_groups: groups of the norms.
        anchors: factory of the levels' anchors.
        coder: of the steps.
        assigner: of anchors to objects.
        weights: of the losses "class" and "giou".
        selection: of what the head detects on its own.
        alpha: of the focal loss: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: of the focal loss: focusing power.

    Raises:
        ValueError: as ``DenseHead``.
    """

    name: ClassVar[str] = "retinanet"
    losses: ClassVar[tuple[str, ...]] = ("class", "giou")
    one_per_cell: ClassVar[bool] = False

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        depth: int,
        num_groups: int,
        anchors: Callable[..., Anchors],
        coder: DeltaCoder,
        assigner: MaxIoUAssigner,
        weights: Mapping[str, float],
        selection: BestBoxes,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(
            strides, embed_dim, num_classes, depth, num_groups, anchors, weights, selection, learned_scales=False
        )
        self.coder = coder
        self.assigner = assigner
        self.alpha = alpha
        self.gamma = gamma

    def assign_one(self, anchors: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(N, 4), (n, 4) of one image -> (N,)"""
        return self.assigner(anchors, objects_xyxy)

    def decode(self, anchors: Tensor, steps: Tensor) -> Tensor:
        """(..., 4), (..., 4) -> (..., 4)"""
        return self.coder.decode(anchors, steps)

    def losses_of(
        self, predictions: DensePredictions, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        """Losses "class" and "giou", the latter of positive anchors."""
        pairs = pairs_of(assigned, anchors, objects)
        apart = giou(self.decode(pairs.anchors, predictions.steps[pairs.place]), pairs.boxes_xyxy)
        wrong = focal(predictions.logits, assigned >= 0, objects.at(assigned)[1], self.alpha, self.gamma)
        divisor = positives_of(assigned, predictions.logits)
        return {"class": counted(wrong, assigned) / divisor, "giou": apart.sum() / divisor}
