"""Augmentations: an image with its objects, and small classes that change both with an explicit random generator.

The rules and the arithmetic are those of DETR's published training (Carion et al., "End-to-End Object Detection with
Transformers", section A.4): ``configs/augmentation/detr.yaml`` puts the classes together. Images stay uint8; pixel
work is done by torchvision's kernels, which are fast when the colour of a pixel lies together in memory, so views that
lose this are packed again before a resize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from detfamily.data.masks import boxes_around
from detfamily.structures import Size


@dataclass(frozen=True)
class Sample:
    """One image with its objects.

    Attributes:
        image: (3, H, W) uint8 RGB, of any memory layout.
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels of ``image``.
        labels: (n,) int64 columns of the class head.
        area: (n,) float32 area of the objects in square pixels of ``image``.
        iscrowd: (n,) int64, 1 for a crowd region.
        image_id: the data set's id of the image.
        original_size: (height, width) of the image as stored on disk.
        masks: (n, H, W) bool, the pixels that show each object; None unless the transform of the data set wants them.
        canvas_size: (height, width) of ``image`` in pixels of the image on disk, where it was padded as a part of the
            image (``PadToSquare``); None where it was not, and ``original_size`` is what it shows.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    area: Tensor
    iscrowd: Tensor
    image_id: int
    original_size: Size
    masks: Tensor | None = None
    canvas_size: tuple[float, float] | None = None

    @property
    def size(self) -> Size:
        """(height, width) of the image as it is now."""
        return self.image.shape[1], self.image.shape[2]

    def only(self, keep: Tensor) -> Sample:
        """The same image with some of its objects: (n,) bool, or their indices."""
        if keep.dtype == torch.bool and keep.all():
            return self  # the common case; masks are large
        return replace(
            self,
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            area=self.area[keep],
            iscrowd=self.iscrowd[keep],
            masks=None if self.masks is None else self.masks[keep],
        )


Transform = Callable[[Sample, torch.Generator], Sample]
"""What every class below is; a transform draws only from the generator it is given, so that data are reproducible."""


def flip_horizontally(sample: Sample) -> Sample:
    """Mirror left and right."""
    width = sample.size[1]
    boxes = sample.boxes[:, [2, 1, 0, 3]] * _row(-1, 1, -1, 1) + _row(width, 0, width, 0)
    masks = None if sample.masks is None else sample.masks.flip(2)
    return replace(sample, image=kernels.horizontal_flip_image(sample.image), boxes=boxes, masks=masks)


def flip_vertically(sample: Sample) -> Sample:
    """Mirror top and bottom."""
    height = sample.size[0]
    boxes = sample.boxes[:, [0, 3, 2, 1]] * _row(1, -1, 1, -1) + _row(0, height, 0, height)
    masks = None if sample.masks is None else sample.masks.flip(1)
    return replace(sample, image=kernels.vertical_flip_image(sample.image), boxes=boxes, masks=masks)


def transpose(sample: Sample) -> Sample:
    """Mirror along the main diagonal: x and y change places."""
    masks = None if sample.masks is None else sample.masks.transpose(1, 2)
    return replace(sample, image=sample.image.transpose(1, 2), boxes=sample.boxes[:, [1, 0, 3, 2]], masks=masks)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cut out a region inside the image; objects of which nothing is left are dropped.

    Boxes are clamped to the region, or with masks drawn anew around what is left of these. The area of an object
    becomes that of its box.
    """
    masks = None if sample.masks is None else sample.masks[:, top : top + height, left : left + width]
    return _region(sample, masks, top, left, height, width)


def resize_and_crop(sample: Sample, size: Size, top: int, left: int, height: int, width: int) -> Sample:
    """``crop`` after ``resize`` to ``size``, without ever making masks of what is cut off: they can be very large."""
    resized = resize(replace(sample, masks=None), size)
    masks = None
    if sample.masks is not None:
        masks = _resized_masks(sample.masks, size, slice(top, top + height), slice(left, left + width))
    return _region(resized, masks, top, left, height, width)


def _region(sample: Sample, masks: Tensor | None, top: int, left: int, height: int, width: int) -> Sample:
    """The region of a sample, and masks that are cut out already."""
    if masks is None:
        boxes = sample.boxes - _row(left, top, left, top)
        boxes = torch.minimum(boxes, _row(width, height, width, height)).clamp(min=0)
    else:
        boxes = boxes_around(masks)
    sides = boxes[:, 2:] - boxes[:, :2]
    image = kernels.crop_image(sample.image, top, left, height, width)
    whole = replace(sample, image=image, boxes=boxes, area=sides[:, 0] * sides[:, 1], masks=masks)
    return whole.only((sides > 0).all(dim=1))


def resize(sample: Sample, size: Size) -> Sample:
    """To (height, width): pixels bilinear with antialias, masks to the nearest pixel.

    Boxes scale by the actual ratios, separately in x and y.
    """
    (old_height, old_width), (height, width) = sample.size, size
    if (old_height, old_width) == (height, width):
        return sample
    ratio_x, ratio_y = width / old_width, height / old_height
    return replace(
        sample,
        image=kernels.resize_image(_packed(sample.image), [height, width], antialias=True),
        boxes=sample.boxes * _row(ratio_x, ratio_y, ratio_x, ratio_y),
        area=sample.area * (ratio_x * ratio_y),
        masks=None if sample.masks is None else _resized_masks(sample.masks, size, slice(None), slice(None)),
    )


def _resized_masks(masks: Tensor, size: Size, top_to_bottom: slice, left_to_right: slice) -> Tensor:
    """A region of masks that are resized as a whole.

    Each pixel is the old one that its centre falls into, as with bilinear pixels; mmcv takes the corner instead.
    """
    rows, columns = (
        ((np.arange(new)[part] + 0.5) * (old / new)).astype(np.int64)
        for new, old, part in zip(size, masks.shape[1:], (top_to_bottom, left_to_right), strict=True)
    )
    return torch.from_numpy(masks.numpy().take(rows, axis=1).take(columns, axis=2))  # faster than torch's indexing


def resized_size(size: Size, short_side: int, max_size: int | None) -> Size:
    """DETR's rule: the short side becomes ``short_side``, or less where the long side would exceed ``max_size``.

    The rounding is the published one, integer for integer: the short side is rounded, the long side then truncated from
    it, so that it may end a pixel or two above ``max_size`` (1228x183 for 800 and 1333 becomes 1335x199).

    Args:
        size: (height, width).
        short_side: wanted length of the shorter side, pixels.
        max_size: limit of the longer side, pixels; None for no limit.

    Returns:
        (height, width).
    """
    height, width = size
    short, long = float(min(size)), float(max(size))
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(round(max_size * short / long), 1)
    if min(size) == short_side:
        return size
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


class Compose:
    """One transform after the other; an empty list changes nothing.

    Args:
        transforms: what to do, in order.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample


