"""What a few seeds say: mean, spread, the difference of two rows with an interval, and the order of all rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """One row over its seeds.

    Attributes:
        n: number of seeds.
        mean: of the values.
        spread: standard deviation of a single run (n - 1 in the denominator); NaN for one seed.
    """

    n: int
    mean: float
    spread: float


@dataclass(frozen=True)
class Difference:
    """One row minus another.

    Attributes:
        n: pairs of runs with the same seed; without pairs, the smaller number of runs.
        mean: the difference; NaN where a row has no run.
        low, high: ends of the confidence interval of the mean; NaN where there are too few runs for one.
        paired: whether runs of the same seed were compared with one another.
    """

    n: int
    mean: float
    low: float
    high: float
    paired: bool

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves zero out: the sign is known, at this level of confidence."""
        return self.has_interval and not self.low <= 0 <= self.high

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def summarize(values: Sequence[float]) -> Summary:
    """Mean and spread.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a summary needs at least one value")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Summary(len(values), float(np.mean(values)), spread)


def difference(values: Mapping[int, float], baseline: Mapping[int, float], level: float = LEVEL) -> Difference:
    """The mean difference of two rows, with a t-interval.

    Runs with the same seed see the same images in the same order, so they are compared pairwise where two seeds or
    more are common. Otherwise it is Welch's interval for two independent samples.

    Args:
        values: seed -> value.
        baseline: seed -> value of the other row.
        level: of confidence.
    """
    common = sorted(values.keys() & baseline.keys())
    if len(common) > 1:
        deltas = np.array([values[seed] - baseline[seed] for seed in common])
        error = float(deltas.std(ddof=1)) / math.sqrt(len(deltas))
        return _with_interval(len(deltas), float(deltas.mean()), error, len(deltas) - 1, level, paired=True)
    ours, theirs = np.array(list(values.values())), np.array(list(baseline.values()))
    n = min(len(ours), len(theirs))
    mean = float(ours.mean() - theirs.mean()) if n else math.nan
    if n < 2:
        return Difference(n, mean, math.nan, math.nan, paired=len(common) == 1 and len(ours) == len(theirs) == 1)
    a, b = (float(one.var(ddof=1)) / len(one) for one in (ours, theirs))
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1)) if a + b else 1.0
    return _with_interval(n, mean, math.sqrt(a + b), freedom, level, paired=False)


def _with_interval(n: int, mean: float, error: float, freedom: float, level: float, paired: bool) -> Difference:
    reach = float(stats.t.ppf(0.5 + level / 2, freedom)) * error
    return Difference(n, mean, mean - reach, mean + reach, paired)


@dataclass(frozen=True)
class Order:
    """How far two figures put the same rows into the same order.

    Attributes:
        rows: how many.
        tau: Kendall's tau-b, from -1 (reversed) to 1 (the same order).
        agree, against: pairs of rows that both figures order, alike and the other way round.
        chance: share of all orders of the rows that agree as well or better (the one-sided permutation p value).
        least: the smallest such share that so many rows allow.
        low, high: of 95 % of the taus when seeds are drawn again, with replacement; NaN where no row has two seeds.
        seeds: the most that a row has.
    """

    rows: int
    tau: float
    agree: int
    against: int
    chance: float
    least: float
    low: float
    high: float
    seeds: int


def kendall_tau(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> np.ndarray:
    """Kendall's tau-b, which counts a pair that is equal in one of the two as neither agreeing nor opposing.

    Args:
        first: (rows,).
        second: (..., rows), as many orders as there are.

    Returns:
        (...,); NaN where all rows are equal in one of the two.
    """
    a, b = _pair_signs(np.asarray(first, dtype=float)), _pair_signs(np.asarray(second, dtype=float))
    size = np.sqrt((a != 0).sum(-1) * (b != 0).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(-1) / size)


def order(published: Mapping[str, float], ours: Mapping[str, Mapping[int, float]]) -> Order | None:
    """Compare the order of the means over seeds with the published one.

    Args:
        published: row -> figure, of which only the order counts.
        ours: row -> seed -> value.

    Returns:
        None where fewer than two rows have both, or all of them are equal in one.
    """
    labels = [label for label in published if ours.get(label)]
    figures = np.array([published[label] for label in labels], dtype=float)
    runs = [ours[label] for label in labels]
    means = np.array([np.mean(list(one.values())) for one in runs])
    tau = float(kendall_tau(figures, means)) if len(labels) > 1 else math.nan
    if math.isnan(tau):
        return None
    signs = _pair_signs(figures) * _pair_signs(means)
    low, high = _tau_interval(figures, runs)
    counts = int((signs > 0).sum()), int((signs < 0).sum())
    return Order(len(labels), tau, *counts, *_chance(figures, means, tau), low, high, max(map(len, runs)))


_ALL_ORDERS = 7
"""Up to so many rows, all their orders are counted, so that ties do no harm; 5040 of them."""

_ALL_DRAWS = 5
"""Up to so many seeds that all rows have, all ways to draw them again are counted; 3125 of them."""

_DRAWS = 4000


def _pair_signs(values: np.ndarray) -> np.ndarray:
    """The sign of the difference of every pair, (..., pairs)."""
    first, second = np.triu_indices(values.shape[-1], 1)
    return np.sign(values[..., first] - values[..., second])


def _chance(figures: np.ndarray, means: np.ndarray, tau: float) -> tuple[float, float]:
    if len(figures) > _ALL_ORDERS:
        return float(stats.kendalltau(figures, means, alternative="greater").pvalue), 0.0
    every = kendall_tau(figures, means[np.array(list(itertools.permutations(range(len(means)))))])
    return float((every > tau - 1e-9).mean()), float((every > every.max() - 1e-9).mean())


def _tau_interval(figures: np.ndarray, runs: Sequence[Mapping[int, float]]) -> tuple[float, float]:
    """Where 95 % of the taus lie when seeds are drawn again: the same ones for all rows, where all have the same."""
    if max(map(len, runs)) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    seeds = sorted(runs[0])
    if all(one.keys() == runs[0].keys() for one in runs):
        values = np.array([[one[seed] for seed in seeds] for one in runs])
        every = itertools.product(range(len(seeds)), repeat=len(seeds))
        random = generator.integers(len(seeds), size=(_DRAWS, len(seeds)))
        drawn = np.array(list(every)) if len(seeds) <= _ALL_DRAWS else random
        means = values[:, drawn].mean(-1).T
    else:
        each = [np.array(list(one.values())) for one in runs]
        means = np.stack([one[generator.integers(len(one), size=(_DRAWS, len(one)))].mean(-1) for one in each], -1)
    taus = kendall_tau(figures, means)
    # Taus that occur, outwards: between two that do, interpolation would find one that cannot be.
    low = np.nanquantile(taus, (1 - LEVEL) / 2, method="lower")
    return float(low), float(np.nanquantile(taus, (1 + LEVEL) / 2, method="higher"))
