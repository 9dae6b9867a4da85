"""FCOS (arXiv 1904.01355) as an auxiliary head: the cells near the centre of an object say how far its edges are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import CenterAssigner
from detfamily.auxiliary.centerness import CenternessHead
from detfamily.auxiliary.detect import BestBoxes
from detfamily.blocks.boxes import to_cxcywh


class FCOS(CenternessHead):
    """Classes, distances to the four edges in strides, and centerness, with FCOS's later improvements.

    These are: objects' centres in place of all that lies in objects, GIoU, distances in strides behind a ReLU, and
    centerness from the tower of the boxes. Co-DETR has the first two (arXiv 2211.12860, table 1). Cells have squares of
    8 strides around their centres in the place of anchors: positive ones become queries (the same table), and their
    sides say how far edges may be.

    Cells in the padding are ignored, as by the other heads; mmdet takes them for background.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        num_classes: columns K.
        depth: convolutions of a tower, each with a norm and a ReLU.
        num_groups: groups of the norms.
        anchors: factory of the squares, one at a cell.
        assigner: factory of what assigns cells to objects.
        weights: of the losses "class", "giou" and "centerness".
        selection: of what the head detects on its own.
        alpha: of the focal loss: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: of the focal loss: focusing power.

    Raises:
        ValueError: as ``DenseHead``.
    """

    name: ClassVar[str] = "fcos"
    least_weight: ClassVar[float] = 1e-6

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        depth: int,
        num_groups: int,
        anchors: Callable[..., Anchors],
        assigner: Callable[..., CenterAssigner],
        weights: Mapping[str, float],
        selection: BestBoxes,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(strides, embed_dim, num_classes, depth, num_groups, anchors, weights, selection, alpha, gamma)
        self.assigner = assigner(strides=strides, size=self.anchors.size)

    def positives(self, assigned: Tensor, like: Tensor) -> Tensor:
        """() the positive cells."""
        return (assigned >= 0).sum().to(like.dtype)

    def assign_one(self, anchors: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(N, 4), (n, 4) of one image -> (N,)"""
        return self.assigner(to_cxcywh(anchors)[:, :2], level_counts, objects_xyxy)

    def decode(self, anchors: Tensor, steps: Tensor) -> Tensor:
        """(..., 4), (..., 4) left, top, right, bottom in strides -> (..., 4)"""
        center, stride = to_cxcywh(anchors)[..., :2], self.anchors.stride_at(anchors)
        low, high = steps.relu().chunk(2, -1)
        return torch.cat([center - low * stride, center + high * stride], -1)
