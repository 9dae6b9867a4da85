"""From samples to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from detfamily.data.transforms import Sample
from detfamily.structures import Batch, Images, Size, Targets


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad the images at the bottom and the right to the largest height and width among them.

    Pixels stay uint8 and lie channels-last in memory, as decoders give them (any other order costs five times the
    copy); the padding is 0. Boxes become cx, cy, w, h in (0, 1) over each image without this padding.
    """
    sizes = tuple(sample.size for sample in samples)
    pixels, padding_mask = pad([sample.image for sample in samples])
    images = Images(
        pixels,
        padding_mask,
        sizes,
        tuple(sample.original_size for sample in samples),
        tuple(sample.image_id for sample in samples),
        tuple(sample.canvas_size or sample.original_size for sample in samples),
    )
    boxes = [normalized_cxcywh(sample.boxes, size) for sample, size in zip(samples, sizes, strict=True)]
    return Batch(images, Targets.from_lists([sample.labels for sample in samples], boxes, images.image_ids))


def pad(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put images (3, h, w) of one dtype into the top left corners of a batch.

    Returns:
        (B, 3, H, W) pixels, 0 in the padding; (B, H, W) bool, True at padding.
    """
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    pixels = torch.zeros(len(images), height, width, 3, dtype=images[0].dtype)
    padding_mask = torch.zeros(len(images), height, width, dtype=torch.bool)
    if get_worker_info() is not None:
        # While they are untouched zeros this is cheap; the loader would move them after filling, with a copy.
        pixels, padding_mask = pixels.share_memory_(), padding_mask.share_memory_()
    pixels = pixels.permute(0, 3, 1, 2)
    for index, image in enumerate(images):
        h, w = image.shape[1:]
        pixels[index, :, :h, :w] = image
        padding_mask[index, h:] = True
        padding_mask[index, :h, w:] = True
    return pixels, padding_mask


def normalized_cxcywh(boxes_xyxy: Tensor, size: Size) -> Tensor:
    """(n, 4) corners in pixels to cx, cy, w, h divided by the image's (height, width)."""
    height, width = size
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    boxes = torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)
    return boxes / torch.tensor((width, height, width, height), dtype=boxes.dtype)
