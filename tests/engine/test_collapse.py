from __future__ import annotations

import math

import pytest
import torch

from detfamily.engine.collapse import ALIKE, QuerySpread, collapse_words
from detfamily.engine.distributed import World
from detfamily.structures import Predictions


def predictions(boxes):
    """Of two layers, of which only the last counts."""
    boxes = torch.stack([torch.rand_like(boxes), boxes])
    return Predictions(torch.zeros(*boxes.shape[:3], 3), boxes)


def test_the_spread_is_the_deviation_over_queries_averaged_over_all_images():
    spread = QuerySpread(World())
    batches = [torch.rand(3, 7, 4), torch.rand(1, 7, 4)]
    for boxes in batches:
        spread.update(predictions(boxes))
    images = torch.cat(batches).double().numpy()
    assert spread.read() == pytest.approx(images.std(axis=1).mean(), rel=1e-5)


def test_queries_that_answer_alike_whatever_the_image_have_none():
    spread = QuerySpread(World())
    spread.update(predictions(torch.rand(5, 1, 4).expand(5, 9, 4)))
    assert spread.read() == pytest.approx(0, abs=1e-6)


def test_the_processes_count_by_their_images():
    class Three(World):
        """Two more processes, of which one saw no image."""

        def gather_numbers(self, numbers):
            return [list(numbers), [0.0, 0.0], [1.5, 3.0]]

    spread = QuerySpread(Three())
    boxes = torch.zeros(1, 2, 4)
    boxes[0, 1] = 1.0
    spread.update(predictions(boxes))
    assert spread.read() == pytest.approx((0.5 + 1.5) / 4)
    assert math.isnan(QuerySpread(World()).read())


def test_it_is_said_when_they_are_alike():
    assert "all 100 queries answer alike: their boxes differ by 0.001 % of" in collapse_words(1e-5, 100)
    assert collapse_words(ALIKE * 1.01, 100) is None
    assert collapse_words(0.0, 1) is None
    assert collapse_words(float("nan"), 100) is None
