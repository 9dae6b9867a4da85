"""From a head's candidates to its positive queries (Co-DETR, arXiv 2211.12860, 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.auxiliary.structures import Candidates, Objects, Positives, extents
from detfamily.blocks.boxes import to_cxcywh
from detfamily.blocks.denoising import Draws
from detfamily.structures import Images


class PositiveQueries:
    """Chooses as many candidates in all images as the image with the most positives has, within bounds.

    Where an image has more, some are drawn; where it has fewer, negatives are drawn to fill up. How many it will be is
    asked of the device, once.

    Args:
        most: queries of an image, at most.
        least: queries of an image, at least.

    Raises:
        ValueError: the bounds are not in order.
    """

    def __init__(self, most: int = 300, least: int = 9) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"positives.least={least}, positives.most={most}: expected 1 or more, and most not below")
        self.most = most
        self.least = least

    def __call__(self, candidates: Candidates, objects: Objects, images: Images, draws: Draws) -> Positives:
        """The positive queries of a batch, in the order in which they were drawn, positives first."""
        matched = candidates.usable & (candidates.assigned >= 0)
        negative = candidates.usable & ~matched
        wanted = max(self.least, min(self.most, int(matched.sum(1).max())))
        rank = torch.where(matched, draws.uniform(matched), 1 + draws.uniform(negative)).masked_fill(
            ~candidates.usable, torch.inf
        )
        index = rank.topk(min(wanted, rank.shape[1]), largest=False).indices
        target_xyxy, labels = objects.at(candidates.assigned.gather(1, index))
        sharing = candidates.boxes_xyxy.shape[1] // candidates.features.shape[1]
        extent = extents(images, candidates.boxes_xyxy)[:, None]
        return Positives(
            boxes=to_cxcywh(_rows(candidates.boxes_xyxy.detach(), index) / extent),
            features=_rows(candidates.features, index // sharing),
            index=index,
            target_boxes=to_cxcywh(target_xyxy / extent),
            labels=labels,
            matched=matched.gather(1, index),
            counted=candidates.usable.gather(1, index),
        )


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """(B, N, X), (B, M) -> (B, M, X)"""
    return values.gather(1, index[..., None].expand(*index.shape, values.shape[-1]))
