"""The values that travel between the parts of auxiliary heads.

Axes: B batch, N anchors of all levels or regions of an image, M chosen ones, T objects (padded to the fullest image),
C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.blocks.boxes import to_xyxy
from detfamily.structures import Images, Size, Targets

BACKGROUND = -1
"""In the place of an object's index: none."""

IGNORED = -2
"""In the place of an object's index: takes no part in the losses."""

OUTSIDE = -3
"""The same, as it lies in the padding."""


def extents(images: Images, like: Tensor) -> Tensor:
    """(B, 4) width, height, width, height of each image inside the padding, in pixels."""
    rows = [(width, height, width, height) for height, width in images.sizes]
    return torch.tensor(rows, dtype=like.dtype).to(like.device, non_blocking=True)


@dataclass(frozen=True)
class Objects:
    """The objects of a batch in pixels, and behind them a slot that stands for none.

    Attributes:
        boxes_xyxy: (B, T + 1, 4); half of the image in the slots without an object, so that no arithmetic degenerates.
        labels: (B, T + 1) int64, 0 in the slots without an object.
        counts: the number of objects of each image, on the host.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, images: Images, targets: Targets) -> Objects:
        """The objects of a batch.

        Raises:
            ValueError: images and targets differ in number.
        """
        if len(images) != len(targets):
            raise ValueError(f"{len(targets)} images have targets, of {len(images)} in the batch: expected one each")
        boxes = F.pad(targets.boxes, (0, 0, 0, 1), value=0.5) * extents(images, targets.boxes)[:, None]
        return cls(to_xyxy(boxes), F.pad(targets.labels, (0, 1)), targets.counts)

    def boxes_of(self, image: int) -> Tensor:
        """(n, 4) corners of one image's objects."""
        return self.boxes_xyxy[image, : self.counts[image]]

    def at(self, assigned: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) indices of objects, negative for none, to their boxes (B, S, 4) and labels (B, S)."""
        slot = torch.where(assigned < 0, self.labels.shape[1] - 1, assigned)
        return self.boxes_xyxy.gather(1, slot[..., None].expand(*slot.shape, 4)), self.labels.gather(1, slot)


@dataclass(frozen=True)
class Candidates:
    """All that a head told apart: what the positives are chosen from.

    Attributes:
        boxes_xyxy: (B, N, 4) anchors or regions, in pixels.
        features: (B, N / A, C) what the head read there, the same for A neighbours.
        assigned: (B, N) int64 the index of the object that each answers for; negative for none.
        usable: (B, N) bool, False in slots that hold nothing.
    """

    boxes_xyxy: Tensor
    features: Tensor
    assigned: Tensor
    usable: Tensor


@dataclass(frozen=True)
class Positives:
    """Boxes that a head takes for positive, filled up with negative ones: queries whose objects are known.

    Attributes:
        boxes: (B, M, 4) cx, cy, w, h over the un-padded image, without a gradient; anchors may reach beyond it.
        features: (B, M, C) what the head read there, with a gradient.
        index: (B, M) int64 the place of each among the head's candidates.
        target_boxes: (B, M, 4) cx, cy, w, h of the object each answers for; anything where there is none.
        labels: (B, M) int64 of that object; anything where there is none.
        matched: (B, M) bool, True where there is an object.
        counted: (B, M) bool, False where an image had too few candidates to fill the slot.
    """

    boxes: Tensor
    features: Tensor
    index: Tensor
    target_boxes: Tensor
    labels: Tensor
    matched: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Auxiliary:
    """What a head gives in training.

    Attributes:
        losses: unweighted scalars with a gradient, named as those of the criterion, with the part before them where
            there are several: "giou", "rpn/class".
        candidates: what ``PositiveQueries`` chooses from.
    """

    losses: dict[str, Tensor]
    candidates: Candidates


def shapes_of(maps: Sequence[Tensor]) -> list[Size]:
    """(h, w) of maps (B, C, h, w)."""
    return [(one.shape[-2], one.shape[-1]) for one in maps]


def tokens_of(maps: Sequence[Tensor]) -> Tensor:
    """(B, C, h, w) of each level to (B, N, C), level by level, row by row."""
    return torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)


def check_levels(maps: Sequence[Tensor], levels: int, head: str) -> None:
    """Refuse maps that the head has no anchors for.

    Raises:
        ValueError: there are more or fewer maps than levels.
    """
    if len(maps) != levels:
        raise ValueError(
            f"{head} got {len(maps)} maps and has {levels} strides: give one stride for each level of the encoder and "
            "one for the level below it"
        )
