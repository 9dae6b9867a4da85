from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from detfamily.criterion import Normalizer
from detfamily.criterion.losses import FocalClassLoss, QualityFocalClassLoss
from detfamily.criterion.matcher import Assignment
from detfamily.criterion.rules import Collaborative, Hungarian, Known
from detfamily.structures import Given, Predictions, Targets


def test_normalizer_counts_objects_per_process_and_one_at_least() -> None:
    counts = torch.tensor([3.0, 0.0, 12.0, 1.0])
    assert float(Normalizer(counts).num_boxes()) == 16
    assert float(Normalizer(counts, world_size=4).num_boxes()) == 4
    assert float(Normalizer(torch.zeros(2)).num_boxes()) == 1
    assert float(Normalizer(torch.tensor([1.0]), world_size=4).num_boxes()) == 1


def ten_queries(known: Given | None = None) -> Predictions:
    return Predictions(torch.zeros(1, 4, 10, 3), torch.zeros(1, 4, 10, 4), known)


def copies(groups: int, limit: int = 1000) -> Given:
    """In 10 slots of 4 images: 3 are matched in each, and 5 take part."""
    matched = (torch.arange(10) < 3).expand(4, -1)
    counted = (torch.arange(10) < 5).expand(4, -1)
    targets = Targets(torch.zeros(4, 10, dtype=torch.int64), torch.rand(4, 10, 4), (3,) * 4, (0, 1, 2, 3))
    return Given(targets, matched, counted, groups, limit)


def test_normalizer_knows_how_many_queries_will_be_matched() -> None:
    counts = torch.tensor([3.0, 0.0, 12.0, 1.0])  # of 10 queries each: 3, 0, all 10, 1
    matched, unmatched = Normalizer(counts).num_matched(ten_queries())
    assert (float(matched), float(unmatched)) == (14, 26)
    matched, unmatched = Normalizer(counts, world_size=2).num_matched(ten_queries())
    assert (float(matched), float(unmatched)) == (7, 13)


def of_copies(normalizer: Normalizer, said: Predictions) -> Normalizer:
    return Known().normalizer(normalizer, said)


def test_copies_are_counted_as_often_as_they_answer() -> None:
    counts = torch.tensor([3.0, 0.0, 12.0, 1.0])
    plain = Normalizer(counts, world_size=2)
    said = ten_queries(copies(5))
    assert float(of_copies(plain, said).num_boxes()) == 5 * 16 / 2
    assert float(of_copies(Normalizer(torch.zeros(2)), said).num_boxes()) == 5  # one object at least
    matched, unmatched = of_copies(plain, said).num_matched(said)
    assert (float(matched), float(unmatched)) == (40, 4 * 2)
    assert torch.equal(plain.counts, counts) and plain.copies == 1


def test_objects_that_have_no_copies_do_not_count_and_the_batch_at_hand_does_not_matter() -> None:
    """Images of other processes may have more objects than the slots here."""
    normalizer = Normalizer(torch.tensor([3.0, 0.0, 12.0, 1.0, 300.0]))
    assert float(of_copies(normalizer, ten_queries(copies(2, limit=1000))).num_boxes()) == 2 * 316
    assert float(of_copies(normalizer, ten_queries(copies(2, limit=11))).num_boxes()) == 2 * (3 + 11 + 1 + 11)


def test_repeated_objects_are_counted_as_often() -> None:
    counts = torch.tensor([3.0, 0.0, 12.0, 1.0])
    plain = Normalizer(counts, world_size=2)
    assert Hungarian().normalizer(plain, ten_queries()) is plain
    many = Hungarian(repeats=3).normalizer(plain, ten_queries())
    assert float(many.num_boxes()) == 3 * 16 / 2
    matched, unmatched = many.num_matched(ten_queries())  # of 10 queries each: 9, 0, all 10, 3
    assert (float(matched), float(unmatched)) == (22 / 2, 18 / 2)
    nothing = Hungarian(repeats=3).normalizer(Normalizer(torch.zeros(2)), ten_queries())
    assert float(nothing.num_boxes()) == 1  # officially the repeated lists are counted, and one at least
    few = Hungarian(repeats=3).normalizer(Normalizer(torch.tensor([1.0]), world_size=8), ten_queries())
    assert float(few.num_boxes()) == 1


