"""What is in the proposed regions (Fast R-CNN, arXiv 1504.08083; their levels as in FPN, arXiv 1612.03144, 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, roi_align

from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.samplers import RandomSampler, Sample
from detfamily.auxiliary.structures import Candidates, Objects
from detfamily.blocks.denoising import Draws
from detfamily.blocks.heads import SoftmaxClassHead, full_precision
from detfamily.structures import Detections, Images

_EPS = 1e-6


class RoIHead(nn.Module):
    """Reads a square of features from every region, and says its class and, for each class, the step to its box.

    Args:
        strides: pixels between neighbouring cells of the levels that regions are read from, finest first.
        embed_dim: channels C of the maps.
        num_classes: K; the logits have one more column, for the background.
        finest_scale: regions with sides of up to twice as many pixels are read from the finest level, and each further
            level has regions of twice the size.
        resolution: cells of a side of the square.
        hidden_dim: width of the two layers that follow.
        coder: of the steps.
        assigner: of regions to objects.
        sampler: of the regions that are trained.
        selection: of what is detected; the levels are one to it.
        scale: multiplies finest_scale, as it does the anchors' sizes.

    Raises:
        ValueError: there are no strides; finest_scale or scale is not above 0.
    """

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        finest_scale: float,
        resolution: int,
        hidden_dim: int,
        coder: DeltaCoder,
        assigner: MaxIoUAssigner,
        sampler: RandomSampler,
        selection: BestBoxes,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not strides or min(strides) < 1:
            raise ValueError(f"roi.strides={[*strides]}: expected pixels between cells of each level, 1 or more")
        if finest_scale <= 0 or scale <= 0:
            raise ValueError(f"roi.finest_scale={finest_scale}, roi.scale={scale}: expected numbers above 0")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.finest_scale = finest_scale * scale
        self.resolution = resolution
        self.coder = coder
        self.assigner = assigner
        self.sampler = sampler
        self.selection = selection
        self.shared = nn.ModuleList(
            [nn.Linear(embed_dim * resolution**2, hidden_dim), nn.Linear(hidden_dim, hidden_dim)]
        )
        self.class_head = SoftmaxClassHead(hidden_dim, num_classes)
        self.box_head = nn.Linear(hidden_dim, 4 * num_classes)
        for layer in self.shared:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        start_small(self.class_head)
        start_small(self.box_head, std=0.001)

    def forward(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], objects: Objects, draws: Draws
    ) -> tuple[dict[str, Tensor], Candidates]:
        """Losses, and the regions that they are about.

        Args:
            maps: (B, C, h, w) of each level, and possibly further ones, which are not read.
            proposals: (P, 4) corners of each image's regions, in pixels.
            objects: of the batch, which are regions, too.
            draws: for the sampler.

        Returns:
            Losses by name, divided by the sampled regions; and the sampled regions, with the mean of their features.
        """
        sample, regions = self.sample(proposals, objects, draws)
        pooled = self.pool(maps, regions)
        logits, deltas = self.predict(pooled)
        losses = self._losses(logits, deltas, regions, sample, objects)
        # images answer with as many regions as the one with the fewest has, as officially
        fewest = sample.valid.sum(1).min()
        usable = sample.valid & (torch.arange(regions.shape[1], device=regions.device) < fewest)
        return losses, Candidates(regions, pooled.mean((-2, -1)), sample.assigned, usable)

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], images: Images) -> list[Detections]:
        """The best boxes of each image.

        Args:
            maps: (B, C, h, w) of each level, and possibly further ones, which are not read.
            proposals: (P, 4) corners of each image's regions, in pixels.
            images: the batch.
        """
        counts = [len(own) for own in proposals]
        regions = torch.stack([F.pad(own, (0, 0, 0, max(counts) - len(own))) for own in proposals])
        logits, deltas = self.predict(self.pool(maps, regions))
        scores, boxes = logits.softmax(-1)[..., :-1], self.coder.decode(regions[:, :, None], deltas)
        rows = zip(scores, boxes, counts, images.sizes, images.original_sizes, strict=True)
        return [self.selection(s[:count], b[:count], [count], size, original) for s, b, count, size, original in rows]

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], objects: Objects, draws: Draws) -> tuple[Sample, Tensor]:
        """The sampled regions, and their corners (B, S, 4): out of each image's objects and its proposals, in a row."""
        samples, regions = [], []
        for image, own in enumerate(proposals):
            known = objects.boxes_of(image)
            itself = torch.arange(len(known), device=known.device)
            sample = self.sampler(torch.cat([itself, self.assigner(own, known)]), draws)
            samples.append(sample)
            # one row more, so that unused slots have something to point at even where there are no regions
            regions.append(F.pad(torch.cat([known, own]), (0, 0, 0, 1))[sample.index])
        return Sample.stack(samples), torch.stack(regions)

    def level_of(self, boxes_xyxy: Tensor) -> Tensor:
        """(..., 4) -> (...) int64, which map a region is read from."""
        scale = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(-1).sqrt()
        level = torch.log2(scale / self.finest_scale + _EPS).floor()
        return level.clamp(0, len(self.strides) - 1).long()

    def pool(self, maps: Sequence[Tensor], regions: Tensor) -> Tensor:
        """(B, S, 4) -> (B, S, C, r, r) features of regions, each from its level."""
        batch, slots = regions.shape[:2]
        image = torch.arange(batch, device=regions.device).repeat_interleave(slots)
        boxes = regions.flatten(0, 1)
        rois, level = torch.cat([image[:, None].to(boxes.dtype), boxes], 1), self.level_of(boxes)
        # RoIAlign has no 16-bit form everywhere
        first = full_precision(maps[0])
        pooled = first.new_zeros(batch * slots, first.shape[1], self.resolution, self.resolution)
        for index, stride in enumerate(self.strides):
            here = (level == index).nonzero()[:, 0]
            features = full_precision(maps[index])
            own = rois[here].to(features.dtype)
            pooled[here] = roi_align(features, own, self.resolution, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled.unflatten(0, (batch, slots))

    def predict(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, S, K + 1) and steps (B, S, K, 4) of regions."""
        hidden = pooled.flatten(2)
        for layer in self.shared:
            hidden = layer(hidden).relu()
        return full_precision(self.class_head(hidden)), full_precision(self.box_head(hidden).unflatten(-1, (-1, 4)))

    def _losses(
        self, logits: Tensor, deltas: Tensor, regions: Tensor, sample: Sample, objects: Objects
    ) -> dict[str, Tensor]:
        positive, divisor = sample.positive, sample.valid.sum().clamp(min=1)
        target_xyxy, labels = objects.at(sample.assigned)
        columns = torch.where(positive, labels, self.num_classes)
        wrong = F.cross_entropy(logits.transpose(1, 2), columns, reduction="none")
        delta = deltas[positive, labels[positive]]
        found_xyxy = self.coder.decode(regions[positive], delta)
        giou = generalized_box_iou_loss(found_xyxy, target_xyxy[positive], reduction="sum", eps=_EPS)
        return {"class": torch.where(sample.valid, wrong, 0.0).sum() / divisor, "giou": giou / divisor}
