"""What is detected, against a loop over pairs of box and class."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from detfamily.auxiliary.detect import BestBoxes
from detfamily.structures import Images

from .checks import check_detections, detections, overlap

IMAGES = Images(torch.zeros(1, 3, 50, 60), torch.zeros(1, 50, 60), ((40, 60),), ((100, 90),), (0,))
COUNTS = [25, 9]


@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize(("per_level", "min_score"), [(None, 0.0), (20, 0.0), (60, 0.3)])
def test_the_best_pairs(of_class: bool, per_level: int | None, min_score: float) -> None:
    torch.manual_seed(0)
    scores, factors = torch.rand(34, 4, dtype=torch.float64), torch.rand(34, dtype=torch.float64)
    low = 80 * torch.rand(34, 4, 2, dtype=torch.float64) - 15  # some lie beyond the image
    boxes = torch.cat([low, low + 20 * torch.rand(34, 4, 2, dtype=torch.float64) + 5], -1)
    boxes = boxes if of_class else boxes[:, 0]
    levels = list(zip(*(one.split(COUNTS) for one in (scores, boxes, factors)), strict=True))
    select = BestBoxes(0.3, per_level, min_score, num_select=30)
    found = select(scores, boxes, COUNTS, (40, 60), (100, 90), factors)
    check_detections(found, detections(levels, IMAGES, 0, 0.3, per_level or 1000, 30, min_score))
    plain = [(s, b, torch.ones_like(f)) for s, b, f in levels]
    found = select(scores, boxes, COUNTS, (40, 60), (100, 90))
    check_detections(found, detections(plain, IMAGES, 0, 0.3, per_level or 1000, 30, min_score))


def test_boxes_around_have_a_vote() -> None:
    torch.manual_seed(0)
    scores, low = torch.rand(40, 2, dtype=torch.float64), 10 * torch.rand(40, 2, dtype=torch.float64)
    boxes = torch.cat([low, low + 15 + 5 * torch.rand(40, 2, dtype=torch.float64)], 1)
    plain, voted = (BestBoxes(0.5, 50, voting=one)(scores, boxes, [40], (40, 60), (80, 60)) for one in (None, 0.05))
    assert torch.equal(plain.scores, voted.scores) and torch.equal(plain.labels, voted.labels)
    passed = scores.flatten().topk(50).indices.tolist()  # the others are not compared
    for number, label in enumerate(plain.labels.tolist()):
        kept = (plain.boxes_xyxy[number] / torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist()
        total, votes = torch.zeros(4, dtype=torch.float64), 0.0
        for row, column in (divmod(one, 2) for one in passed):
            iou = overlap(kept, boxes[row].tolist())
            if column == label and iou > 0.01:
                vote = scores[row, column].item() * math.exp(-((1 - iou) ** 2) / 0.05)
                total, votes = total + vote * boxes[row], votes + vote
        torch.testing.assert_close(voted.boxes_xyxy[number], total / votes * torch.tensor([1.0, 2.0, 1.0, 2.0]))
    assert not torch.allclose(plain.boxes_xyxy, voted.boxes_xyxy)


def test_nothing_to_detect() -> None:
    found = BestBoxes(0.5)(torch.zeros(3, 2), torch.rand(3, 4), [3], (10, 10), (20, 20))
    assert found.boxes_xyxy.shape == (0, 4) and len(found.scores) == len(found.labels) == 0
    assert BestBoxes(0.5, voting=0.1)(torch.zeros(3, 2), torch.rand(3, 4), [3], (9, 9), (9, 9)).boxes_xyxy.shape == (
        0,
        4,
    )
    assert len(BestBoxes(0.5)(torch.rand(0, 2), torch.rand(0, 4), [0], (10, 10), (20, 20)).scores) == 0


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ((0.0, 10, 0.0, 5), "nms_iou=0.0"),
        ((0.5, 0, 0.0, 5), "per_level=0"),
        ((0.5, 10, 1.0, 5), "min_score=1.0"),
        ((0.5, 10, 0.0, 0), "num_select=0"),
        ((0.5, 10, 0.0, 5, 0.0), "voting=0.0"),
    ],
)
def test_numbers_out_of_range(numbers: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"selection.{named}"):
        BestBoxes(*numbers)
