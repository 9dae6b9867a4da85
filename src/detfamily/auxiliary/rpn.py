"""Region proposal network: where objects of any class may be (Faster R-CNN, arXiv 1506.01497, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detfamily.auxiliary.anchors import Anchors, by_anchor
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.samplers import RandomSampler, Sample
from detfamily.auxiliary.structures import IGNORED, Objects, check_levels, extents, shapes_of
from detfamily.blocks.denoising import Draws
from detfamily.blocks.heads import full_precision
from detfamily.structures import Images, Size


class RPN(nn.Module):
    """A convolution on every level, and what it says of each anchor: whether it is an object, and the step to its box.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        anchors: factory of the levels' anchors.
        coder: of the steps.
        assigner: of anchors to objects.
        sampler: of the anchors that are trained.
        per_level: the best anchors of each level, which become boxes, in training.
        test_per_level: the same where the boxes are for detections.
        proposals: boxes of an image that are given on, at most.
        nms_iou: of two boxes of a level that overlap more, the better one is given on.

    Raises:
        ValueError: no boxes would be given on; nms_iou is not an overlap.
    """

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        anchors: Callable[..., Anchors],
        coder: DeltaCoder,
        assigner: MaxIoUAssigner,
        sampler: RandomSampler,
        per_level: int = 4000,
        proposals: int = 1000,
        nms_iou: float = 0.7,
        test_per_level: int = 1000,
    ) -> None:
        super().__init__()
        if min(per_level, test_per_level, proposals) < 1:
            raise ValueError(
                f"rpn.per_level={per_level}, rpn.test_per_level={test_per_level}, rpn.proposals={proposals}: expected "
                "1 or more boxes"
            )
        if not 0 < nms_iou <= 1:
            raise ValueError(f"rpn.nms_iou={nms_iou}: expected an overlap above 0 and up to 1")
        self.anchors = anchors(strides=strides)
        self.coder = coder
        self.assigner = assigner
        self.sampler = sampler
        self.per_level = per_level
        self.test_per_level = test_per_level
        self.proposals = proposals
        self.nms_iou = nms_iou
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.class_head = nn.Conv2d(embed_dim, self.anchors.per_cell, 1)
        self.box_head = nn.Conv2d(embed_dim, self.anchors.per_cell * 4, 1)
        for layer in (self.conv, self.class_head, self.box_head):
            start_small(layer)

    def forward(
        self, maps: Sequence[Tensor], images: Images, objects: Objects, draws: Draws
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses, and boxes to look at closer.

        Args:
            maps: (B, C, h, w) of each level.
            images: the batch.
            objects: of the batch.
            draws: for the sampler.

        Returns:
            Losses by name, divided by the sampled anchors; and for each image (P, 4) corners of boxes in it, in pixels,
            best first, without a gradient.

        Raises:
            ValueError: there is not a map for every level of the anchors.
        """
        check_levels(maps, len(self.anchors.strides), "rpn")
        shapes = shapes_of(maps)
        anchors = self.anchors(shapes, objects.boxes_xyxy)
        logits, deltas = self.predict(maps)
        sample = self.sample(anchors, shapes, images, objects, draws)
        losses = self._losses(logits, deltas, anchors, sample, objects)
        proposals = self.propose(logits, deltas, anchors, shapes, images, self.per_level)
        return losses, [one[:, :4] for one in proposals]

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], images: Images) -> list[Tensor]:
        """For each image (P, 4) corners of boxes in it, in pixels, best first, where there are no objects to learn.

        Raises:
            ValueError: there is not a map for every level of the anchors.
        """
        check_levels(maps, len(self.anchors.strides), "rpn")
        logits, deltas = self.predict(maps)
        shapes = shapes_of(maps)
        proposals = self.propose(logits, deltas, self.anchors(shapes, deltas), shapes, images, self.test_per_level)
        return [one[:, :4] for one in proposals]

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, N) and steps (B, N, 4) of the anchors."""
        hidden = [self.conv(one).relu() for one in maps]
        logits = torch.cat([by_anchor(self.class_head(one), 1) for one in hidden], 1)
        deltas = torch.cat([by_anchor(self.box_head(one), 4) for one in hidden], 1)
        return full_precision(logits[..., 0]), full_precision(deltas)

    @torch.no_grad()
    def sample(self, anchors: Tensor, shapes: Sequence[Size], images: Images, objects: Objects, draws: Draws) -> Sample:
        """The anchors (B, S) that are trained, of those whose cells lie in their image."""
        samples = []
        for image, size in enumerate(images.sizes):
            inside, _ = self.anchors.inside(shapes, size, anchors.device)
            assigned = self.assigner(anchors[inside], objects.boxes_of(image))
            everywhere = assigned.new_full((len(anchors),), IGNORED).scatter(0, inside, assigned)
            samples.append(self.sampler(everywhere, draws))
        return Sample.stack(samples)

    def _losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, sample: Sample, objects: Objects
    ) -> dict[str, Tensor]:
        positive = sample.positive
        of_kind = torch.stack([positive, sample.valid & ~positive]).sum(-1)
        divisor = of_kind.clamp(min=1).sum()
        logit, delta = logits.gather(1, sample.index), deltas.gather(1, _four(sample.index))
        wrong = F.binary_cross_entropy_with_logits(logit, positive.to(logit.dtype), reduction="none")
        boxes_xyxy, _ = objects.at(sample.assigned)
        far = (delta - self.coder.encode(anchors[sample.index], boxes_xyxy)).abs().sum(-1)
        return {
            "class": torch.where(sample.valid, wrong, 0.0).sum() / divisor,
            "l1": torch.where(positive, far, 0.0).sum() / divisor,
        }

    @torch.no_grad()
    def propose(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        shapes: Sequence[Size],
        images: Images,
        per_level: int,
    ) -> list[Tensor]:
        """The best boxes of each image, (P, 5) corners and score; anchors in the padding take part, as officially."""
        scores = logits.sigmoid()
        best, levels, start = [], [], 0
        for level, (height, width) in enumerate(shapes):
            count = height * width * self.anchors.per_cell
            top = scores[:, start : start + count].topk(min(per_level, count)).indices
            best.append(top + start)
            levels.append(torch.full_like(top[0], level))
            start += count
        index, level_of = torch.cat(best, 1), torch.cat(levels)
        boxes = self.coder.decode(anchors[index], deltas.gather(1, _four(index))).clamp(min=0)
        boxes = torch.minimum(boxes, extents(images, boxes)[:, None])
        proposals = []
        for own_boxes, own_scores in zip(boxes, scores.gather(1, index), strict=True):
            real = (own_boxes[:, 2:] > own_boxes[:, :2]).all(-1)
            own_boxes, own_scores = own_boxes[real], own_scores[real]
            kept = batched_nms(own_boxes, own_scores, level_of[real], self.nms_iou)[: self.proposals]
            proposals.append(torch.cat([own_boxes[kept], own_scores[kept, None]], 1))
        return proposals


def _four(index: Tensor) -> Tensor:
    """(B, S) -> (B, S, 4), to gather boxes with."""
    return index[..., None].expand(*index.shape, 4)
