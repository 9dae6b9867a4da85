"""PAA (arXiv 2007.08103) as an auxiliary head: anchors are positive where the head is already right about an object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.dense import DenseHead, DensePredictions, counted, pairs_of
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.losses import binary, focal, giou
from detfamily.auxiliary.mixture import low_and_high
from detfamily.auxiliary.quality import iou_of
from detfamily.auxiliary.structures import BACKGROUND, Objects
from detfamily.structures import Size

_EPS = torch.finfo(torch.float32).eps
_LEAST_WEIGHT = 1e-12


class PAA(DenseHead):
    """Classes, steps from anchors to boxes, and the overlap of these with the object.

    Anchors that overlap an object are candidates. Of every level, those of the least loss are kept; two normal
    distributions are fitted to their losses, and positive are those of the lower one, up to where the mixture is
    densest (figure 3 (c) of the paper, as in its code). All others are background.

    Queries are its positive anchors. Co-DETR reports PAA, too (table 7), without code: all is as in mmdet, where the
    losses are divided by what this process has.

    Args:
        strides: pixels between neighbouring cells of each map, finest first.
        embed_dim: channels C of the maps.
        num_classes: columns K.
        depth: convolutions of a tower, each with a norm and a ReLU.
        num_groups: groups of the norms.
        anchors: factory of the levels' anchors, one at a cell.
        coder: of the steps.
        assigner: of anchors to the objects that they are candidates of.
        weights: of the losses "class", "giou" and "iou"; the first two also weigh the losses of candidates.
        selection: of what the head detects on its own.
        per_level: candidates of each object in each level, at most.
        alpha: of the focal loss: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: of the focal loss: focusing power.

    Raises:
        ValueError: as ``DenseHead``; there would be no candidates.
    """

    name: ClassVar[str] = "paa"
    losses: ClassVar[tuple[str, ...]] = ("class", "giou", "iou")

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        depth: int,
        num_groups: int,
        anchors: Callable[..., Anchors],
        coder: DeltaCoder,
        assigner: MaxIoUAssigner,
        weights: Mapping[str, float],
        selection: BestBoxes,
        per_level: int = 9,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(strides, embed_dim, num_classes, depth, num_groups, anchors, weights, selection)
        if per_level < 1:
            raise ValueError(f"paa.per_level={per_level}: expected 1 candidate or more in each level")
        self.coder = coder
        self.assigner = assigner
        self.per_level = per_level
        self.alpha = alpha
        self.gamma = gamma
        self.iou_head = nn.Conv2d(embed_dim, 1, 3, padding=1)
        start_small(self.iou_head)

    def predict(self, maps: Sequence[Tensor]) -> DensePredictions:
        """What the head says of the anchors of all levels."""
        return self.predict_levels(maps, self.iou_head)

    def scores(self, predictions: DensePredictions) -> tuple[Tensor, None]:
        """(B, N, K) geometric means of the class's probability and the overlap, and no factors."""
        assert predictions.quality is not None
        return (predictions.logits.sigmoid() * predictions.quality.sigmoid()[..., None]).sqrt(), None

    def assign_one(self, anchors: Tensor, level_counts: Sequence[int], objects_xyxy: Tensor) -> Tensor:
        """(N, 4), (n, 4) of one image -> (N,) the objects that anchors are candidates of"""
        return self.assigner(anchors, objects_xyxy)

    def decode(self, anchors: Tensor, steps: Tensor) -> Tensor:
        """(..., 4), (..., 4) -> (..., 4)"""
        return self.coder.decode(anchors, steps)

    @torch.no_grad()
    def reassign(
        self, assigned: Tensor, predictions: DensePredictions, anchors: Tensor, shapes: Sequence[Size], objects: Objects
    ) -> Tensor:
        """(B, N) what the assigner gave, where only positive candidates are left."""
        loss = self._candidate_losses(predictions, anchors, assigned, objects)
        of_levels = [height * width for height, width in shapes]
        kept = [self._least(loss[i], assigned[i], count, of_levels) for i, count in enumerate(objects.counts)]
        values, index = (torch.cat([one[part] for one in kept]) for part in (0, 1))
        values, order = values.sort(stable=True)
        positive, index = self._positive(values), index.gather(1, order)
        rows = [(image, number) for image, count in enumerate(objects.counts) for number in range(count)]
        image, number = torch.tensor(rows, dtype=torch.int64).view(-1, 2).to(index.device, non_blocking=True).T
        result = torch.where(assigned >= 0, BACKGROUND, assigned)
        result.view(-1)[(image[:, None] * len(anchors) + index)[positive]] = number[:, None].expand_as(index)[positive]
        return result

    def _candidate_losses(
        self, predictions: DensePredictions, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> Tensor:
        """(B, N) how wrong the head is about the object of each candidate; infinite for others."""
        pairs = pairs_of(assigned, anchors, objects)
        of_any = torch.ones_like(pairs.labels, dtype=torch.bool)
        wrong = focal(predictions.logits[pairs.place], of_any, pairs.labels, self.alpha, self.gamma)
        apart = giou(self.decode(pairs.anchors, predictions.steps[pairs.place]), pairs.boxes_xyxy)
        loss = self.weights["class"] * wrong + self.weights["giou"] * apart
        found = torch.full_like(predictions.logits[..., 0], torch.inf)
        found[pairs.place] = loss.to(found.dtype)
        return found

    def _least(self, loss: Tensor, assigned: Tensor, count: int, of_levels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(n, J) the least losses of each object of one image, from all levels, and (n, J) which anchors have them."""
        own = assigned == torch.arange(count, device=assigned.device)[:, None]
        values, index, start = [], [], 0
        for level in torch.where(own, loss, torch.inf).split(list(of_levels), 1):
            least = level.topk(min(self.per_level, level.shape[1]), largest=False)
            values.append(least.values)
            index.append(start + least.indices)
            start += level.shape[1]
        return torch.cat(values, 1), torch.cat(index, 1)

    def _positive(self, losses: Tensor) -> Tensor:
        """(G, J) bool, which of the losses of each object, in their order, are those of positive candidates."""
        valid = losses < torch.inf
        low, density = low_and_high(losses, valid)
        # with one candidate alone there is nothing to fit, and it is background, as officially
        low = low & valid & (valid.sum(1, keepdim=True) > 1)
        densest = torch.where(low, density, -torch.inf).argmax(1, keepdim=True)
        return low & (torch.arange(losses.shape[1], device=losses.device) <= densest)

    def losses_of(
        self, predictions: DensePredictions, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        """Losses "class", "giou" and "iou", the latter two of positive anchors."""
        assert predictions.quality is not None
        pairs = pairs_of(assigned, anchors, objects)
        boxes = self.decode(pairs.anchors, predictions.steps[pairs.place])
        overlap = iou_of(boxes, pairs.boxes_xyxy)
        apart = giou(boxes, pairs.boxes_xyxy) * overlap.clamp(min=_LEAST_WEIGHT)
        unsure = binary(predictions.quality[pairs.place], overlap).sum()
        wrong = focal(predictions.logits, assigned >= 0, objects.at(assigned)[1], self.alpha, self.gamma)
        return {
            "class": counted(wrong, assigned) / max(len(overlap), len(assigned)),
            "giou": apart.sum() / overlap.sum().clamp(min=_EPS),
            "iou": unsure / max(len(overlap), 1),
        }
