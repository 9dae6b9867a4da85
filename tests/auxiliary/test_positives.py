"""Which candidates become queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detfamily.auxiliary import Candidates, Objects, Positives
from detfamily.auxiliary.positives import PositiveQueries
from detfamily.auxiliary.structures import BACKGROUND
from detfamily.blocks.denoising import Draws
from detfamily.structures import Images, Targets

SIZES = ((40, 80), (20, 50))


def batch() -> tuple[Images, Targets]:
    mask = torch.ones(2, 40, 80, dtype=torch.bool)
    mask[0], mask[1, :20, :50] = False, False
    images = Images(torch.zeros(2, 3, 40, 80), mask, SIZES, SIZES, (0, 1))
    return images, Targets.from_lists([torch.tensor([3, 1]), torch.tensor([2])], [torch.rand(2, 4), torch.rand(1, 4)])


def choose(assigned: Tensor, usable: Tensor, most: int, least: int) -> tuple[Positives, Candidates, Targets]:
    torch.manual_seed(0)
    images, targets = batch()
    count = assigned.shape[1]
    candidates = Candidates(
        20 * torch.rand(2, count, 4), torch.randn(2, count, 5, requires_grad=True), assigned, usable
    )
    objects = Objects.of(images, targets)
    return PositiveQueries(most, least)(candidates, objects, images, Draws()), candidates, targets


@pytest.mark.parametrize(
    ("positives", "most", "least", "slots"),
    [
        ((7, 2), 20, 3, 7),  # as many as the fullest image has
        ((7, 2), 4, 3, 4),  # not more than allowed
        ((2, 0), 20, 5, 5),  # not fewer than wanted
        ((0, 0), 20, 5, 5),
        ((2, 0), 20, 15, 12),  # there are no more
    ],
)
def test_positives_first_then_negatives(positives: tuple[int, int], most: int, least: int, slots: int) -> None:
    assigned = torch.full((2, 12), BACKGROUND)
    assigned[0, 1 : 1 + positives[0]] = torch.arange(positives[0]) % 2
    assigned[1, 3 : 3 + positives[1]] = 0
    usable = torch.ones(2, 12, dtype=torch.bool)
    usable[1, 9:] = False
    queries, candidates, targets = choose(assigned, usable, most, least)
    assert queries.boxes.shape == queries.target_boxes.shape == (2, slots, 4)
    for image, (height, width) in enumerate(SIZES):
        index = queries.index[image]
        used = min(slots, int(usable[image].sum()))
        assert len(set(index.tolist())) == slots
        assert queries.counted[image].tolist() == [True] * used + [False] * (slots - used)
        assert usable[image][index[:used]].all()
        matched = min(positives[image], slots)
        assert queries.matched[image].tolist() == [True] * matched + [False] * (slots - matched)
        for slot in range(slots):
            x0, y0, x1, y1 = candidates.boxes_xyxy[image, index[slot]].tolist()
            wanted = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            torch.testing.assert_close(queries.boxes[image, slot], torch.tensor(wanted))
            if slot < matched:
                number = assigned[image, index[slot]]
                assert queries.labels[image, slot] == targets.labels[image, number]
                torch.testing.assert_close(queries.target_boxes[image, slot], targets.boxes[image, number])
    assert queries.target_boxes.isfinite().all()


def test_the_gradient_goes_through_features_alone() -> None:
    assigned = torch.tensor([[0, BACKGROUND, BACKGROUND], [BACKGROUND] * 3])
    queries, candidates, _ = choose(assigned, torch.ones(2, 3, dtype=torch.bool), 2, 2)
    assert not queries.boxes.requires_grad and not queries.target_boxes.requires_grad
    queries.features.sum().backward()
    assert candidates.features.grad is not None
    wanted = torch.zeros(2, 3).scatter(1, queries.index, 1.0)
    assert torch.equal(candidates.features.grad, wanted[..., None].expand(2, 3, 5))


def test_neighbours_that_share_a_feature() -> None:
    assigned = torch.tensor([[0, BACKGROUND, 1, BACKGROUND, BACKGROUND, 0], [BACKGROUND] * 6])
    images, targets = batch()
    features = torch.randn(2, 2, 5)
    candidates = Candidates(20 * torch.rand(2, 6, 4), features, assigned, torch.ones(2, 6, dtype=torch.bool))
    queries = PositiveQueries(6, 5)(candidates, Objects.of(images, targets), images, Draws())
    for image in range(2):
        for slot, place in enumerate(queries.index[image].tolist()):
            assert torch.equal(queries.features[image, slot], features[image, place // 3])


@pytest.mark.parametrize(("most", "least"), [(8, 9), (3, 0)])
def test_bounds_out_of_order(most: int, least: int) -> None:
    with pytest.raises(ValueError, match="positives.least"):
        PositiveQueries(most, least)
