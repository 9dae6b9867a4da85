from __future__ import annotations

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments.results import FAILED, FINISHED
from detfamily.sweeps.drawn import Drawn, at_random, grid
from detfamily.sweeps.sweep import read_sweep


def test_a_grid_has_all_combinations(write_sweep):
    parameters = {"seed": {"int": [0, 2]}, "decoder": {"choice": ["plain", "refine"]}}
    found = grid(read_sweep(write_sweep(parameters=parameters)))
    assert [(one["seed"], one["decoder"]) for one in found] == [
        (seed, decoder) for seed in (0, 1, 2) for decoder in ("plain", "refine")
    ]


def test_a_grid_of_ranges_is_refused(sweep):
    with pytest.raises(ConfigError, match=r"optimizer.lr: a grid needs values .*log_uniform has none: write choice"):
        grid(sweep)


def test_more_points_begin_with_fewer(sweep, write_sweep):
    assert at_random(sweep, 9)[:4] == at_random(sweep, 4)
    assert len({one["optimizer.lr"] for one in at_random(sweep, 9)}) == 9
    assert at_random(read_sweep(write_sweep(seed=1)), 4) != at_random(sweep, 4)


def test_what_is_done_is_not_proposed_again():
    points = [{"a": number} for number in range(4)]
    states = {1: FINISHED, 2: FAILED}
    drawn = Drawn(points, lambda one: states.get(one.number))
    assert [drawn.next() for _ in range(4)] == [(0, {"a": 0}), (2, {"a": 2}), (3, {"a": 3}), None]
    states[0] = FINISHED
    drawn.ended(0, FAILED, None)  # its training finished, without a value
    assert [(one.number, one.state) for one in drawn.known()] == [(0, FAILED), (1, FINISHED), (2, FAILED)]
