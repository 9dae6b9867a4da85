"""Verdicts: made-up results of which it is known how they stand to what was published."""

from __future__ import annotations

import pytest

from detfamily.experiments.claims import claim_of, claims, conclusion, counts, order_of, out_of_order, summary
from detfamily.experiments.findings import Findings
from detfamily.experiments.results import Plan
from detfamily.experiments.table import read_table

SEEDS = {
    "base": (30.0, 31.0, 32.0),
    "far above": (40.0, 41.2, 42.1),  # differences 10, 10.2, 10.1
    "far below": (20.0, 21.2, 22.1),
    "above by chance": (34.0, 31.0, 34.0),  # 4, 0, 2: mean 2, reach 4.97
    "below by chance": (26.0, 31.0, 30.0),
    "the same": (30.0, 31.0, 32.0),
    "one seed": (35.0,),
}


@pytest.fixture
def made(write_table):
    """A table and its findings, of row -> (published figure or None, which of ``SEEDS`` or None)."""

    def make(rows, base="base", published=40.0):
        first = {"label": "base", "overrides": [], "published": {} if published is None else {"AP": published}}
        lines = [
            {"label": label, "overrides": [], "published": {} if value is None else {"AP": value}}
            for label, (value, _) in rows.items()
        ]
        table = read_table(write_table(baseline="base", rows=[first, *lines]))
        which = {"base": base, **{label: seeds for label, (_, seeds) in rows.items()}}
        records = tuple(
            {"row": label, "seed": seed, "status": "finished", "AP": value / 100, "scale": "mini"}
            for label, name in which.items()
            if name
            for seed, value in enumerate(SEEDS[name])
        )
        return Findings(table, Plan(str(table.path), "mini", (0, 1, 2), (), {}, {}, "one", "abc"), records)

    return make


@pytest.mark.parametrize(
    ("published", "ours", "verdict", "holds_size"),
    [
        (41.0, "far above", "same sign, resolved", False),
        (50.1, "far above", "same sign, resolved", True),
        (41.0, "far below", "opposite sign, resolved", False),
        (39.0, "far below", "same sign, resolved", False),
        (41.0, "above by chance", "same sign, not resolved", True),
        (48.0, "above by chance", "same sign, not resolved", False),  # 8 lies beyond 2 + 4.97
        (41.0, "below by chance", "opposite sign, not resolved", True),
        (41.0, "the same", "no difference, not resolved", False),
        (41.0, "one seed", "same sign, no interval", None),
        (39.0, "one seed", "opposite sign, no interval", None),
        (40.0, "far above", "published as equal, resolved", False),
        (40.0, "above by chance", "published as equal, not resolved", True),
        (41.0, None, "not run", None),
        (None, "far above", "resolved", None),
        (None, "one seed", "no interval", None),
    ],
)
def test_verdicts(made, published, ours, verdict, holds_size):
    found = made({"row": (published, ours)})
    one = claim_of(found.table, "row", found)
    assert one.verdict == verdict and one.holds_size is holds_size
    assert len(claims(found.table, found)) == (published is not None)


def test_nothing_is_run_without_runs_or_without_a_baseline(made):
    found = made({"row": (41.0, "far above")}, base=None)
    assert claim_of(found.table, "row", found).verdict == "not run"
    assert claim_of(found.table, "row").verdict == "not run"
    assert summary(found).startswith("Not told")


ROWS = {
    "yes": (41.0, "far above"),
    "no": (42.0, "far below"),
    "perhaps": (43.0, "above by chance"),
    "perhaps not": (44.0, "below by chance"),
    "alike": (40.0, "far above"),
    "later": (45.0, None),
    "unknown": (None, "far above"),
}


def test_the_parts_add_up_and_are_told(made):
    found = made(ROWS)
    given = claims(found.table, found)
    stand = counts(given)
    assert stand == {"same": 1, "opposite": 1, "open, same": 1, "open": 1, "equal": 1, "not run": 1}
    assert sum(stand.values()) == len(given) == 6
    said = summary(found)
    assert said.startswith("Holds in part, at this scale. Of 6 published differences to `base`: ")
    assert "1 resolved with the published sign, 1 resolved with the opposite one (`no`), 2 not resolved" in said
    assert "(with the published sign: 1), 1 published as zero, 1 not run." in said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"yes": 0}, "holds"),
        ({"yes": 0, "alike": 0}, "holds"),
        ({"yes": 0, "perhaps": 0}, "holds where resolved"),
        ({"yes": 0, "later": 0}, "holds where resolved"),
        ({"yes": 0, "no": 0}, "holds in part"),
        ({"no": 0, "perhaps": 0}, "contradicted"),
        ({"perhaps": 0, "perhaps not": 0, "alike": 0}, "open"),
        ({"later": 0}, "open"),
    ],
)
def test_what_the_signs_say_together(made, rows, words):
    found = made({label: ROWS[label] for label in rows})
    assert conclusion(claims(found.table, found)) == words


def test_rows_are_put_in_order_by_what_the_source_prints(made):
    found = made({"yes": (41.0, "far above"), "no": (42.0, "far below"), "unknown": (None, "far above")})
    assert found.table.published_order() == {"base": 0.0, "yes": 1.0, "no": 2.0}
    # Ours: no, base, yes; as published base below yes alone.
    one = order_of(found)
    assert (one.rows, one.agree, one.against) == (3, 1, 2) and one.tau == pytest.approx(-1 / 3)
    assert out_of_order(found) == [("no", "base"), ("no", "yes")]
    assert "But 2 pairs of rows are resolved against the published order: `base` above `no`, `yes` above `no`." in (
        summary(found)
    )


def test_figures_are_put_in_order_where_the_baseline_has_none(made):
    found = made({"yes": (41.0, "far above"), "no": (42.0, "far below")}, published=None)
    assert found.table.published_order() == {"yes": 41.0, "no": 42.0}
    assert claims(found.table, found) == [] and order_of(found).tau == -1
    assert "prints no differences" in summary(found)


def test_a_difference_that_is_not_resolved_is_in_no_order(made):
    found = made({"perhaps not": (44.0, "below by chance")})
    assert order_of(found).against == 1 and out_of_order(found) == []
