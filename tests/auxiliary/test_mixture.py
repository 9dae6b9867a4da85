"""The fit of two normal distributions, against one written out number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detfamily.auxiliary.mixture import low_and_high


def naive(values: list[float], steps: int, tolerance: float) -> tuple[list[bool], list[float]]:
    means, variances, shares = [min(values), max(values)], [1.0, 1.0], [0.5, 0.5]

    def joint(x: float) -> list[float]:
        parts = zip(shares, means, variances, strict=True)
        return [
            math.log(share) - ((x - mean) ** 2 / var + math.log(2 * math.pi * var)) / 2 for share, mean, var in parts
        ]

    def density(x: float) -> float:
        high, low = max(joint(x)), min(joint(x))
        return high + math.log1p(math.exp(low - high))

    before = -math.inf
    for _ in range(steps):
        likelihood = sum(density(x) for x in values) / len(values)
        membership = [[math.exp(one - density(x)) for one in joint(x)] for x in values]
        for k in (0, 1):
            size = sum(row[k] for row in membership)
            mean = sum(row[k] * x for row, x in zip(membership, values, strict=True)) / size
            spread = sum(row[k] * (x - mean) ** 2 for row, x in zip(membership, values, strict=True)) / size
            means[k], variances[k], shares[k] = mean, spread + 1e-6, size / len(values)
        if abs(likelihood - before) < tolerance:
            break
        before = likelihood
    return [joint(x)[0] >= joint(x)[1] for x in values], [density(x) for x in values]


def rows(seed: int) -> list[list[float]]:
    """Of different lengths, each from two groups of numbers."""
    torch.manual_seed(seed)
    found = []
    for count in (2, 3, 9, 27, 27, 27):
        mean = 3 * torch.rand(1, dtype=torch.float64)
        split = torch.rand(count) < 0.3
        found.append((mean + torch.where(split, 0.3, 2.0) * torch.randn(count, dtype=torch.float64).abs()).tolist())
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("steps", "tolerance"), [(100, 1e-3), (3, 1e-3), (100, 1e-6)])
def test_all_rows_at_once(seed: int, steps: int, tolerance: float) -> None:
    wanted = rows(seed)
    values, valid = padded(wanted)
    low, density = low_and_high(values, valid, steps, tolerance)
    assert len({tuple(one) for one in low.tolist()}) > 1
    for number, row in enumerate(wanted):
        is_low, logarithms = naive(row, steps, tolerance)
        assert low[number][valid[number]].tolist() == is_low
        assert density[number][valid[number]].tolist() == pytest.approx(logarithms, rel=1e-8, abs=1e-8)


def padded(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """With what is unused in between, not at the end alone."""
    most = max(len(row) for row in rows)
    values = torch.full((len(rows), most), torch.inf, dtype=torch.float64)
    for number, row in enumerate(rows):
        place = torch.randperm(most)[: len(row)].sort().values
        values[number, place] = torch.tensor(row, dtype=torch.float64)
    return values, values < torch.inf


def test_equal_numbers_nothing_and_no_rows() -> None:
    values = torch.tensor([[1.5, 1.5, 1.5], [0.0, 0.0, 0.0]])
    low, density = low_and_high(values, torch.tensor([[True] * 3, [False] * 3]))
    assert low[0].all() and density[0].isfinite().all()
    low, density = low_and_high(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool))
    assert low.shape == density.shape == (0, 5)


def test_two_groups_far_apart() -> None:
    values = torch.tensor([[0.1, 0.12, 0.09, 3.0, 3.2, 2.9]])
    low, _ = low_and_high(values, torch.ones(1, 6, dtype=torch.bool))
    assert low.tolist() == [[True] * 3 + [False] * 3]
