"""The values that travel between the blocks: batches of images, targets, tokens, predictions, detections.

Axes, here and everywhere in the package: B batch, H W pixels, h w cells of a feature map, L levels, S tokens of all
levels, N queries or tokens, D decoder layers, C width, K columns of a class head, T targets (padded to the fullest
image), R 2 (point) or 4 (box).

Conventions: batch first; boxes are cx, cy, w, h in (0, 1) over the un-padded image unless a name ends in ``_logit``
(before the sigmoid) or ``_xyxy`` (corners, pixels); masks are True where something is hidden (padding).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Size = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True)
class Images:
    """A batch of images, padded at the bottom and the right to one size.

    Attributes:
        pixels: (B, 3, H, W) RGB, uint8 as the loader gives them or float.
        padding_mask: (B, H, W) bool, True at padding.
        sizes: (height, width) of each image inside the padding, in pixels of this batch.
        original_sizes: (height, width) of each image as stored on disk; detections are given in these pixels.
        image_ids: the data set's id of each image.
        canvas_sizes: (height, width) in original pixels of what the boxes' 0 to 1 spans: more than the original where
            padding counts as image (large-scale jittering); empty where it is ``original_sizes`` for all.
    """

    pixels: Tensor
    padding_mask: Tensor
    sizes: tuple[Size, ...]
    original_sizes: tuple[Size, ...]
    image_ids: tuple[int, ...]
    canvas_sizes: tuple[tuple[float, float], ...] = ()

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def padded(self) -> bool:
        """Whether any image is smaller than the batch; known on the host."""
        whole = tuple(self.pixels.shape[-2:])
        return any(size != whole for size in self.sizes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Images:
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            padding_mask=self.padding_mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Images:
        return replace(self, pixels=self.pixels.pin_memory(), padding_mask=self.padding_mask.pin_memory())


@dataclass(frozen=True)
class Targets:
    """The objects of a batch of images, padded to the fullest image.

    Attributes:
        labels: (B, T) int64, columns of the class head (see ``LabelMap``); 0 in the padding.
        boxes: (B, T, 4) float32 cx, cy, w, h in (0, 1); 0.5 in the padding, so that no arithmetic on it degenerates.
        counts: the number of objects of each image, on the host, so that nobody has to ask the device.
        image_ids: the data set's id of each image, for messages.
    """

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]
    image_ids: tuple[int, ...]

    @classmethod
    def from_lists(
        cls, labels: Sequence[Tensor], boxes: Sequence[Tensor], image_ids: Sequence[int] | None = None
    ) -> Targets:
        """Pad per-image labels (n,) and boxes (n, 4) into one batch."""
        counts = tuple(int(one.shape[0]) for one in labels)
        most = max(counts, default=0)
        device = boxes[0].device if boxes else None
        dtype = boxes[0].dtype if boxes else torch.float32
        padded_labels = torch.zeros(len(counts), most, dtype=torch.int64, device=device)
        padded_boxes = torch.full((len(counts), most, 4), 0.5, dtype=dtype, device=device)
        for index, count in enumerate(counts):
            padded_labels[index, :count] = labels[index]
            padded_boxes[index, :count] = boxes[index]
        ids = tuple(image_ids) if image_ids is not None else tuple(range(len(counts)))
        return cls(padded_labels, padded_boxes, counts, ids)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def valid(self) -> Tensor:
        """(B, T) bool, True where a target is real."""
        counts = torch.tensor(self.counts).to(self.labels.device, non_blocking=True)  # or it would wait for the device
        return torch.arange(self.labels.shape[1], device=self.labels.device)[None] < counts[:, None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return replace(
            self,
            labels=self.labels.to(device, non_blocking=non_blocking),
            boxes=self.boxes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Targets:
        return replace(self, labels=self.labels.pin_memory(), boxes=self.boxes.pin_memory())


@dataclass(frozen=True)
class Batch:
    """What a loader yields."""

    images: Images
    targets: Targets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(self.images.to(device, non_blocking), self.targets.to(device, non_blocking))

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.targets.pin_memory())


@dataclass(frozen=True)
class Grid:
    """The geometry of tokens that come from feature maps, finest level first, row by row.

    Attributes:
        shapes: (h, w) of each level, Python ints.
        padding_mask: (B, S) bool, True at padding; None where nothing is padded.
        valid_ratios: (B, L, 2) share of each level's width and height (in this order) that is image.
    """

    shapes: tuple[Size, ...]
    padding_mask: Tensor | None
    valid_ratios: Tensor


@dataclass(frozen=True)
class Tokens:
    """What an attention reads from or writes for: tokens of feature maps, or object queries.

    Attributes:
        content: (B, N, C) what is carried through the layers; the values of attention.
        pos: (B, N, C) added to content where queries and keys are compared, never to values; None adds nothing.
        reference_points: (B, N, R) where the token looks from, in (0, 1) over the un-padded image, or None.
        grid: the geometry of map tokens; None for object queries.
    """

    content: Tensor
    pos: Tensor | None = None
    reference_points: Tensor | None = None
    grid: Grid | None = None

    def with_pos(self) -> Tensor:
        """(B, N, C) content + pos."""
        return self.content if self.pos is None else self.content + self.pos


@dataclass(frozen=True)
class Queries(Tokens):
    """Object queries, possibly several groups of them side by side.

    Attributes:
        sine: (B, N, C) code of the place where a query looks, which some cross-attentions compare with the positions of
            the memory on its own, beside the content; None where no attention reads it.
        attention_mask: (N, N) bool, True where a query (row) may not look at another (column), or None.
        groups: name -> slice of the N queries; each group has its own rule of assignment in the criterion.
    """

    sine: Tensor | None = None
    attention_mask: Tensor | None = None
    groups: dict[str, slice] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """What the queries of a group are to answer, where that is known beforehand: noised copies of objects.

    Attributes:
        targets: with T = N, the object of every query; those of unused queries hold anything.
        matched: (B, N) bool, True where a query answers for an object.
        counted: (B, N) bool, True where a query takes part in the class loss; the others are no one's.
        copies: queries that answer for each object; losses are divided by it.
        limit: objects of an image that are answered for, at most: the same in all batches of a step; None: all.
        answered: () queries of a process that answer for an object, in the mean of all processes, where only the device
            knows them; losses are divided by that number instead.
    """

    targets: Targets
    matched: Tensor
    counted: Tensor
    copies: int = 1
    limit: int | None = None
    answered: Tensor | None = None


@dataclass(frozen=True)
class OwnLoss:
    """A loss that was computed where its predictions come from.

    Attributes:
        value: a scalar with a gradient, unweighted.
        weight: against the other losses of its kind.
    """

    value: Tensor
    weight: float


@dataclass(frozen=True)
class Predictions:
    """What one group of queries says, for all layers at once.

    Attributes:
        logits: (D, B, N, K).
        boxes: (D, B, N, 4) cx, cy, w, h in (0, 1).
        given: what they are to answer; None where that is decided by matching.
        losses: further ones by name ("rpn/class"), of the auxiliary head that the group belongs to.
    """

    logits: Tensor
    boxes: Tensor
    given: Given | None = None
    losses: Mapping[str, OwnLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class Detections:
    """What is found in one image.

    Attributes:
        scores: (N,) in (0, 1).
        labels: (N,) int64, columns of the class head.
        boxes_xyxy: (N, 4) pixels of the original image.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor

    def cpu(self) -> Detections:
        return Detections(self.scores.cpu(), self.labels.cpu(), self.boxes_xyxy.cpu())
