from __future__ import annotations

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


def test_settings_of_both() -> None:
    for rule in (Hungarian(weight=0.5, left_out=["class"]), Known(weight=0.5, left_out=["class"])):
        assert rule.weight == 0.5 and rule.left_out == ("class",)
    for rule in (Hungarian(), Known()):
        assert rule.weight == 1 and rule.left_out == ()
