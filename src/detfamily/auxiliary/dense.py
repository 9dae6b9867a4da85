"""What one-stage heads have in common: they judge every cell of every map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from detfamily.auxiliary.anchors import Anchors, by_anchor
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.head import AuxiliaryHead
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.structures import (
    IGNORED,
    OUTSIDE,
    Auxiliary,
    Candidates,
    Objects,
    check_levels,
    shapes_of,
    tokens_of,
)
from detfamily.auxiliary.towers import tower
from detfamily.blocks.denoising import Draws
from detfamily.blocks.heads import full_precision
from detfamily.structures import Detections, Images, Size


class DensePredictions(NamedTuple):
    """What a head says of all anchors.

    Attributes:
        logits: (B, N, K) of the classes.
        steps: (B, N, X) from the anchors to boxes, as the head's ``decode`` reads them.
        quality: (B, N) logit of how good the box is; None where the head does not say.
    """

    logits: Tensor
    steps: Tensor
    quality: Tensor | None


class DenseHead(AuxiliaryHead):
    """Two towers of convolutions on every level: classes from one, boxes from the other (RetinaNet, FCOS and after).

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        num_classes: columns K.
        depth: convolutions of a tower, each with a norm and a ReLU.
        num_groups: groups of the norms.
        anchors: factory of the levels' anchors.
        weights: of the losses.
        selection: of what the head detects on its own.
        box_channels: X, the numbers that say a box.
        learned_scales: every level has a learned number that multiplies its steps.

    Raises:
        ValueError: there are several anchors at a cell, and the head is made for one; num_groups does not divide
            embed_dim; depth is negative; the weights are not those of the losses.
    """

    one_per_cell: ClassVar[bool] = True

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        depth: int,
        num_groups: int,
        anchors: Callable[..., Anchors],
        weights: Mapping[str, float],
        selection: BestBoxes,
        box_channels: int = 4,
        learned_scales: bool = True,
    ) -> None:
        super().__init__(weights)
        self.anchors = anchors(strides=strides)
        per_cell = self.anchors.per_cell
        if self.one_per_cell and per_cell != 1:
            raise ValueError(
                f"{self.name}.anchors has {per_cell} anchors at a cell: expected 1, one scale and one ratio"
            )
        if embed_dim % num_groups:
            raise ValueError(f"{self.name}.num_groups={num_groups} does not divide embed_dim={embed_dim}")
        if depth < 0:
            raise ValueError(f"{self.name}.depth={depth}: expected 0 or more convolutions")
        self.selection = selection
        self.box_channels = box_channels
        self.num_classes = num_classes
        self.class_tower = tower(embed_dim, depth, num_groups)
        self.box_tower = tower(embed_dim, depth, num_groups)
        self.class_head = nn.Conv2d(embed_dim, num_classes * per_cell, 3, padding=1)
        self.box_head = nn.Conv2d(embed_dim, box_channels * per_cell, 3, padding=1)
        self.scales = nn.ParameterList([torch.ones(()) for _ in strides]) if learned_scales else [1.0] * len(strides)
        start_small(self.class_head, bias=-math.log(99))  # a probability of 0.01
        start_small(self.box_head)

    def forward(self, maps: Sequence[Tensor], images: Images, objects: Objects, draws: Draws) -> Auxiliary:
        """Losses, and the anchors; nothing is drawn."""
        check_levels(maps, len(self.anchors.strides), self.name)
        shapes = shapes_of(maps)
        anchors = self.anchors(shapes, objects.boxes_xyxy)
        predictions = self.predict(maps)
        assigned = self.reassign(self.assign(anchors, shapes, images, objects), predictions, anchors, shapes, objects)
        losses = self.losses_of(predictions, anchors, assigned, objects)
        # anchors in the padding are boxes without a size there, and may fill up the queries, as officially
        shown = torch.where(assigned[..., None] == OUTSIDE, 0.0, anchors)
        return Auxiliary(losses, Candidates(shown, tokens_of(maps), assigned, assigned != IGNORED))

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], images: Images) -> list[Detections]:
        """The best boxes of each image; those of cells in the padding take no part."""
        check_levels(maps, len(self.anchors.strides), self.name)
        predictions, shapes = self.predict(maps), shapes_of(maps)
        boxes = self.decode(self.anchors(shapes, predictions.logits).expand(len(images), -1, -1), predictions.steps)
        scores, factors = self.scores(predictions)
        found = []
        for image, sizes in enumerate(zip(images.sizes, images.original_sizes, strict=True)):
            inside, counts = self.anchors.inside(shapes, sizes[0], boxes.device)
            own = None if factors is None else factors[image, inside]
            found.append(self.selection(scores[image, inside], boxes[image, inside], counts, *sizes, own))
        return found

    def predict(self, maps: Sequence[Tensor]) -> DensePredictions:
        """What the head says of the anchors of all levels."""
        return self.predict_levels(maps, None)

    def predict_levels(self, maps: Sequence[Tensor], quality_head: nn.Conv2d | None) -> DensePredictions:
        """The same, with the convolution after the tower of the boxes that says the quality."""
        logits, steps, quality = [], [], []
        for one, scale in zip(maps, self.scales, strict=True):
            hidden = self.box_tower(one)
            logits.append(full_precision(by_anchor(self.class_head(self.class_tower(one)), self.num_classes)))
            steps.append(full_precision(by_anchor(self.box_head(hidden), self.box_channels)) * scale)
            if quality_head is not None:
                quality.append(full_precision(by_anchor(quality_head(hidden), 1)))
        return DensePredictions(
            torch.cat(logits, 1), torch.cat(steps, 1), torch.cat(quality, 1)[..., 0] if quality else None
        )

    @torch.no_grad()
    def assign(self, anchors: Tensor, shapes: Sequence[Size], images: Images, objects: Objects) -> Tensor:
        """(B, N) the objects' indices, ``BACKGROUND``, ``IGNORED``, or ``OUTSIDE`` for cells in the padding."""
        assigned = []
        for image, size in enumerate(images.sizes):
            inside, counts = self.anchors.inside(shapes, size, anchors.device)
            own = self.assign_one(anchors[inside], counts, objects.boxes_of(image))
            assigned.append(own.new_full((len(anchors),), OUTSIDE).scatter(0, inside, own))
        return torch.stack(assigned)

    def reassign(
        self, assigned: Tensor, predictions: DensePredictions, anchors: Tensor, shapes: Sequence[Size], objects: Objects
    ) -> Tensor:
        """(B, N) what ``assign`` gave, in the light of the predictions; most heads leave it at that."""
        return assigned

    def scores(self, predictions: DensePredictions) -> tuple[Tensor, Tensor | None]:
        """(B, N, K) scores of detections, and (B, N) factors of them, if any (FCOS, arXiv 1904.01355, 3.3)."""
        return predictions.logits.sigmoid(), None if predictions.quality is None else predictions.quality.sigmoid()

    def assign_one(self, anchors: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(N, 4) anchors of one image, level by level, and its objects (n, 4) -> (N,)."""
        raise NotImplementedError

    def decode(self, anchors: Tensor, steps: Tensor) -> Tensor:
        """(..., 4) anchors and (..., X) steps -> (..., 4) boxes, corners in pixels."""
        raise NotImplementedError

    def losses_of(
        self, predictions: DensePredictions, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        """The losses by name, from (N, 4) anchors and (B, N) what they are assigned to."""
        raise NotImplementedError


class Pairs(NamedTuple):
    """Positive anchors and their objects, of all images in a row.

    Attributes:
        place: the indices (P,) of the images and (P,) of the anchors, to take predictions with.
        anchors: (P, 4)
        boxes_xyxy: (P, 4) of the objects.
        labels: (P,) of the objects.
    """

    place: tuple[Tensor, Tensor]
    anchors: Tensor
    boxes_xyxy: Tensor
    labels: Tensor


def pairs_of(assigned: Tensor, anchors: Tensor, objects: Objects) -> Pairs:
    """The positive ones of anchors (N, 4), by what they are assigned to (B, N); how many is asked of the device."""
    image, index = (assigned >= 0).nonzero(as_tuple=True)
    number = assigned[image, index]
    return Pairs((image, index), anchors[index], objects.boxes_xyxy[image, number], objects.labels[image, number])


def counted(values: Tensor, assigned: Tensor) -> Tensor:
    """The sum of values (B, N), without those of ignored anchors and of those in the padding."""
    return torch.where(assigned > IGNORED, values, 0.0).sum()


def positives_of(assigned: Tensor, like: Tensor) -> Tensor:
    """How many anchors are positive, of each image 1 at least (mmdet)."""
    return (assigned >= 0).sum(1).clamp(min=1).sum().to(like.dtype)
