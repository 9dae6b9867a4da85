"""Assigners against loops over single boxes."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner, CenterAssigner, MaxIoUAssigner
from detfamily.auxiliary.structures import BACKGROUND, IGNORED


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def center(box: list[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def naive_max_iou(boxes: Tensor, objects: Tensor, positive: float, negative: float, least: float | None) -> list[int]:
    assigned = []
    for box in boxes.tolist():
        overlaps = [iou(box, one) for one in objects.tolist()]
        most = max(overlaps)
        assigned.append(overlaps.index(most) if most >= positive else BACKGROUND if most < negative else IGNORED)
    if least is not None:
        for number, one in enumerate(objects.tolist()):
            overlaps = [iou(box, one) for box in boxes.tolist()]
            for index, overlap in enumerate(overlaps):
                if overlap == max(overlaps) and overlap >= least:
                    assigned[index] = number
    return assigned


def naive_atss(boxes: Tensor, counts: list[int], objects: Tensor, nearest: int) -> list[int]:
    rows = boxes.tolist()
    best: dict[int, tuple[float, int]] = {}
    for number, one in enumerate(objects.tolist()):
        x, y = center(one)
        candidates: list[int] = []
        start = 0
        for count in counts:
            away = [
                ((center(rows[i])[0] - x) ** 2 + (center(rows[i])[1] - y) ** 2, i) for i in range(start, start + count)
            ]
            candidates += [i for _, i in sorted(away)[:nearest]]
            start += count
        overlaps = [iou(rows[i], one) for i in candidates]
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for i, overlap in zip(candidates, overlaps, strict=True):
            cx, cy = center(rows[i])
            inside = min(cx - one[0], cy - one[1], one[2] - cx, one[3] - cy) > 0.01
            if overlap >= threshold and inside and overlap > best.get(i, (-1.0, 0))[0]:
                best[i] = (overlap, number)
    return [best[i][1] if i in best else BACKGROUND for i in range(len(rows))]


def random_boxes(count: int, seed: int, most: float = 60.0) -> Tensor:
    torch.manual_seed(seed)
    low = 80 * torch.rand(count, 2, dtype=torch.float64)
    return torch.cat([low, low + 4 + most * torch.rand(count, 2, dtype=torch.float64)], 1)


@pytest.mark.parametrize(("positive", "negative", "least"), [(0.7, 0.3, 0.3), (0.5, 0.5, None), (0.4, 0.2, 0.1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_largest_overlap(positive: float, negative: float, least: float | None, seed: int) -> None:
    boxes, objects = random_boxes(150, seed), random_boxes(6, seed + 10)
    boxes[7] = boxes[3]  # two that overlap an object most
    objects[2] = boxes[3] + 0.5
    found = MaxIoUAssigner(positive, negative, least)(boxes, objects).tolist()
    assert found == naive_max_iou(boxes, objects, positive, negative, least)
    assert least is None or (found[3] == found[7] == 2 and IGNORED in found)


def test_the_later_of_two_objects_that_need_the_same_box() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    objects = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 4.0]])
    assert MaxIoUAssigner(0.7, 0.3)(boxes, objects).tolist() == [0, BACKGROUND]
    assert MaxIoUAssigner(0.7, 0.3, 0.3)(boxes, objects).tolist() == [1, BACKGROUND]


@pytest.mark.parametrize("nearest", [2, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_threshold_for_each_object(nearest: int, seed: int) -> None:
    anchors, shapes = Anchors([8, 16, 64], 4, 1, (1.0,)), [(12, 16), (6, 8), (2, 2)]
    objects = random_boxes(5, seed)
    objects[1] = objects[0] + 3.0  # they want the same anchors
    boxes = anchors(shapes, objects)
    counts = [h * w for h, w in shapes]
    found = ATSSAssigner(nearest)(boxes, counts, objects).tolist()
    assert found == naive_atss(boxes, counts, objects, nearest)
    assert {0, 1} <= set(found)


def test_a_single_anchor_is_no_reason_to_divide_by_zero() -> None:
    found = ATSSAssigner()(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), [1], torch.tensor([[0.0, 0.0, 9.0, 9.0]]))
    assert found.tolist() == [0]


def naive_center(
    centers: Tensor, counts: list[int], strides: list[int], objects: Tensor, size: float, radius: float | None
) -> list[int]:
    levels = [level for level, count in enumerate(counts) for _ in range(count)]
    assigned = []
    for (x, y), level in zip(centers.tolist(), levels, strict=True):
        low = 0.0 if level == 0 else size * strides[level - 1]
        high = float("inf") if level == len(strides) - 1 else size * strides[level]
        found = []
        for number, one in enumerate(objects.tolist()):
            edges = (x - one[0], y - one[1], one[2] - x, one[3] - y)
            near = radius is None or max(abs(x - center(one)[0]), abs(y - center(one)[1])) < radius * strides[level]
            if near and min(edges) > 0 and low <= max(edges) <= high:
                found.append(((one[2] - one[0]) * (one[3] - one[1]), number))
        assigned.append(min(found)[1] if found else BACKGROUND)
    return assigned


@pytest.mark.parametrize("radius", [1.5, 0.5, None])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_centers_of_objects(radius: float | None, seed: int) -> None:
    strides, shapes = [4, 8, 16], [(24, 32), (12, 16), (6, 8)]
    anchors = Anchors(strides, 4, 1, (1.0,), offset=0.5)
    objects = random_boxes(8, seed)
    objects[1] = objects[0] + torch.tensor([2.0, 2.0, -2.0, -2.0])  # one in the other
    objects[2] = torch.tensor([100.0, 10.0, 112.0, 20.0])  # one for the finest level
    centers = (boxes := anchors(shapes, objects))[:, :2] / 2 + boxes[:, 2:] / 2
    counts = [h * w for h, w in shapes]
    found = CenterAssigner(strides, 4, radius)(centers, counts, objects).tolist()
    assert found == naive_center(centers, counts, strides, objects, 4, radius)
    starts = [0, counts[0], counts[0] + counts[1], sum(counts)]
    used = [set(found[a:b]) - {BACKGROUND} for a, b in pairwise(starts)]
    assert all(used) and 1 in set(found)


def test_nothing_to_assign() -> None:
    boxes, none = random_boxes(4, 0), torch.zeros(0, 4, dtype=torch.float64)
    for assigner in (MaxIoUAssigner(0.7, 0.3, 0.3), MaxIoUAssigner(0.5, 0.5)):
        assert assigner(boxes, none).tolist() == [BACKGROUND] * 4
        assert assigner(none, boxes).tolist() == assigner(none, none).tolist() == []
    assert ATSSAssigner()(boxes, [3, 1], none).tolist() == [BACKGROUND] * 4
    assert ATSSAssigner()(none, [0, 0], boxes).tolist() == []
    assert CenterAssigner([4, 8], 8)(boxes[:, :2], [3, 1], none).tolist() == [BACKGROUND] * 4
    assert CenterAssigner([4, 8], 8)(none[:, :2], [0, 0], boxes).tolist() == []


@pytest.mark.parametrize(
    ("numbers", "named"),
    [((0.3, 0.7, None), "negative_iou"), ((1.5, 0.3, None), "positive_iou"), ((0.7, 0.3, 0.0), "least_iou")],
)
def test_thresholds_out_of_range(numbers: tuple[float, float, float | None], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MaxIoUAssigner(*numbers)
    with pytest.raises(ValueError, match="nearest=0"):
        ATSSAssigner(0)
    with pytest.raises(ValueError, match="assigner.radius=0"):
        CenterAssigner([4], 8, 0)
