from __future__ import annotations

import torch

from detfamily.criterion.rules import Hungarian
from detfamily.structures import Targets


def test_class_agnostic_groups_see_objects_of_the_first_class() -> None:
    targets = Targets.from_lists([torch.tensor([3, 1])], [torch.rand(2, 4)], image_ids=[7])
    assert Hungarian().targets(targets) is targets
    agnostic = Hungarian(class_agnostic=True).targets(targets)
    assert agnostic.labels.tolist() == [[0, 0]] and targets.labels.tolist() == [[3, 1]]
    assert agnostic.boxes is targets.boxes and agnostic.image_ids == (7,)
