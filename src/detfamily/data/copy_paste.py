"""Copy-paste: objects of another training image, put into this one (Ghiasi et al., arXiv 2012.07177, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from detfamily.data.masks import boxes_around, rectangles
from detfamily.data.transforms import Sample, Transform, random_integer


class CopyPaste:
    """Transforms two images alike and pastes some objects of the second into the first.

    How many is drawn uniformly from none to all, and which of them, too; pixels are replaced without blending, as in
    mmdetection, with which Co-DETR was trained (arXiv 2211.12860). Where samples have no masks, objects are rectangles.
    What the pasted objects cover of others is taken away from these: see ``paste``.

    It is the outermost transform of a training set, which gives it the second image.

    Args:
        transform: of each of the two; it ends in one size for all images.
        enabled: False transforms the first image, and pastes nothing.
        max_pasted: fewer objects than this are pasted.
        max_shift: pixels; an object stays if none of its box's edges moved farther by being covered.
        min_pixels: an object also stays if more than so many pixels of it still show.

    Raises:
        ValueError: a number that makes no sense; and when called, images of different sizes.
    """

    def __init__(
        self,
        transform: Transform,
        enabled: bool = True,
        max_pasted: int = 100,
        max_shift: float = 10.0,
        min_pixels: int = 300,
    ) -> None:
        if max_pasted < 2:
            raise ValueError(f"max_pasted={max_pasted} pastes nothing: 2 or more, or copy_paste=false")
        self.transform = transform
        self.enabled = enabled
        self.max_pasted = max_pasted
        self.max_shift = max_shift
        self.min_pixels = min_pixels

    def __call__(self, sample: Sample, rng: torch.Generator, another: Callable[[torch.Generator], Sample]) -> Sample:
        """A new sample.

        Args:
            sample: as it is on disk.
            rng: decides everything.
            another: draws another image of the data set, as it is on disk.
        """
        sample = self.transform(sample, rng)
        if not self.enabled:
            return sample
        other = self.transform(another(rng), rng)
        if other.size != sample.size:
            raise ValueError(
                f"copy-paste needs images of one size, not {sample.size} and {other.size}: let its transform end with "
                "PadToSquare"
            )
        number = random_integer(0, min(len(other.labels), self.max_pasted - 1), rng)
        chosen = torch.randperm(len(other.labels), generator=rng)[:number]
        return paste(sample, other.only(chosen), self.max_shift, self.min_pixels)

    def most_objects(self, most: int) -> int:
        """Objects of the fullest sample, if images of the data set have at most ``most``."""
        return most + min(most, self.max_pasted - 1) * self.enabled


def paste(sample: Sample, pasted: Sample, max_shift: float, min_pixels: int) -> Sample:
    """Put all objects of one sample over those of another of the same size.

    The boxes of objects that are partly covered are drawn anew around what still shows. They are dropped if nothing
    does, or little (at most ``min_pixels``) of an object of which an edge has moved by more than ``max_shift`` pixels.

    Args:
        sample: what is pasted into.
        pasted: its objects are pasted, its pixels elsewhere are not used.
        max_shift: pixels.
        min_pixels: pixels.

    Returns:
        The objects of ``sample`` that are left, then those of ``pasted``; without masks, which have served.
    """
    if not len(pasted.labels):
        return replace(sample, masks=None)
    cover = _any(_masks(pasted), 0)
    below = _uncovered(sample, cover, max_shift, min_pixels)
    return replace(
        below,
        image=torch.where(cover, pasted.image, sample.image),
        boxes=torch.cat([below.boxes, pasted.boxes]),
        labels=torch.cat([below.labels, pasted.labels]),
        area=torch.cat([below.area, pasted.area]),
        iscrowd=torch.cat([below.iscrowd, pasted.iscrowd]),
    )


def _uncovered(sample: Sample, cover: Tensor, max_shift: float, min_pixels: int) -> Sample:
    """The objects that still show where (H, W) ``cover`` is True, with boxes around what does."""
    masks = _masks(sample)
    touched = _any(masks & cover, (1, 2))
    after, old = masks[touched] & ~cover, sample.boxes[touched]
    found = boxes_around(after)
    new = torch.cat([torch.maximum(found, old)[:, :2], torch.minimum(found, old)[:, 2:]], dim=1)
    # many times faster than torch's sum
    visible = torch.from_numpy(np.count_nonzero(after.numpy(), axis=(1, 2)))
    stays, boxes, area = torch.ones_like(touched), sample.boxes.clone(), sample.area.clone()
    stays[touched] = (visible > 0) & (((new - old).abs().amax(1) <= max_shift) | (visible > min_pixels))
    boxes[touched], area[touched] = new, (new[:, 2:] - new[:, :2]).prod(1)
    return replace(sample, boxes=boxes, area=area, masks=None).only(stays)


def _masks(sample: Sample) -> Tensor:
    return rectangles(sample.boxes, sample.size) if sample.masks is None else sample.masks


def _any(masks: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Many times faster than torch's own ``any``."""
    return masks.view(torch.uint8).amax(dim).bool()
