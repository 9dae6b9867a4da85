from __future__ import annotations

import doctest
import io
import sys

import pytest

from detfamily.tracking import console
from detfamily.tracking.console import ConsoleTracker, ProgressBar, epoch_line
from detfamily.tracking.tracker import RunInfo


def test_the_documented_line_is_the_printed_one(tmp_path, capsys):
    assert doctest.testmod(console).failed == 0
    tracker = ConsoleTracker()
    tracker.start(RunInfo("toy", tmp_path, {}, 12))
    tracker.log_epoch({"loss": 1.5, "AP": 0.125}, epoch=3, step=30)
    assert capsys.readouterr().out == "epoch  3/12  AP 12.5  loss 1.500\n"


@pytest.mark.parametrize(("seconds", "words"), [(59, "0:59 left"), (61, "1:01 left"), (7325, "2:02:05 left")])
def test_the_time_that_is_left(seconds, words):
    assert epoch_line({"seconds_left": seconds}, 1, 2) == f"epoch 1/2  {words}"


def test_an_epoch_without_evaluation_has_no_ap_and_none_is_invented():
    assert epoch_line({"loss": 1.0}, 1, 2) == "epoch 1/2  loss 1.000"
    assert epoch_line({"loss": 1.0, "AP": -1.0, "AP50": -1.0}, 1, 2) == "epoch 1/2  loss 1.000"


def test_an_epoch_of_a_classifier_shows_its_accuracy():
    assert epoch_line({"loss": 1.0, "top1": 0.5, "top5": 0.75}, 1, 2) == "epoch 1/2  top1 50.0  top5 75.0  loss 1.000"


def test_off_a_terminal_progress_is_plain_lines(capsys):
    with ProgressBar("epoch 1/2", total=3, every=0.0) as bar:
        bar.advance("loss 2.000")
        bar.advance()
        bar.advance()
    assert capsys.readouterr().out == "epoch 1/2: 1/3  loss 2.000\nepoch 1/2: 2/3  loss 2.000\n"


def test_short_work_and_other_processes_are_silent(capsys):
    for settings in ({"every": 100.0}, {"every": 0.0, "shown": False}):
        with ProgressBar("epoch", total=3, **settings) as bar:
            bar.advance()
            bar.advance()
    assert capsys.readouterr().out == ""


def test_on_a_terminal_progress_is_a_bar_that_goes_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar("epoch 1/2", total=2) as bar:
        bar.advance("loss 2.000")
        bar.advance()
    assert "epoch 1/2" in terminal.getvalue() and bar.done == 2
