"""Random samples: how many, of which kind, in which order, and equally likely."""

from __future__ import annotations

import pytest
import torch

from detfamily.auxiliary.samplers import RandomSampler, Sample
from detfamily.auxiliary.structures import BACKGROUND, IGNORED
from detfamily.blocks.denoising import Draws

from .conftest import Stored


@pytest.mark.parametrize(
    ("positives", "negatives", "wanted"),
    [
        # of each kind, out of 8 slots of which half may be positive
        (20, 30, (4, 4)),
        (3, 30, (3, 5)),
        (0, 30, (0, 8)),
        (20, 2, (4, 2)),
        (20, 0, (4, 0)),
        (1, 2, (1, 2)),
        (0, 0, (0, 0)),
    ],
)
@pytest.mark.parametrize("ignored", [0, 5])
def test_how_many_of_each_kind(positives: int, negatives: int, wanted: tuple[int, int], ignored: int) -> None:
    torch.manual_seed(positives)
    kinds = [*range(positives), *[BACKGROUND] * negatives, *[IGNORED] * ignored]
    assigned = torch.tensor(kinds, dtype=torch.int64)[torch.randperm(len(kinds))]
    sample = RandomSampler(8, 0.5)(assigned, Draws())
    assert sample.index.shape == sample.assigned.shape == sample.valid.shape == (8,)
    used = sum(wanted)
    assert sample.valid.tolist() == [True] * used + [False] * (8 - used)
    assert sample.positive.tolist() == [True] * wanted[0] + [False] * (8 - wanted[0])
    index = sample.index[:used]
    assert assigned[index].tolist() == sample.assigned[:used].tolist()
    for part in (index[: wanted[0]], index[wanted[0] :]):
        assert part.tolist() == sorted(set(part.tolist()))
    assert (sample.assigned[used:] == BACKGROUND).all() and (sample.index[used:] == 0).all()


def test_all_are_equally_likely() -> None:
    assigned = torch.tensor([5] * 10 + [BACKGROUND] * 20)
    draws, count = Draws(torch.Generator().manual_seed(0)), torch.zeros(30)
    for _ in range(600):
        count[RandomSampler(8, 0.5)(assigned, draws).index] += 1
    # 4 of 10, and 4 of 20: within five standard deviations
    assert ((count[:10] / 600 - 0.4).abs() < 5 * (0.4 * 0.6 / 600) ** 0.5).all()
    assert ((count[10:] / 600 - 0.2).abs() < 5 * (0.2 * 0.8 / 600) ** 0.5).all()


def test_the_draws_decide() -> None:
    assigned = torch.tensor([BACKGROUND, 4, IGNORED, BACKGROUND, 7, BACKGROUND, 2])
    draws = Stored([torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])])  # of the positives, of the negatives
    sample = RandomSampler(4, 0.5)(assigned, draws)
    assert sample.index.tolist() == [1, 6, 3, 5]
    assert sample.assigned.tolist() == [4, 2, BACKGROUND, BACKGROUND]


def test_samples_of_a_batch() -> None:
    one = RandomSampler(3, 0.5)(torch.tensor([0, BACKGROUND]), Draws())
    both = Sample.stack([one, one])
    assert both.index.tolist() == [one.index.tolist()] * 2 and both.positive.tolist() == [one.positive.tolist()] * 2


@pytest.mark.parametrize(("count", "share", "named"), [(0, 0.5, "count"), (8, 0.0, "share"), (8, 1.0, "share")])
def test_numbers_out_of_range(count: int, share: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RandomSampler(count, share)
