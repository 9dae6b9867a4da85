"""ATSS (arXiv 1912.02424) as an auxiliary head: one anchor at each cell, and a threshold of overlap for each object."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from detfamily.auxiliary.anchors import Anchors, by_anchor
from detfamily.auxiliary.assigners import ATSSAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.divisors import mean_over_processes
from detfamily.auxiliary.head import AuxiliaryHead
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.structures import (
    IGNORED,
    Auxiliary,
    Candidates,
    Objects,
    check_levels,
    shapes_of,
    tokens_of,
)
from detfamily.blocks.boxes import to_cxcywh
from detfamily.blocks.denoising import Draws
from detfamily.blocks.heads import full_precision
from detfamily.structures import Detections, Images, Size

_EPS = 1e-6


class ATSS(AuxiliaryHead):
    """Two towers of convolutions on every level: classes from one, boxes and centerness from the other.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        num_classes: columns K.
        depth: convolutions of a tower, each with a norm and a ReLU.
        num_groups: groups of the norms.
        anchors: factory of the levels' anchors, one at a cell.
        coder: of the steps from anchors to boxes.
        assigner: of anchors to objects.
        weights: of the losses "class", "giou" and "centerness".
        selection: of what the head detects on its own.
        alpha: of the focal loss: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: of the focal loss: focusing power.

    Raises:
        ValueError: there are several anchors at a cell; num_groups does not divide embed_dim; the weights are not those
            of the losses.
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
        super().__init__(weights)
        self.anchors = anchors(strides=strides)
        if self.anchors.per_cell != 1:
            raise ValueError(
                f"atss.anchors has {self.anchors.per_cell} anchors at a cell: expected 1, one scale and one ratio"
            )
        if embed_dim % num_groups:
            raise ValueError(f"atss.num_groups={num_groups} does not divide embed_dim={embed_dim}")
        self.coder = coder
        self.assigner = assigner
        self.selection = selection
        self.alpha = alpha
        self.gamma = gamma
        self.class_tower = nn.Sequential(*(_Block(embed_dim, num_groups) for _ in range(depth)))
        self.box_tower = nn.Sequential(*(_Block(embed_dim, num_groups) for _ in range(depth)))
        self.class_head = nn.Conv2d(embed_dim, num_classes, 3, padding=1)
        self.box_head = nn.Conv2d(embed_dim, 4, 3, padding=1)
        self.centerness_head = nn.Conv2d(embed_dim, 1, 3, padding=1)
        self.scales = nn.ParameterList([torch.ones(()) for _ in strides])
        start_small(self.class_head, bias=-math.log(99))  # a probability of 0.01
        start_small(self.box_head)
        start_small(self.centerness_head)

    def forward(self, maps: Sequence[Tensor], images: Images, objects: Objects, draws: Draws) -> Auxiliary:
        """Losses "class", "giou" and "centerness", and the anchors."""
        check_levels(maps, len(self.anchors.strides), self.name)
        shapes = shapes_of(maps)
        anchors = self.anchors(shapes, objects.boxes_xyxy)
        assigned = self.assign(anchors, shapes, images, objects)
        losses = self._losses(*self.predict(maps), anchors, assigned, objects)
        # anchors in the padding are boxes without a size there, and may fill up the queries, as officially
        shown = torch.where(assigned[..., None] == IGNORED, 0.0, anchors)
        usable = torch.ones_like(assigned, dtype=torch.bool)
        return Auxiliary(losses, Candidates(shown, tokens_of(maps), assigned, usable))

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], images: Images) -> list[Detections]:
        """The best boxes of each image; a score is that of the class times centerness (FCOS, arXiv 1904.01355, 3.3)."""
        check_levels(maps, len(self.anchors.strides), self.name)
        logits, deltas, centerness = self.predict(maps)
        shapes = shapes_of(maps)
        boxes = self.coder.decode(self.anchors(shapes, deltas), deltas)
        found = []
        for image, sizes in enumerate(zip(images.sizes, images.original_sizes, strict=True)):
            inside, counts = self.anchors.inside(shapes, sizes[0], logits.device)
            scores, factors = logits[image, inside].sigmoid(), centerness[image, inside].sigmoid()
            found.append(self.selection(scores, boxes[image, inside], counts, *sizes, factors))
        return found

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, N, K), steps (B, N, 4) and centerness logits (B, N) of the anchors."""
        logits, deltas, centerness = [], [], []
        for one, scale in zip(maps, self.scales, strict=True):
            hidden = self.box_tower(one)
            logits.append(
                full_precision(by_anchor(self.class_head(self.class_tower(one)), self.class_head.out_channels))
            )
            deltas.append(full_precision(by_anchor(self.box_head(hidden), 4)) * scale)
            centerness.append(full_precision(by_anchor(self.centerness_head(hidden), 1)))
        return torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(centerness, 1)[..., 0]

    @torch.no_grad()
    def assign(self, anchors: Tensor, shapes: Sequence[Size], images: Images, objects: Objects) -> Tensor:
        """(B, N) the objects' indices, ``BACKGROUND``, or ``IGNORED`` for anchors whose cells lie in the padding."""
        assigned = []
        for image, size in enumerate(images.sizes):
            inside, counts = self.anchors.inside(shapes, size, anchors.device)
            own = self.assigner(anchors[inside], counts, objects.boxes_of(image))
            assigned.append(own.new_full((len(anchors),), IGNORED).scatter(0, inside, own))
        return torch.stack(assigned)

    def _losses(
        self, logits: Tensor, deltas: Tensor, centerness: Tensor, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        matched = assigned >= 0
        positives = matched.sum(1).clamp(min=1).sum()
        divisor = mean_over_processes(positives.to(deltas.dtype)).clamp(min=1)
        target_xyxy, labels = objects.at(assigned)
        source, target = anchors.expand_as(target_xyxy)[matched], target_xyxy[matched]
        wanted = centerness_of(source, target)
        found_xyxy = self.coder.decode(source, deltas[matched])
        apart = generalized_box_iou_loss(found_xyxy, target, reduction="none", eps=_EPS)
        unsure = F.binary_cross_entropy_with_logits(centerness[matched], wanted.to(centerness.dtype), reduction="sum")
        return {
            "class": self._focal(logits, assigned, labels) / divisor,
            "giou": (apart * wanted).sum() / mean_over_processes(wanted.sum()).clamp(min=1),
            "centerness": unsure / divisor,
        }

    def _focal(self, logits: Tensor, assigned: Tensor, labels: Tensor) -> Tensor:
        """Sigmoid focal loss (arXiv 1708.02002, eq. 5), summed over all anchors but ignored ones, and all columns."""
        # every column as a negative, then the matched ones exchanged: no one-hot tensor of all anchors and classes
        negative = self._negative(logits).sum(-1)
        own = logits.gather(2, labels[..., None])[..., 0]
        positive = self.alpha * (1 - own.sigmoid()) ** self.gamma * F.softplus(-own) - self._negative(own)
        return (torch.where(assigned == IGNORED, 0.0, negative) + torch.where(assigned >= 0, positive, 0.0)).sum()

    def _negative(self, logits: Tensor) -> Tensor:
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)


class _Block(nn.Module):
    """A convolution, its norm, and a ReLU."""

    def __init__(self, embed_dim: int, num_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(num_groups, embed_dim)
        start_small(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        hidden: Tensor = self.norm(self.conv(x))
        return hidden.relu()


def centerness_of(anchors_xyxy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """How near the centres of anchors are to those of boxes they lie in (FCOS, arXiv 1904.01355, eq. 3).

    Args:
        anchors_xyxy: (..., 4).
        boxes_xyxy: (..., 4), which hold the anchors' centres.

    Returns:
        (...) from 0 at the edge to 1 at the centre.
    """
    center = to_cxcywh(anchors_xyxy)[..., :2]
    low, high = center - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - center
    return (torch.minimum(low, high) / torch.maximum(low, high)).prod(-1).sqrt()
