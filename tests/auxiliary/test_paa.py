"""PAA's choice of positive anchors and its losses, against loops over objects and anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from detfamily.auxiliary import PAA
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.structures import BACKGROUND, OUTSIDE, Objects
from detfamily.blocks.denoising import Draws

from . import naive
from .checks import check_against_naive, scatter_weights
from .conftest import Batch
from .test_mixture import naive as naive_mixture

STDS = (0.1, 0.1, 0.2, 0.2)
SHAPES = [(6, 8), (3, 4)]


def small(per_level: int = 5, positive_iou: float = 0.1) -> PAA:
    head = PAA(
        [8, 16],
        embed_dim=8,
        num_classes=5,
        depth=1,
        num_groups=4,
        anchors=partial(Anchors, size=2, scales=1, ratios=(1.0,)),
        coder=DeltaCoder(STDS),
        assigner=MaxIoUAssigner(positive_iou, positive_iou, 1e-6),
        weights={"class": 1.0, "giou": 1.3, "iou": 0.5},
        selection=BestBoxes(0.5),
        per_level=per_level,
        alpha=0.3,
        gamma=1.5,
    )
    return scatter_weights(head)


def naive_positives(
    head: PAA, candidates: list[int], objects: Objects, image: int, logits: Tensor, boxes: list[list[Tensor]]
) -> list[int]:
    """The objects that anchors of one image answer for in the end."""
    assigned = [BACKGROUND if number >= 0 else number for number in candidates]
    for number in range(objects.counts[image]):
        label, target = int(objects.labels[image, number]), objects.boxes_xyxy[image, number]
        kept = []
        for level in (range(48), range(48, 60)):
            losses = [
                (
                    (
                        naive.focal(logits[i], label, 0.3, 1.5) + 1.3 * (1 - naive.iou_and_giou(boxes[i], target)[1])
                    ).item(),
                    i,
                )
                for i in level
                if candidates[i] == number
            ]
            kept += sorted(losses)[: head.per_level]
        kept.sort()
        if len(kept) < 2:
            continue
        low, density = naive_mixture([loss for loss, _ in kept], 100, 1e-3)
        densest = max((d, -place) for place, d in enumerate(density) if low[place])[1] if any(low) else 1
        for place, (_, index) in enumerate(kept):
            if low[place] and place <= -densest:
                assigned[index] = number
    return assigned


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_positives_and_losses(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    head, (maps, images, objects) = small(), batch(counts)
    anchors = head.anchors(SHAPES, objects.boxes_xyxy)
    candidates = head.assign(anchors, SHAPES, images, objects)
    predictions = head.predict(maps)
    assert predictions.quality is not None
    found = head(maps, images, objects, Draws())
    wrong = apart = unsure = torch.zeros((), dtype=torch.float64)
    positives, overlaps = 0, 0.0
    for image in range(2):
        boxes = [naive.step(*one, STDS) for one in zip(anchors, predictions.steps[image], strict=True)]
        assigned = naive_positives(head, candidates[image].tolist(), objects, image, predictions.logits[image], boxes)
        assert found.candidates.assigned[image].tolist() == assigned
        for index, number in enumerate(assigned):
            if number == OUTSIDE:
                continue
            label = int(objects.labels[image, number]) if number >= 0 else None
            wrong = wrong + naive.focal(predictions.logits[image, index], label, 0.3, 1.5)
            if number >= 0:
                iou, giou = naive.iou_and_giou(boxes[index], objects.boxes_xyxy[image, number])
                apart = apart + iou.item() * (1 - giou)
                unsure = unsure + naive.binary(predictions.quality[image, index], iou.item())
                positives, overlaps = positives + 1, overlaps + iou.item()
    wanted = {
        "class": wrong / max(positives, 2),
        "giou": apart / (overlaps or 1),
        "iou": unsure / max(positives, 1),
    }
    check_against_naive(found.losses, wanted, maps, head)
    before = sum(int((one >= 0).sum()) for one in candidates)
    assert (0 < positives < before) if sum(counts) else positives == before == 0


def test_an_object_with_one_candidate_has_no_positive_anchor(batch: Callable[..., Batch]) -> None:
    head, (maps, images, objects) = small(positive_iou=1.0), batch((1, 0))
    anchors = head.anchors(SHAPES, objects.boxes_xyxy)
    candidates = head.assign(anchors, SHAPES, images, objects)
    assert (candidates == 0).sum() == 1  # the one that overlaps most
    found = head(maps, images, objects, Draws())
    assert not (found.candidates.assigned >= 0).any()
    assert found.losses["giou"].item() == found.losses["iou"].item() == 0


def test_boxes_that_do_not_overlap_at_all(batch: Callable[..., Batch]) -> None:
    head, (maps, images, objects) = small(), batch()
    torch.nn.init.constant_(head.box_head.bias, 400.0)  # far away
    losses = head(maps, images, objects, Draws()).losses
    sum(losses.values(), torch.zeros(())).backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["iou"] > 0
    assert all(one.grad is not None and one.grad.isfinite().all() for one in (*maps, *head.parameters()))


def test_the_score_is_the_mean_of_class_and_overlap(batch: Callable[..., Batch]) -> None:
    head, (maps, _, _) = small(), batch()
    predictions = head.predict(maps)
    scores, factors = head.scores(predictions)
    assert predictions.quality is not None and factors is None
    p, q = (1 / (1 + math.exp(-one.item())) for one in (predictions.logits[1, 7, 2], predictions.quality[1, 7]))
    assert scores[1, 7, 2].item() == pytest.approx(math.sqrt(p * q))


def test_no_candidates() -> None:
    with pytest.raises(ValueError, match="paa.per_level=0"):
        small(0)
