"""ATSS (arXiv 1912.02424) as an auxiliary head: one anchor at each cell, and a threshold of overlap for each object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.dense import DenseHead, DensePredictions, counted, pairs_of, positives_of
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.divisors import mean_over_processes
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.losses import binary, focal, giou
from detfamily.auxiliary.quality import centerness_of
from detfamily.auxiliary.structures import Objects


class ATSS(DenseHead):
    """Classes, steps from anchors to boxes, and centerness.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        num_classes: columns K.
        depth: convolutions of a tower, each with a norm and a ReLU.
        num_groups: groups of the norms.
        anchors: factory of the levels' anchors, one at a cell.
        coder: of the steps.
        assigner: of anchors to objects.
        weights: of the losses "class", "giou" and "centerness".
        selection: of what the head detects on its own.
        alpha: of the focal loss: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: of the focal loss: focusing power.

    Raises:
        ValueError: as ``DenseHead``.
    """

    name: ClassVar[str] = "atss"
    losses: ClassVar[tuple[str, ...]] = ("class", "giou", "centerness")

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        depth: int,
        num_groups: int,
        anchors: Callable[..., Anchors],
        coder: DeltaCoder,
        assigner: ATSSAssigner,
        weights: Mapping[str, float],
        selection: BestBoxes,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(strides, embed_dim, num_classes, depth, num_groups, anchors, weights, selection)
        self.coder = coder
        self.assigner = assigner
        self.alpha = alpha
        self.gamma = gamma
        self.centerness_head = nn.Conv2d(embed_dim, 1, 3, padding=1)
        start_small(self.centerness_head)

    def predict(self, maps: Sequence[Tensor]) -> DensePredictions:
        """What the head says of the anchors of all levels."""
        return self.predict_levels(maps, self.centerness_head)

    def assign_one(self, anchors: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(N, 4), (n, 4) of one image -> (N,)"""
        return self.assigner(anchors, level_counts, objects_xyxy)

    def decode(self, anchors: Tensor, steps: Tensor) -> Tensor:
        """(..., 4), (..., 4) -> (..., 4)"""
        return self.coder.decode(anchors, steps)

    def losses_of(
        self, predictions: DensePredictions, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        """Losses "class", "giou" and "centerness", the latter two of positive anchors."""
        assert predictions.quality is not None
        pairs = pairs_of(assigned, anchors, objects)
        wanted = centerness_of(pairs.anchors, pairs.boxes_xyxy)
        apart = giou(self.decode(pairs.anchors, predictions.steps[pairs.place]), pairs.boxes_xyxy)
        unsure = binary(predictions.quality[pairs.place], wanted).sum()
        wrong = focal(predictions.logits, assigned >= 0, objects.at(assigned)[1], self.alpha, self.gamma)
        divisor = mean_over_processes(positives_of(assigned, predictions.logits)).clamp(min=1)
        return {
            "class": counted(wrong, assigned) / divisor,
            "giou": (apart * wanted).sum() / mean_over_processes(wanted.sum()).clamp(min=1),
            "centerness": unsure / divisor,
        }
