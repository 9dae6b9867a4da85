from __future__ import annotations

import csv
import json

from detfamily.tracking.files import FilesTracker, read_rows
from detfamily.tracking.tracker import RunInfo


def started(folder, resumed_at=None):
    tracker = FilesTracker()
    tracker.start(RunInfo("toy", folder, {}, 3, resumed_at, epochs_done=(resumed_at or 0) // 10))
    return tracker


def test_epochs_and_steps_are_lines_and_epochs_a_table(tmp_path):
    tracker = started(tmp_path)
    tracker.log_step({"loss": 2.5}, step=5)
    tracker.log_epoch({"loss": 2.0}, epoch=1, step=10)
    tracker.log_epoch({"loss": 1.0, "AP/a, b": 0.5}, epoch=2, step=20)
    assert read_rows(tmp_path / "train_steps.jsonl") == [{"step": 5, "loss": 2.5}]
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"epoch": 1, "step": 10, "loss": 2.0},
        {"epoch": 2, "step": 20, "loss": 1.0, "AP/a, b": 0.5},
    ]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["AP/a, b"] for row in rows] == ["", "0.5"] and rows[1]["loss"] == "1.0"


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    started(tmp_path).log_epoch({"loss": float("nan"), "AP": float("inf")}, epoch=1, step=1)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {"epoch": 1, "step": 1, "loss": None, "AP": None}


def test_a_resumed_run_replaces_what_comes_again(tmp_path):
    tracker = started(tmp_path)
    for step in (5, 10, 15):
        tracker.log_step({"loss": 1.0}, step)
    tracker.log_epoch({"loss": 1.0}, epoch=1, step=10)
    tracker.log_epoch({"loss": 1.0}, epoch=2, step=20)
    again = started(tmp_path, resumed_at=10)
    again.log_step({"loss": 9.0}, 15)
    again.log_epoch({"loss": 9.0}, epoch=2, step=20)
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "train_steps.jsonl")] == [
        (5, 1.0),
        (10, 1.0),
        (15, 9.0),
    ]
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0, 9.0]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_the_row_of_an_epoch_that_was_cut_off_in_its_evaluation_comes_again(tmp_path):
    """All its steps were done; whether its row was written, too, is a matter of chance."""
    tracker = started(tmp_path)
    for epoch in (1, 2):
        tracker.log_epoch({"loss": 1.0}, epoch, step=10 * epoch)
    again = FilesTracker()
    again.start(RunInfo("toy", tmp_path, {}, 3, resumed_at=20, epochs_done=1))
    again.log_epoch({"loss": 1.0}, epoch=2, step=20)
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(tmp_path / "a.jsonl") == [{"step": 1}]
    assert read_rows(tmp_path / "none.jsonl") == []
