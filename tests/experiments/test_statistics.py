"""Means, intervals and orders, against scipy's own tests, sums by hand, and pairs that are counted one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from detfamily.experiments.statistics import difference, kendall_tau, order, summarize


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


def counted_tau(a, b):
    """Tau-b as it is defined: pairs that agree less pairs that do not, over those that are not equal in one."""
    score, in_a, in_b = 0, 0, 0
    for one, other in itertools.combinations(range(len(a)), 2):
        x, y = a[one] - a[other], b[one] - b[other]
        score += int(x * y > 0) - int(x * y < 0)
        in_a, in_b = in_a + (x != 0), in_b + (y != 0)
    return score / math.sqrt(in_a * in_b) if in_a and in_b else math.nan


@pytest.mark.parametrize("values", [4, 100], ids=["many ties", "few ties"])
def test_tau_is_scipys_and_the_count_of_pairs(values):
    rng = np.random.default_rng(values)
    a, b = rng.integers(values, size=9), rng.integers(values, size=(50, 9))
    found = kendall_tau(a, b)
    assert found.shape == (50,)
    assert found == pytest.approx([stats.kendalltau(a, one).statistic for one in b])
    assert found == pytest.approx([counted_tau(a, one) for one in b])
    assert math.isnan(kendall_tau([1, 2, 3], [5, 5, 5]))


def test_an_order_by_hand():
    published = {"a": 1.0, "b": 2.0, "c": 3.0, "not run": 9.0}
    ours = {"a": {0: 10.0, 1: 12.0}, "b": {0: 20.0, 1: 22.0}, "c": {0: 15.0, 1: 15.0}, "not published": {0: 1.0}}
    found = order(published, ours)
    # Pairs: a below b and a below c as published, b above c against it: (2 - 1) / 3.
    assert (found.rows, found.agree, found.against, found.seeds) == (3, 2, 1, 2)
    assert found.tau == pytest.approx(1 / 3)
    # Of the six orders of three rows, one agrees in three pairs and two in two.
    assert (found.chance, found.least) == pytest.approx((3 / 6, 1 / 6))
    assert (found.low, found.high) == pytest.approx((1 / 3, 1 / 3))  # No row changes places, whichever seed is drawn.


@pytest.mark.parametrize("rows", [5, 7, 9])
def test_the_chance_of_an_order_is_scipys_exact_one(rows):
    rng = np.random.default_rng(rows)
    figures, means = rng.permutation(rows), np.arange(rows) + rng.normal(0, 2, rows)
    found = order(dict(enumerate(figures)), {row: {0: mean} for row, mean in enumerate(means)})
    expected = stats.kendalltau(figures, means, alternative="greater", method="exact")
    assert (found.tau, found.chance) == pytest.approx((expected.statistic, expected.pvalue))
    assert math.isnan(found.low) and math.isnan(found.high)


def test_seeds_drawn_again_move_the_order_of_rows_that_are_close():
    # Seed 0 has b above a, seed 1 the other way round. Of the four ways to draw two seeds, (0, 0) agrees, (1, 1) does
    # not, and both others leave a difference of -1, against it, too.
    published = {"a": 1.0, "b": 2.0}
    found = order(published, {"a": {0: 10.0, 1: 13.0}, "b": {0: 11.0, 1: 10.0}})
    assert (found.tau, found.low, found.high) == (-1, -1, 1)
    far = order(published, {"a": {0: 10.0, 1: 13.0}, "b": {0: 31.0, 1: 30.0}})
    assert (far.low, far.high) == (1, 1)


def test_seeds_are_drawn_row_by_row_where_rows_have_different_ones():
    # Drawn together, b would always be one above a; apart, seed 1 of a meets seed 0 of b.
    a, b = {0: 10.0, 1: 20.0}, {0: 11.0, 1: 21.0}
    together = order({"a": 1.0, "b": 2.0}, {"a": a, "b": b})
    apart = order({"a": 1.0, "b": 2.0}, {"a": a, "b": {5: 11.0, 6: 21.0}})
    assert (together.low, together.high) == (1, 1) and (apart.low, apart.high) == (-1, 1)
    assert order({"a": 1.0, "b": 2.0}, {"a": a, "b": {5: 11.0, 6: 21.0}}) == apart  # The same every time.


def test_there_is_no_order_of_one_row_or_of_equal_ones():
    assert order({"a": 1.0, "b": 2.0}, {"a": {0: 3.0}, "b": {}}) is None
    assert order({"a": 1.0, "b": 1.0}, {"a": {0: 3.0}, "b": {0: 4.0}}) is None
