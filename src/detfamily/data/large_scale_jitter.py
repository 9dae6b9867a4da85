"""Large-scale jittering: images from a tenth to twice the size, cut and padded to one square.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation" (arXiv 2012.07177,
section 3); sizes are rounded as in the training of Co-DETR (arXiv 2211.12860), mmdetection's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detfamily.data.transforms import Sample, checked_length, random_integer, resize, resize_and_crop
from detfamily.structures import Size

GREY = 114


def fitted_size(size: Size, side: int) -> Size:
    """The size of an image whose longer side becomes ``side``; both are rounded to the nearest pixel, at least one.

    Args:
        size: (height, width).
        side: of the square, pixels.

    Returns:
        (height, width).
    """
    ratio = side / max(size)
    height, width = (max(int(length * ratio + 0.5), 1) for length in size)
    return height, width


class LargeScaleJitter:
    """Resizes to fit a square of random size, and cuts out a region of at most ``side`` at a random place.

    Args:
        side: of the square that a scale of 1 fits, pixels; and the most that is cut out in either direction.
        scales: least and largest scale, drawn uniformly.
        min_side: objects of which less than this is left in width or height are dropped, pixels.

    Raises:
        ValueError: a side or a range that is none.
    """

    def __init__(self, side: int, scales: Sequence[float] = (0.1, 2.0), min_side: float = 0.01) -> None:
        if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
            raise ValueError(f"scales must be [least, largest] with 0 < least <= largest, not {list(scales)!r}")
        self.side = checked_length(side, "side")
        self.scales = (float(scales[0]), float(scales[1]))
        self.min_side = min_side

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        least, largest = self.scales
        scale = least + (largest - least) * torch.rand((), generator=rng).item()
        height, width = fitted_size(sample.size, max(int(self.side * scale), 1))
        cut_height, cut_width = min(height, self.side), min(width, self.side)
        top = random_integer(0, height - cut_height, rng)
        left = random_integer(0, width - cut_width, rng)
        sample = resize_and_crop(sample, (height, width), top, left, cut_height, cut_width)
        return sample.only(((sample.boxes[:, 2:] - sample.boxes[:, :2]) > self.min_side).all(dim=1))


class ResizeToFit:
    """Resizes so that the longer side has this length: the transform for testing.

    Args:
        side: pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = checked_length(side, "side")

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return resize(sample, fitted_size(sample.size, self.side))


class PadToSquare:
    """Pads at the bottom and the right with grey, which counts as a part of the image from then on.

    Boxes are normalised by the square, and no mask hides the padding: Co-DETR's ``with_attn_mask=False``. Detections
    come back in pixels of the image on disk if nothing has been cut off before.

    Args:
        side: of the square, pixels.
        value: of red, green and blue, 0 to 255.

    Raises:
        ValueError: a side or a value that is none; and when called, an image that is larger than the square.
    """

    def __init__(self, side: int, value: int = GREY) -> None:
        if not 0 <= value <= 255:
            raise ValueError(f"value must lie between 0 and 255, not {value!r}")
        self.side = checked_length(side, "side")
        self.value = value

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        height, width = sample.size
        if max(height, width) > self.side:
            raise ValueError(
                f"an image of {width}x{height} pixels does not fit a square of {self.side}: resize it first"
            )
        image = sample.image.new_full((self.side, self.side, 3), self.value).permute(2, 0, 1)
        image[:, :height, :width] = sample.image
        spanned = sample.canvas_size or sample.original_size
        return replace(
            sample,
            image=image,
            masks=None if sample.masks is None else _padded(sample.masks, self.side),
            canvas_size=(spanned[0] * self.side / height, spanned[1] * self.side / width),
        )


def on_canvas(image: Tensor, canvas_size: tuple[float, float]) -> Tensor:
    """An image as it is on disk, (3, H, W), padded so that it shows what boxes in 0 to 1 span (``Images``)."""
    height, width = (max(round(length), own) for length, own in zip(canvas_size, image.shape[1:], strict=True))
    canvas = image.new_full((3, height, width), GREY)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def _padded(masks: Tensor, side: int) -> Tensor:
    padded = masks.new_zeros(len(masks), side, side)
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return padded
