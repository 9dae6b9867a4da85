from __future__ import annotations

import pytest
import torch

from detfamily.criterion.rules import Hungarian, Known
from detfamily.structures import Given, Predictions, Targets


def two_objects() -> Targets:
    return Targets.from_lists([torch.tensor([3, 1])], [torch.rand(2, 4)], image_ids=[7])


def test_class_agnostic_groups_see_objects_of_the_first_class() -> None:
    targets, said = two_objects(), Predictions(torch.randn(2, 1, 5, 4), torch.rand(2, 1, 5, 4))
    assert Hungarian().targets(targets, said) is targets
    agnostic = Hungarian(class_agnostic=True).targets(targets, said)
    assert agnostic.labels.tolist() == [[0, 0]] and targets.labels.tolist() == [[3, 1]]
    assert agnostic.boxes is targets.boxes and agnostic.image_ids == (7,)


def test_known_groups_bring_their_own_targets() -> None:
    copies = Targets(torch.tensor([[3, 1, 3, 1]]), torch.rand(1, 4, 4), (4,), (7,))
    everything = torch.ones(1, 4, dtype=torch.bool)
    said = Predictions(torch.randn(2, 1, 4, 4), torch.rand(2, 1, 4, 4), Given(copies, everything, everything, 2, 1000))
    assert Known().targets(two_objects(), said) is copies


@pytest.mark.parametrize("repeats", [1, 2, 6])
@pytest.mark.parametrize("counts", [[2, 3], [0, 4, 1], [0, 0], [5]])
def test_repeated_objects_stand_in_a_row_without_gaps(counts: list[int], repeats: int) -> None:
    """As lists repeated image by image, and padded afterwards."""
    torch.manual_seed(0)
    labels = [torch.randint(0, 9, (count,)) for count in counts]
    boxes = [torch.rand(count, 4) for count in counts]
    ids = [20 + i for i in range(len(counts))]
    said = Predictions(torch.randn(2, len(counts), 5, 9), torch.rand(2, len(counts), 5, 4))
    repeated = Hungarian(repeats=repeats).targets(Targets.from_lists(labels, boxes, ids), said)
    expected = Targets.from_lists(
        [one.repeat(repeats) for one in labels], [one.repeat(repeats, 1) for one in boxes], ids
    )
    assert repeated.counts == expected.counts and repeated.image_ids == expected.image_ids
    assert torch.equal(repeated.valid, expected.valid) and repeated.labels.shape == expected.labels.shape
    assert torch.equal(repeated.labels[repeated.valid], expected.labels[expected.valid])
    assert torch.equal(repeated.boxes[repeated.valid], expected.boxes[expected.valid])
    # what lies in the padding enters costs before it is hidden: no arithmetic on it may degenerate
    assert repeated.boxes.isfinite().all() and (repeated.boxes[..., 2:] > 0).all() and (repeated.labels < 9).all()


def test_repeated_objects_without_their_classes() -> None:
    targets, said = two_objects(), Predictions(torch.randn(2, 1, 5, 4), torch.rand(2, 1, 5, 4))
    repeated = Hungarian(class_agnostic=True, repeats=2).targets(targets, said)
    assert repeated.labels.tolist() == [[0, 0, 0, 0]] and repeated.counts == (4,)
    assert torch.equal(repeated.boxes, targets.boxes.repeat(1, 2, 1))
    assert targets.labels.tolist() == [[3, 1]] and targets.counts == (2,)


def test_settings_of_both() -> None:
    for rule in (Hungarian(weight=0.5, left_out=["class"]), Known(weight=0.5, left_out=["class"])):
        assert rule.weight == 0.5 and rule.left_out == ("class",)
    for rule in (Hungarian(), Known()):
        assert rule.weight == 1 and rule.left_out == ()


@pytest.mark.parametrize("repeats", [0, -2])
def test_objects_that_nobody_answers_for(repeats: int) -> None:
    with pytest.raises(ValueError, match=rf"one_to_many\.repeats={repeats}: expected 1 or more"):
        Hungarian(repeats=repeats)
