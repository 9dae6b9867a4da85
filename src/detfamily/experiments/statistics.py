"""What a few seeds say: mean, spread, and the difference of two rows with a confidence interval."""

from __future__ import annotations

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
