from __future__ import annotations

import sys

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED
from detfamily.sweeps.study import Study, import_optuna
from detfamily.sweeps.trial import PRUNED

optuna = pytest.importorskip("optuna")


def run(study, value=lambda point: point["optimizer.lr"]):
    """Go through a study; the points that it proposed."""
    points = []
    while (one := study.next()) is not None:
        points.append(one.point)
        study.ended(one.number, FINISHED, value(one.point))
    return points


def test_a_study_that_goes_on_proposes_what_one_at_a_stretch_does(sweep, tmp_path):
    for name in ("at_a_stretch", "in_parts"):
        (tmp_path / name).mkdir()
    whole = run(Study(sweep, tmp_path / "at_a_stretch", 7))
    parts = [point for count in (2, 5, 7) for point in run(Study(sweep, tmp_path / "in_parts", count))]
    assert parts == whole and len({one["optimizer.lr"] for one in whole}) == 7
    assert run(Study(sweep, tmp_path / "in_parts", 7)) == []


def test_what_was_good_is_tried_more_often(sweep, tmp_path):
    drawn = sorted(one["optimizer.lr"] for one in run(Study(sweep, tmp_path, 16))[8:])
    assert drawn[4] > 0.03  # at random, half of them are below 0.01


def test_a_trial_that_was_cut_off_is_proposed_again_with_what_it_reported(sweep, tmp_path):
    before = Study(sweep, tmp_path, 2)
    first = before.next()
    assert before.report(first.number, 1, 0.25) is False
    other = before.next()
    before.ended(other.number, CUT_OFF, None)
    after = Study(sweep, tmp_path, 2)
    assert [one.state for one in after.known()] == [CUT_OFF, CUT_OFF]
    assert [after.next(), after.next(), after.next()] == [first, other, None]
    after.report(first.number, 1, 0.75)  # the epoch comes again
    after.report(first.number, 2, 0.5)
    after.ended(first.number, FINISHED, 0.5)
    kept = optuna.load_study(study_name=sweep.name, storage=f"sqlite:///{tmp_path / 'study.db'}").trials[0]
    assert kept.intermediate_values == {1: 0.25, 2: 0.5} and kept.value == 0.5


def test_a_worse_trial_is_given_up_and_failed_ones_do_not_count(sweep, tmp_path):
    study = Study(sweep, tmp_path, 2)
    good = study.next()
    assert not study.report(good.number, 1, 0.5)
    study.ended(good.number, FINISHED, 0.5)
    failed = study.next()
    study.ended(failed.number, FAILED, None)
    bad = study.next()
    assert study.report(bad.number, 1, 0.4)
    study.ended(bad.number, PRUNED, 0.4)
    assert study.next() is None
    assert [one.state for one in Study(sweep, tmp_path, 2).known()] == [FINISHED, FAILED, PRUNED]


def test_without_optuna_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'detfamily\[sweeps\]', or take method=grid"):
        import_optuna()