def test_focal_loss_of_extreme_logits_is_finite_and_so_is_its_gradient() -> None:
    logits = torch.tensor([[[[-200.0], [200.0]]]], requires_grad=True)
    targets = Targets.from_lists([torch.tensor([0])], [torch.full((1, 4), 0.5)])
    matched = torch.ones(1, 1, 1, dtype=torch.bool)
    for query in (0, 1):
        assignment = Assignment(torch.full((1, 1, 1), query), matched)
        boxes = torch.full((1, 1, 2, 4), 0.5)
        loss = FocalClassLoss()(Predictions(logits, boxes), targets, assignment, Normalizer(torch.ones(1)))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()
        # the matched query at 200 and the other at -200 are right; the other way round both are wrong by 200
        assert float(loss.detach()) == pytest.approx((0.25 + 0.75) * 200 if query == 0 else 0.0)


def overlap(a: list[float], b: list[float]) -> float:
    sides = []
    for axis in (0, 1):
        low = max(a[axis] - a[axis + 2] / 2, b[axis] - b[axis + 2] / 2)
        high = min(a[axis] + a[axis + 2] / 2, b[axis] + b[axis + 2] / 2)
        sides.append(max(0.0, high - low))
    both = sides[0] * sides[1]
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def test_quality_focal_loss_is_that_of_a_loop_over_queries_and_classes() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    boxes = (0.2 + 0.5 * torch.rand(2, 2, 5, 4, dtype=torch.float64)).requires_grad_()
    targets = Targets.from_lists(
        [torch.tensor([2, 0]), torch.tensor([1])], [0.3 + 0.3 * torch.rand(n, 4, dtype=torch.float64) for n in (2, 1)]
    )
    query = torch.tensor([[[3, 1], [4, 0]], [[0, 2], [2, 0]]])
    matched = torch.tensor([[True, True], [True, False]]).expand(2, -1, -1)
    predictions = Predictions(logits, boxes)
    normalizer = Normalizer(torch.tensor([2.0, 1.0]))
    found = QualityFocalClassLoss(beta=1.5)(predictions, targets, Assignment(query, matched), normalizer)
    for layer in range(2):
        total = 0.0
        for image in range(2):
            for q in range(5):
                wanted = [0.0, 0.0, 0.0]
                for slot in range(2):
                    if matched[layer, image, slot] and query[layer, image, slot] == q:
                        quality = overlap(boxes[layer, image, q].tolist(), targets.boxes[image, slot].tolist())
                        wanted[int(targets.labels[image, slot])] = quality
                for column, goal in enumerate(wanted):
                    p = 1 / (1 + math.exp(-logits[layer, image, q, column].item()))
                    entropy = -(goal * math.log(p) + (1 - goal) * math.log(1 - p))
                    total += entropy * abs(goal - p) ** 1.5
        assert found[layer].item() == pytest.approx(total / 3, rel=1e-9)
    found.sum().backward()
    assert boxes.grad is None and logits.grad is not None and logits.grad.isfinite().all()


def test_positives_of_auxiliary_heads_are_divided_by_themselves() -> None:
    counts = torch.tensor([3.0, 0.0, 12.0, 1.0])
    for answered, divisor in ((7.5, 7.5), (0.0, 1.0)):
        given = replace(copies(1), answered=torch.tensor(answered), limit=None)
        assert float(Collaborative().normalizer(Normalizer(counts), ten_queries(given)).num_boxes()) == divisor
    assert Collaborative(lambda_1=0.5, lambda_2=3.0, num_layers=4).own_weight == 12.0
    assert Collaborative(lambda_1=0.5).weight == 0.5
