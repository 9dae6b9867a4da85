"""Objects in pixels."""

from __future__ import annotations

import pytest
import torch

from detfamily.auxiliary.structures import BACKGROUND, IGNORED, Objects, extents
from detfamily.structures import Images, Targets

SIZES = ((40, 80), (20, 50))
IMAGES = Images(torch.zeros(2, 3, 40, 80), torch.zeros(2, 40, 80, dtype=torch.bool), SIZES, SIZES, (0, 1))


def test_objects_in_pixels_and_none() -> None:
    box = torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.25, 0.25, 0.5, 0.5]])
    objects = Objects.of(IMAGES, Targets.from_lists([torch.tensor([4, 2]), torch.zeros(0).long()], [box, box[:0]]))
    assert objects.boxes_of(0).tolist() == [[30, 10, 50, 30], [0, 0, 40, 20]] and objects.boxes_of(1).shape == (0, 4)
    boxes, labels = objects.at(torch.tensor([[1, BACKGROUND, 0], [BACKGROUND, IGNORED, BACKGROUND]]))
    assert boxes[0, 0].tolist() == [0, 0, 40, 20] and labels[0].tolist() == [2, 0, 4]
    assert boxes[1].tolist() == [[12.5, 5, 37.5, 15]] * 3 and boxes[0, 1].tolist() == [20, 10, 60, 30]


def test_a_batch_without_any_object() -> None:
    none = torch.zeros(0)
    objects = Objects.of(IMAGES, Targets.from_lists([none.long()] * 2, [none.view(0, 4)] * 2))
    assert objects.at(torch.full((2, 3), BACKGROUND))[0].shape == (2, 3, 4)
    assert extents(IMAGES, none).tolist() == [[80, 40, 80, 40], [50, 20, 50, 20]]


def test_targets_of_other_images() -> None:
    with pytest.raises(ValueError, match="1 images have targets, of 2"):
        Objects.of(IMAGES, Targets.from_lists([torch.tensor([1])], [torch.rand(1, 4)]))
