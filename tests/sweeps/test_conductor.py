"""The loop, with a stand-in for the training."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from detfamily.experiments.hold import Hold
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED
from detfamily.sweeps.conductor import Conductor
from detfamily.sweeps.drawn import Drawn
from detfamily.sweeps.proposals import Proposal
from detfamily.sweeps.trial import PRUNED, trial_of

POINTS = [{"optimizer.lr": lr, "decoder": decoder} for lr in (0.05, 0.1) for decoder in ("plain", "refine")]


@pytest.fixture
def drawn(make):
    return lambda points=POINTS: Drawn(points, lambda one: make(one).status())


@pytest.fixture
def conduct(sweep, make, launch, capsys):
    def conduct(proposals, jobs=1):
        problems = Conductor(sweep, proposals, make, jobs, print, launch=launch).go()
        return problems, capsys.readouterr().out

    return conduct


def calls(folder):
    return sum(log.read_text().count("called:") for log in folder.rglob("log.txt"))


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_each_trial_is_trained_once_in_a_folder_of_its_own(conduct, drawn, make, tmp_path):
    proposals = drawn()
    problems, said = conduct(proposals)
    assert not problems and "trial 3 starts: optimizer.lr 0.1, decoder refine" in said
    assert "trial 3: finished, AP 40.0" in said
    found = [trial_of(*one, make(one).folder, "AP") for one in proposals.known()]
    assert [(one.state, one.value, one.epochs) for one in found] == [
        (FINISHED, 4 * p["optimizer.lr"], 4) for p in POINTS
    ]
    words = (tmp_path / "runs/trials/0002/log.txt").read_text().split()
    assert words[1:4] == ["train", "optimizer.lr=0.1", "decoder=plain"] and words[-1] == "resume=auto"
    assert json.loads((tmp_path / "runs/trials/0002/run.json").read_text())["row"] == "trial 2"
    conduct(drawn())
    assert calls(tmp_path) == 4


def test_two_at_once(conduct, drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert conduct(drawn(), jobs=2)[0] == {} and calls(tmp_path) == 4
    assert "runtime.threads=4" in (tmp_path / "runs/trials/0000/log.txt").read_text()


def test_a_failing_trial_is_named_and_tried_again_by_the_next_call(conduct, drawn, monkeypatch):
    monkeypatch.setenv("STAND_IN", "fail refine")
    problems, said = conduct(drawn())
    assert list(problems) == ["trial 1", "trial 3"] and "the planted fault" in problems["trial 1"]
    assert "trial 1: failed" in said
    monkeypatch.delenv("STAND_IN")
    proposals = drawn()
    assert conduct(proposals)[0] == {} and [one.state for one in proposals.known()] == [FINISHED] * 4


def test_where_everything_fails_no_more_is_started(conduct, drawn, monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN", "fail")
    problems, said = conduct(drawn())
    assert len(problems) == calls(tmp_path) == 3 and "3 trials in a row have failed" in said


def test_a_trial_without_the_metric_has_failed(conduct, drawn, monkeypatch):
    monkeypatch.setenv("STAND_IN", "blind")
    proposals = drawn(POINTS[:1])
    problems, _ = conduct(proposals)
    assert problems == {"trial 0": "there is no AP in its metrics.jsonl"}
    assert [one.state for one in proposals.known()] == [FAILED]


def test_a_worse_trial_is_ended_after_its_epoch(conduct, sweep, make, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from detfamily.sweeps.study import Study

    monkeypatch.setenv("STAND_IN", "hang if bad")
    study = Study(sweep, tmp_path / "runs", 3)
    for lr in (0.08, 0.02, 0.09):
        study.study.enqueue_trial({"optimizer.lr": lr, "decoder": "plain"})
    problems, said = conduct(study)
    assert not problems and "trial 1: given up after epoch 1" in said and "trial 1: pruned, AP 2.0" in said
    found = [trial_of(*one, make(one).folder, "AP") for one in study.known()]
    assert [(one.state, one.epochs, one.error) for one in found] == [
        (FINISHED, 4, None),
        (PRUNED, 1, None),
        (FINISHED, 4, None),
    ]
    assert study.study.trials[1].intermediate_values == {1: 0.02}
    assert study.study.best_trial.number == 2 and study.study.best_value == pytest.approx(0.36)
    assert conduct(Study(sweep, tmp_path / "runs", 3)) == ({}, "")


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_after_ctrl_c_the_trial_goes_on_where_it_was(conduct, sweep, make, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from detfamily.sweeps.study import Study

    monkeypatch.setenv("STAND_IN", "hang")

    def press():
        wait_for(lambda: list(tmp_path.rglob("ready")))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(SystemExit) as caught:
        conduct(Study(sweep, tmp_path / "runs", 2))
    thread.join()
    assert caught.value.code == 130
    after = Study(sweep, tmp_path / "runs", 2)
    (cut_off,) = after.known()
    assert cut_off.state == CUT_OFF and make(cut_off).status() == CUT_OFF
    monkeypatch.delenv("STAND_IN")
    problems, said = conduct(after)
    assert not problems and "trial 0 goes on" in said
    found = [trial_of(*one, make(one).folder, "AP") for one in after.known()]
    assert [(one.number, one.state, one.epochs) for one in found] == [(0, FINISHED, 4), (1, FINISHED, 4)]
    assert found[0].point == cut_off.point and calls(tmp_path) == 3
    assert len((make(cut_off).folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_trial_that_another_process_is_at_is_left_to_it(conduct, drawn, make):
    folder = make(Proposal(1, POINTS[1])).folder
    folder.mkdir(parents=True)
    hold = Hold.take(folder)
    assert hold is not None
    problems, _ = conduct(drawn())
    hold.release()
    assert list(problems) == ["trial 1"] and "another process is at it" in problems["trial 1"]
