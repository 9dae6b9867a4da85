from __future__ import annotations

import threading

import pytest

from detfamily.tracking.tracker import RunInfo, Tracker
from detfamily.tracking.trackers import Trackers, words_of


class Recorder(Tracker):
    """Remembers what it is told, and fails where it is asked to."""

    def __init__(self, *fails, patience=None, essential=False, error=None):
        self.calls, self.fails, self.error = [], fails, error or OSError("no space")
        self.patience, self.essential = patience, essential

    def _note(self, call, *values):
        self.calls.append((call, *values))
        if call in self.fails:
            raise self.error

    def start(self, run):
        self._note("start", run.name)

    def log_step(self, metrics, step):
        self._note("log_step", dict(metrics), step)

    def log_epoch(self, metrics, epoch, step):
        self._note("log_epoch", dict(metrics), epoch, step)

    def log_image(self, name, path, step):
        self._note("log_image", name, step)

    def finish(self, completed=True):
        self._note("finish", completed)


def drive(trackers, folder):
    trackers.start(RunInfo("toy", folder, {}, 1))
    trackers.log_step({"loss": 1.0}, 1)
    trackers.log_epoch({"loss": 1.0}, 1, 2)
    trackers.log_epoch({"loss": 0.5}, 2, 4)
    trackers.log_image("curves", folder, 4)
    trackers.finish(False)


EVERYTHING = [
    ("start", "toy"),
    ("log_step", {"loss": 1.0}, 1),
    ("log_epoch", {"loss": 1.0}, 1, 2),
    ("log_epoch", {"loss": 0.5}, 2, 4),
    ("log_image", "curves", 4),
    ("finish", False),
]


@pytest.mark.parametrize("patience", [None, 60.0])
@pytest.mark.parametrize(
    "fails", [(), ("log_step",), ("log_epoch",), ("log_image",), ("finish",), ("log_step", "finish")]
)
def test_one_that_fails_is_warned_of_once_and_the_others_are_told_everything(tmp_path, capsys, fails, patience):
    members = [Recorder(), Recorder(*fails, patience=patience), Recorder(patience=patience), Tracker()]
    drive(Trackers(members), tmp_path)
    assert [one.calls for one in members[:3]] == [EVERYTHING] * 3
    warnings = ["warning: recorder: OSError: no space; the run's own files have everything"] if fails else []
    assert capsys.readouterr().out.splitlines() == warnings


@pytest.mark.parametrize("patience", [None, 60.0])
def test_one_that_cannot_start_is_left_alone(tmp_path, capsys, patience):
    members = [Recorder("start", patience=patience), Recorder()]
    drive(Trackers(members), tmp_path)
    assert members[0].calls == EVERYTHING[:1] and members[1].calls == EVERYTHING
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_essential_one_ends_the_run(tmp_path):
    with pytest.raises(OSError, match="no space"):
        drive(Trackers([Recorder("log_epoch", essential=True)]), tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_the_wish_to_end_is_no_fault(tmp_path, error):
    with pytest.raises(type(error)):
        drive(Trackers([Recorder("log_step", error=error)]), tmp_path)


def test_one_with_patience_does_not_hold_up_the_training(tmp_path):
    """It blocks in its first call until the training has logged everything."""
    logged = threading.Event()

    class Slow(Recorder):
        def start(self, run):
            assert logged.wait(60)
            super().start(run)

    slow = Slow(patience=60.0)
    trackers = Trackers([slow])
    metrics = {"loss": 1.0}
    trackers.start(RunInfo("toy", tmp_path, {}, 1))
    trackers.log_step(metrics, 1)
    metrics["loss"] = 2.0  # what was logged is what it was then
    logged.set()
    trackers.finish()
    assert slow.calls == [("start", "toy"), ("log_step", {"loss": 1.0}, 1), ("finish", True)]


def test_one_that_hangs_is_left_alone_when_patience_is_over(tmp_path, capsys):
    class Hanging(Recorder):
        def __init__(self):
            super().__init__(patience=0.05)
            self.free = threading.Event()

        def log_step(self, metrics, step):
            self.free.wait(60)
            raise ConnectionError("this comes too late to be of interest")

        def abandon(self):
            self.free.set()

    hanging, other = Hanging(), Recorder()
    drive(Trackers([hanging, other]), tmp_path)
    assert other.calls == EVERYTHING and hanging.free.is_set()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: hanging: TimeoutError: it was not done after 0.05 s, and is left alone; "
        "the run's own files have everything"
    ]


def test_words_are_one_line_without_the_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert words_of(ValueError("bad key 0123456789abcdef\nand more")) == "ValueError: bad key <key>"
    assert words_of(TimeoutError()) == "TimeoutError"
    assert len(words_of(ValueError("a" * 1000))) < 330
