from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detfamily.parity.compare import detections_ratio, error_ratio

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("role", "key", "expected", "off", "limit"),
    [
        ("output", "out.x", 0.5, 1e-5, 3e-5),
        ("output", "out.x", -20.0, 1e-4, 20 * 3e-5),
        ("loss", "loss.x", 4.0, 1e-5, 8e-5 + 1e-6),
        ("loss", "loss.x", 0.0, 1e-6, 1e-6),
        ("match", "match.x", 4.0, 1.0, 0.5),
        ("gradient", "grad.x", 0.3, 1e-5, 6e-5 + 1e-6),
        ("gradient", "grad.x", 1e-6, 1e-5, 1e-4),
        ("training", "train.param.x", 50.0, 1e-4, 1e-3),
        ("training", "train.loss.0", 50.0, 1e-2, 5e-2),
        ("pixels", "pixels.resized.0", 50.0, 1.0, 1.0),
    ],
)
def test_limits(role: str, key: str, expected: float, off: float, limit: float) -> None:
    ratio = error_ratio(role, torch.tensor([expected, 0.0]), torch.tensor([expected + off, 0.0]).double(), key)
    assert ratio == pytest.approx(off / limit, rel=0.1)


def test_limits_in_float64() -> None:
    expected, ours = torch.tensor([0.5, -3.0]).double(), torch.tensor([0.5, -3.0]).double()
    ours[0] += 1e-9
    assert error_ratio("output", expected, ours, "out.x") == pytest.approx(1 / 3, rel=1e-3)
    assert error_ratio("gradient", expected, ours, "grad.x") == pytest.approx(1 / 30, rel=1e-2)
    zero = torch.zeros(2).double()
    assert error_ratio("gradient", zero, zero + 1e-11, "grad.x") == pytest.approx(10)


def test_normalised_pixels_have_a_mean_and_a_worst() -> None:
    expected = torch.zeros(100)
    worst, everywhere = expected.clone(), expected + 1e-3
    worst[3] = 0.03
    assert error_ratio("pixels", expected, worst, "pixels.normalized.0") == pytest.approx(1.5)
    assert error_ratio("pixels", expected, everywhere, "batch.tensors") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("expected", "ours", "ratio"),
    [
        ([1.0, INF, -INF, NAN], [1.0, INF, -INF, NAN], 0.0),
        ([INF, NAN], [INF, NAN], 0.0),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, INF], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, INF], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_what_is_no_number(expected: list[float], ours: list[float], ratio: float) -> None:
    assert error_ratio("output", torch.tensor(expected), torch.tensor(ours), "out.x") == ratio


def test_a_role_without_a_limit() -> None:
    with pytest.raises(ValueError, match="no limit for the role 'info'"):
        error_ratio("info", torch.ones(1), torch.ones(1), "x")


def detections(scores: list[float], labels: list[int]) -> dict[str, Tensor]:
    boxes = torch.arange(4.0 * len(scores)).view(-1, 4)
    return {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "boxes": boxes}


def reordered(given: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    return {name: value[order] for name, value in given.items()}


def test_detections_in_order() -> None:
    expected = detections([0.9, 0.5, 0.3], [1, 2, 1])
    assert detections_ratio(expected, expected)[0] == 0
    for part, step, limit in (("scores", 2e-5, 3e-5), ("boxes", 1e-3, 2e-3)):
        ours = {**expected, part: expected[part].clone()}
        ours[part][1] += step
        ratio, where = detections_ratio(expected, ours)
        assert where == part and ratio == pytest.approx(step / limit, rel=0.02)
    assert detections_ratio(expected, reordered(expected, [1, 0, 2]))[0] > 1
    other = {**expected, "labels": torch.tensor([1, 2, 2])}
    assert detections_ratio(expected, other) == (INF, "labels")
    assert detections_ratio(expected, reordered(expected, [0, 1])) == (INF, "shape")
    for part in ("scores", "boxes"):
        spoiled = {**expected, part: expected[part].clone()}
        spoiled[part][2] = NAN
        assert detections_ratio(expected, spoiled)[0] > 1e6
        assert detections_ratio(spoiled, expected)[0] > 1e6


def test_tied_detections_may_change_places_but_not_stand_twice() -> None:
    expected = detections([0.9, 0.5, 0.5 + 5e-6, 0.5], [1, 2, 3, 2])
    assert detections_ratio(expected, reordered(expected, [0, 3, 1, 2]))[0] < 1
    ratio, _ = detections_ratio(expected, reordered(expected, [0, 1, 2, 1]))
    assert ratio > 1
    # two classes of one query tie, with one box: still both are wanted
    same = detections([0.5, 0.5], [3, 5])
    same["boxes"][1] = same["boxes"][0]
    assert detections_ratio(same, {**same, "labels": torch.tensor([3, 3])}) == (INF, "labels")
    assert detections_ratio(same, {**same, "labels": torch.tensor([5, 3])})[0] == 0


def test_no_detections() -> None:
    nothing = detections([], [])
    assert detections_ratio(nothing, nothing)[0] == 0
