"""Augmentation for classification: what Swin and DAT train and test on ImageNet with, for ``Sample`` and its generator.

Flips and the like are those of ``detfamily.data.transforms``. Images stay uint8. Boxes, of which classification has no
use, are those of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as kernels

from detfamily.blocks.normalize import IMAGENET_MEAN, IMAGENET_STD
from detfamily.data.transforms import Sample

TRIES = 10
"""Times that a region is drawn before the largest one in the middle is taken."""


def with_image(sample: Sample, image: Tensor) -> Sample:
    """The sample with another picture, and a box around it."""
    return replace(sample, image=image, boxes=whole(image).expand(len(sample.labels), -1))


def whole(image: Tensor) -> Tensor:
    """(1, 4) the box of a whole image (3, H, W)."""
    height, width = image.shape[1:]
    return torch.tensor([[0, 0, width, height]], dtype=torch.float32)


class RandomResizedCrop:
    """A region of random area and shape, resized to a square with bicubic interpolation (arXiv 1409.4842, section 6).

    Args:
        size: side of the square, pixels.
        area: least and largest share of the image's area.
        ratio: least and largest width over height, drawn log-uniformly.

    Raises:
        ValueError: a range that is none.
    """

    def __init__(self, size: int, area: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)) -> None:
        for name, bounds in (("area", area), ("ratio", ratio)):
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"{name} must be [least, largest] with 0 < least <= largest, not {list(bounds)!r}")
        self.size = _checked(size, "size")
        self.area = (area[0], area[1])
        self.ratio = (ratio[0], ratio[1])

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        top, left, height, width = self._region(*sample.size, rng)
        return with_image(sample, _bicubic(sample.image[:, top : top + height, left : left + width], [self.size] * 2))

    def _region(self, height: int, width: int, rng: torch.Generator) -> tuple[int, int, int, int]:
        """top, left, height, width"""
        for _ in range(TRIES):
            area = height * width * _between(*self.area, rng)
            ratio = math.exp(_between(math.log(self.ratio[0]), math.log(self.ratio[1]), rng))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return _integer(height - h, rng), _integer(width - w, rng), h, w
        h = min(height, round(width / self.ratio[0]))
        w = min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w


class ResizeShortSide:
    """Resizes so that the short side has this length, with bicubic interpolation: Swin's way of testing.

    Args:
        length: pixels.
    """

    def __init__(self, length: int) -> None:
        self.length = _checked(length, "length")

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return with_image(sample, _bicubic(sample.image, [self.length]))


class Stretch:
    """Resizes to a square whatever the shape, with bicubic interpolation: DAT's way of testing.

    Args:
        size: side of the square, pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = _checked(size, "size")

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return with_image(sample, _bicubic(sample.image, [self.size] * 2))


class CenterCrop:
    """The square in the middle; black where the image is smaller.

    Args:
        size: side of the square, pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = _checked(size, "size")

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        return with_image(sample, kernels.center_crop(sample.image, [self.size] * 2))


class RandAugment:
    """Random operations one after another, as torchvision has them (arXiv 1909.13719).

    The published recipes use those of timm ("rand-m9-mstd0.5-inc1"), whose strengths vary a little around the same
    magnitude and which are left out half of the time.

    Args:
        operations: how many on each image.
        magnitude: their strength, 0 to 30.
    """

    def __init__(self, operations: int = 2, magnitude: int = 9) -> None:
        if operations < 1 or not 0 <= magnitude <= 30:
            raise ValueError(f"operations={operations}, magnitude={magnitude}: expected 1 or more, and 0 to 30")
        fill = [255 * one for one in IMAGENET_MEAN]
        self._apply = v2.RandAugment(operations, magnitude, interpolation=InterpolationMode.BILINEAR, fill=fill)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        seed = _integer(2**62, rng)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            return with_image(sample, self._apply(sample.image.contiguous()))


class RandomErasing:
    """Fills a random box with noise (arXiv 1708.04896), of ImageNet's mean and deviation.

    Args:
        probability: how often.
        area: least and largest share of the image's area.
        ratio: least and largest height over width, drawn log-uniformly.
    """

    def __init__(
        self, probability: float = 0.25, area: Sequence[float] = (0.02, 1 / 3), ratio: Sequence[float] = (0.3, 10 / 3)
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"a probability lies between 0 and 1, not {probability!r}")
        for name, bounds in (("area", area), ("ratio", ratio)):
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"{name} must be [least, largest] with 0 < least <= largest, not {list(bounds)!r}")
        self.probability = probability
        self.area = (area[0], area[1])
        self.ratio = (ratio[0], ratio[1])

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        if torch.rand((), generator=rng).item() >= self.probability:
            return sample
        height, width = sample.size
        for _ in range(TRIES):
            area = height * width * _between(*self.area, rng)
            ratio = math.exp(_between(math.log(self.ratio[0]), math.log(self.ratio[1]), rng))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = _integer(height - h, rng), _integer(width - w, rng)
                image = sample.image.clone()
                image[:, top : top + h, left : left + w] = _noise(h, w, rng)
                return with_image(sample, image)
        return sample


def _noise(height: int, width: int, rng: torch.Generator) -> Tensor:
    """(3, height, width) uint8; as it is uint8, noise beyond black and white is cut off."""
    mean, std = (torch.tensor(one)[:, None, None] for one in (IMAGENET_MEAN, IMAGENET_STD))
    noise = mean + std * torch.randn(3, height, width, generator=rng)
    return (255 * noise).round().clamp(0, 255).to(torch.uint8)


def _bicubic(image: Tensor, size: list[int]) -> Tensor:
    packed = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # resizes at full speed, unlike a strided view
    return kernels.resize(packed, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


def _checked(length: int, name: str) -> int:
    if length < 1:
        raise ValueError(f"{name}={length}: expected 1 pixel or more")
    return length


def _between(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64).item()


def _integer(high: int, rng: torch.Generator) -> int:
    """A whole number from 0 to high, both included."""
    return int(torch.randint(high + 1, (), generator=rng).item())
