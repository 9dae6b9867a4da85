"""Faster R-CNN (arXiv 1506.01497) as an auxiliary head: proposals, then what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from detfamily.auxiliary.head import AuxiliaryHead
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.structures import Auxiliary, Objects
from detfamily.blocks.denoising import Draws
from detfamily.structures import Detections, Images


class FasterRCNN(AuxiliaryHead):
    """Proposals from all maps, regions from all but the coarsest one.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        rpn: factory of what gives proposals.
        roi: factory of what looks at them.
        weights: of the losses "rpn/class", "rpn/l1", "roi/class" and "roi/giou".

    Raises:
        ValueError: there are fewer than two maps; the weights are not those of the losses.
    """

    name: ClassVar[str] = "faster_rcnn"
    losses: ClassVar[tuple[str, ...]] = ("rpn/class", "rpn/l1", "roi/class", "roi/giou")

    def __init__(
        self,
        strides: Sequence[int],
        rpn: Callable[..., RPN],
        roi: Callable[..., RoIHead],
        weights: Mapping[str, float],
    ) -> None:
        super().__init__(weights)
        if len(strides) < 2:
            raise ValueError(
                f"faster_rcnn.strides={[*strides]}: expected those of 2 maps or more, as the last one is for proposals "
                "alone"
            )
        self.rpn = rpn(strides=strides)
        self.roi = roi(strides=strides[:-1])

    def forward(self, maps: Sequence[Tensor], images: Images, objects: Objects, draws: Draws) -> Auxiliary:
        """Losses "rpn/class", "rpn/l1", "roi/class" and "roi/giou", and the sampled regions."""
        rpn, proposals = self.rpn(maps, images, objects, draws)
        roi, candidates = self.roi(maps, proposals, objects, draws)
        losses = {f"rpn/{name}": loss for name, loss in rpn.items()}
        losses |= {f"roi/{name}": loss for name, loss in roi.items()}
        return Auxiliary(losses, candidates)

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], images: Images) -> list[Detections]:
        """The best boxes of each image."""
        return self.roi.detect(maps, self.rpn.detect(maps, images), images)
