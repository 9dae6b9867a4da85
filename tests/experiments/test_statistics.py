"""Means and intervals, against scipy's own tests and sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from detfamily.experiments.statistics import difference, summarize


def test_a_summary_is_mean_and_sample_deviation():
    found = summarize([40.0, 41.0, 45.0])
    assert (found.n, found.mean) == (3, 42.0)
    assert found.spread == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert math.isnan(summarize([1.0]).spread)
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


def test_a_paired_interval_by_hand():
    found = difference({0: 12.0, 1: 15.0, 2: 12.0}, {0: 10.0, 1: 11.0, 2: 12.0})
    # Differences 2, 4, 0: mean 2, deviation 2; the 97.5 % point of t with two degrees of freedom is 4.302653.
    reach = 4.302653 * 2 / math.sqrt(3)
    assert (found.n, found.mean, found.paired) == (3, 2.0, True)
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach), rel=1e-6)
    assert not found.resolved and found.half_width == pytest.approx(reach, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_paired_interval_is_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(30, 2, 6), rng.normal(29, 2, 6)
    found = difference(dict(enumerate(a)), dict(enumerate(b)), level=0.9)
    expected = stats.ttest_rel(a, b).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("first", "second"), [(4, 7), (2, 2), (9, 3)])
def test_without_common_seeds_it_is_welchs(first, second):
    rng = np.random.default_rng(first)
    a, b = rng.normal(30, 1, first), rng.normal(20, 5, second)
    found = difference(dict(enumerate(a)), {100 + index: one for index, one in enumerate(b)})
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert not found.paired and found.n == min(first, second)


def test_only_common_seeds_are_paired():
    found = difference({0: 5.0, 1: 7.0, 9: 100.0}, {0: 4.0, 1: 4.0, 7: -50.0})
    assert (found.n, found.mean, found.paired) == (2, 2.0, True)


def test_an_effect_beyond_the_spread_is_resolved_and_without_spread_nothing_is():
    assert difference({0: 20.0, 1: 21.0, 2: 19.5}, {0: 10.0, 1: 11.1, 2: 9.4}).resolved
    single = difference({0: 20.0}, {0: 10.0})
    assert single.mean == 10 and not single.has_interval and not single.resolved
    nothing = difference({}, {0: 10.0})
    assert nothing.n == 0 and math.isnan(nothing.mean) and not nothing.resolved


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        common = rng.normal(0, 5, 3)  # what pairing takes out
        a, b = 30 + common + rng.normal(0, 1, 3), 28 + common + rng.normal(0, 1, 3)
        found = difference(dict(enumerate(a)), dict(enumerate(b)))
        held += found.low <= 2 <= found.high
    assert 0.93 <= held / 1000 <= 0.97
