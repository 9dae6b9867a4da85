"""Faster R-CNN (arXiv 1506.01497) as an auxiliary head: proposals, then what is in them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detfamily.auxiliary.positives import PositiveQueries
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.structures import Auxiliary, Objects
from detfamily.blocks.denoising import Draws
from detfamily.structures import Images, Targets


class FasterRCNN(nn.Module):
    """Proposals from all maps, regions from all but the coarsest ones, positives from the sampled regions.

    Args:
        rpn: gives proposals.
        roi: looks at them.
        queries: chooses the positive ones.

    Raises:
        ValueError: the levels of ``roi`` are not the finest ones of ``rpn``.
    """

    def __init__(self, rpn: RPN, roi: RoIHead, queries: PositiveQueries) -> None:
        super().__init__()
        levels = rpn.anchors.strides
        if roi.strides != levels[: len(roi.strides)]:
            raise ValueError(f"roi.strides={[*roi.strides]}: expected the first ones of the anchors', {[*levels]}")
        self.rpn = rpn
        self.roi = roi
        self.queries = queries

    def forward(self, maps: Sequence[Tensor], images: Images, targets: Targets, draws: Draws) -> Auxiliary:
        """Losses "rpn/class", "rpn/l1", "roi/class" and "roi/giou", and positive regions.

        Args:
            maps: (B, C, h, w) of each level, finest first.
            images: the batch.
            targets: its objects.
            draws: where the random numbers of sampling come from.

        Raises:
            ValueError: there is not a map for every level, or not a target for every image.
        """
        objects = Objects.of(images, targets)
        rpn, proposals = self.rpn(maps, images, objects, draws)
        roi, candidates = self.roi(maps, proposals, objects, draws)
        losses = {f"rpn/{name}": loss for name, loss in rpn.items()}
        losses |= {f"roi/{name}": loss for name, loss in roi.items()}
        return Auxiliary(losses, self.queries(candidates, objects, images, draws))
