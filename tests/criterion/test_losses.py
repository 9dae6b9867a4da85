from __future__ import annotations

import pytest
import torch

from detfamily.criterion import Normalizer
from detfamily.criterion.losses import FocalClassLoss
from detfamily.criterion.matcher import Assignment
from detfamily.structures import Predictions, Targets


def test_normalizer_counts_objects_per_process_and_one_at_least() -> None:
    counts = torch.tensor([3.0, 0.0, 12.0, 1.0])
    assert float(Normalizer(counts).num_boxes()) == 16
    assert float(Normalizer(counts, world_size=4).num_boxes()) == 4
    assert float(Normalizer(torch.zeros(2)).num_boxes()) == 1
    assert float(Normalizer(torch.tensor([1.0]), world_size=4).num_boxes()) == 1


def test_normalizer_knows_how_many_queries_will_be_matched() -> None:
    counts = torch.tensor([3.0, 0.0, 12.0, 1.0])  # of 10 queries each: 3, 0, all 10, 1
    matched, unmatched = Normalizer(counts).num_matched(10)
    assert (float(matched), float(unmatched)) == (14, 26)
    matched, unmatched = Normalizer(counts, world_size=2).num_matched(10)
    assert (float(matched), float(unmatched)) == (7, 13)


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