class RandomChoice:
    """One of several transforms, each equally likely.

    Args:
        transforms: what to choose from.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        if not transforms:
            raise ValueError("RandomChoice needs at least one transform to choose from")
        self.transforms = list(transforms)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return self.transforms[random_integer(0, len(self.transforms) - 1, rng)](sample, rng)


class RandomHorizontalFlip:
    """Mirrors left and right.

    Args:
        probability: how often.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = _checked_probability(probability)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return flip_horizontally(sample) if _happens(self.probability, rng) else sample


class RandomVerticalFlip:
    """Mirrors top and bottom.

    Args:
        probability: how often.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = _checked_probability(probability)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return flip_vertically(sample) if _happens(self.probability, rng) else sample


class RandomTranspose:
    """Exchanges x and y; with both flips, this gives the eight symmetries of a square.

    Args:
        probability: how often.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = _checked_probability(probability)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return transpose(sample) if _happens(self.probability, rng) else sample


class RandomChannelPermutation:
    """Shuffles red, green and blue, all six orders equally likely: for data in which colour means nothing.

    Args:
        probability: how often to shuffle at all.
    """

    def __init__(self, probability: float = 1.0) -> None:
        self.probability = _checked_probability(probability)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        if not _happens(self.probability, rng):
            return sample
        return replace(sample, image=sample.image[torch.randperm(3, generator=rng)])


class Resize:
    """Resizes to one scale (see ``resized_size``): the transform for testing.

    Args:
        short_side: length of the short side in pixels; None keeps it, except where ``max_size`` asks for less.
        max_size: limit of the long side in pixels, None for no limit.
    """

    def __init__(self, short_side: int | None = None, max_size: int | None = None) -> None:
        self.short_side = None if short_side is None else checked_length(short_side, "short_side")
        self.max_size = None if max_size is None else checked_length(max_size, "max_size")

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        short_side = min(sample.size) if self.short_side is None else self.short_side
        return resize(sample, resized_size(sample.size, short_side, self.max_size))


class RandomResize:
    """Resizes to one of several scales, each equally likely (see ``resized_size``).

    Args:
        short_sides: lengths of the short side in pixels to choose from.
        max_size: limit of the long side in pixels, None for no limit.
    """

    def __init__(self, short_sides: Sequence[int], max_size: int | None = None) -> None:
        if not isinstance(short_sides, Sequence) or isinstance(short_sides, str) or not short_sides:
            raise ValueError(f"short_sides must be a list of lengths in pixels, as in [480,512], not {short_sides!r}")
        self.sizes = [Resize(short_side, max_size) for short_side in short_sides]

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return self.sizes[random_integer(0, len(self.sizes) - 1, rng)](sample, rng)


class RandomSizeCrop:
    """Cuts out a region of random size at a random place; a side that is already below the range is left whole.

    Args:
        min_size: smallest width and height, pixels.
        max_size: largest width and height, pixels.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        if not 1 <= min_size <= max_size:
            raise ValueError(f"a crop needs 1 <= min_size <= max_size, not {min_size!r} and {max_size!r}")
        self.min_size = min_size
        self.max_size = max_size

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        image_height, image_width = sample.size
        width = random_integer(min(self.min_size, image_width), min(self.max_size, image_width), rng)
        height = random_integer(min(self.min_size, image_height), min(self.max_size, image_height), rng)
        top = random_integer(0, image_height - height, rng)
        left = random_integer(0, image_width - width, rng)
        return crop(sample, top, left, height, width)


def _row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _packed(image: Tensor) -> Tensor:
    """The image with the three values of a pixel side by side; unlike a strided view, this resizes at full speed."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _checked_probability(probability: float) -> float:
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability lies between 0 and 1, not {probability!r}")
    return probability


def checked_length(length: int, name: str) -> int:
    """The same length; ValueError if it is none."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{name} must be a length in pixels, a whole number of 1 or more, not {length!r}")
    return length


def _happens(probability: float, rng: torch.Generator) -> bool:
    return torch.rand((), generator=rng).item() < probability


def random_integer(low: int, high: int, rng: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng).item())
