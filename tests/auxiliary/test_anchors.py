"""Anchors against loops over cells, and those of the official code."""

from __future__ import annotations

import math

import pytest
import torch

from detfamily.auxiliary.anchors import Anchors, by_anchor

from .checks import check_output
from .conftest import Golden

MIDDLE = Anchors([8, 16], 8, 1, (1.0,), 0.5, 0.5)


def naive(anchors: Anchors, shapes: list[tuple[int, int]]) -> tuple[list[list[float]], list[tuple[int, int, int]]]:
    """The anchors, and of each its level, row and column."""
    boxes, places = [], []
    for level, (height, width) in enumerate(shapes):
        stride = anchors.strides[level]
        for row in range(height):
            for column in range(width):
                for ratio in anchors.ratios:
                    for scale in range(anchors.scales):
                        side = stride * anchors.size * 2 ** (scale / anchors.scales)
                        w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                        x, y = (column + anchors.offset) * stride, (row + anchors.offset) * stride
                        boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                        places.append((level, row, column))
    return boxes, places


@pytest.mark.parametrize("anchors", [Anchors([4, 8], 4, 3, (0.5, 1.0, 2.0)), MIDDLE])
def test_boxes_and_which_lie_in_an_image(anchors: Anchors) -> None:
    shapes = [(3, 5), (2, 3)]
    boxes, places = naive(anchors, shapes)
    found = anchors(shapes, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(boxes, dtype=torch.float64))
    size = (9, 17)
    index, counts = anchors.inside(shapes, size, found.device)
    inside = [
        number
        for number, (level, row, column) in enumerate(places)
        if row * anchors.strides[level] < size[0] and column * anchors.strides[level] < size[1]
    ]
    assert index.tolist() == inside
    assert counts == [sum(places[number][0] == level for number in inside) for level in range(2)]


def test_the_scale_is_that_of_all_sides() -> None:
    like, shapes = torch.zeros(()), [(3, 5), (2, 3)]
    whole, half = (Anchors([4, 8], 4, 2, (0.5, 1.0), scale)(shapes, like) for scale in (1.0, 0.5))
    torch.testing.assert_close(half[:, 2:] - half[:, :2], (whole[:, 2:] - whole[:, :2]) / 2)
    torch.testing.assert_close(half[:, 2:] + half[:, :2], whole[:, 2:] + whole[:, :2])


def test_what_anchors_tell_of_their_level() -> None:
    found = MIDDLE([(3, 5), (2, 3)], torch.zeros(()))
    assert MIDDLE.stride_at(found).tolist() == [[8.0]] * 15 + [[16.0]] * 6
    torch.testing.assert_close(found[0], torch.tensor([-12.0, -12.0, 20.0, 20.0]))


def test_an_image_larger_than_the_maps() -> None:
    index, counts = Anchors([4], 4, 1, (1.0,)).inside([(2, 3)], (100, 100), torch.device("cpu"))
    assert index.tolist() == list(range(6)) and counts == [6]


def test_the_official_anchors_of_a_cell(golden: Golden) -> None:
    anchors = golden.heads["faster_rcnn"].rpn.anchors
    for level in range(6):
        check_output(anchors.of_cell(level), golden[f"rpn.base_anchors.{level}"])


def test_numbers_of_an_anchor_stay_together() -> None:
    maps = torch.randn(2, 3 * 4, 5, 6)
    rows = by_anchor(maps, 4)
    for anchor in range(3):
        assert torch.equal(rows[1, (2 * 6 + 4) * 3 + anchor], maps[1, anchor * 4 : anchor * 4 + 4, 2, 4])


@pytest.mark.parametrize(
    ("strides", "size", "scales", "ratios", "named"),
    [
        ([], 4.0, 1, [1.0], "strides"),
        ([4, 0], 4.0, 1, [1.0], "strides"),
        ([4], 0.0, 1, [1.0], "size"),
        ([4], 4.0, 0, [1.0], "scales"),
        ([4], 4.0, 1, [], "ratios"),
        ([4], 4.0, 1, [-1.0], "ratios"),
    ],
)
def test_numbers_out_of_range(strides: list[int], size: float, scales: int, ratios: list[float], named: str) -> None:
    with pytest.raises(ValueError, match=f"anchors.{named}"):
        Anchors(strides, size, scales, ratios)


def test_a_scale_or_an_offset_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"anchors.scale=0.0"):
        Anchors([4], 4.0, 1, [1.0], 0.0)
    with pytest.raises(ValueError, match=r"anchors.offset=1.5"):
        Anchors([4], 4.0, 1, [1.0], 1.0, 1.5)
