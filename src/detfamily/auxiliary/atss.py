"""ATSS (arXiv 1912.02424) as an auxiliary head: one anchor at each cell, and a threshold of overlap for each object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner
from detfamily.auxiliary.centerness import CenternessHead
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.dense import positives_of
from detfamily.auxiliary.detect import BestBoxes


class ATSS(CenternessHead):
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
    least_weight: ClassVar[float] = 1.0

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
        super().__init__(strides, embed_dim, num_classes, depth, num_groups, anchors, weights, selection, alpha, gamma)
        self.coder = coder
        self.assigner = assigner

    def positives(self, assigned: Tensor, like: Tensor) -> Tensor:
        """() the positive anchors, of each image 1 at least."""
        return positives_of(assigned, like)

    def assign_one(self, anchors: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(N, 4), (n, 4) of one image -> (N,)"""
        return self.assigner(anchors, level_counts, objects_xyxy)

    def decode(self, anchors: Tensor, steps: Tensor) -> Tensor:
        """(..., 4), (..., 4) -> (..., 4)"""
        return self.coder.decode(anchors, steps)
