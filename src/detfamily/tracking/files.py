"""The numbers of a run as files in its folder: kept always, read by the plots and the reports.

``metrics.jsonl`` has one line per epoch, ``train_steps.jsonl`` one every ``tracking.log_every`` steps; ``metrics.csv``
is the former as a table. NaN and infinity, which json has no word for, are written as null.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detfamily.files import append_text, write_text_atomically
from detfamily.tracking.tracker import Metrics, RunInfo, Tracker

EPOCHS, STEPS, TABLE = "metrics.jsonl", "train_steps.jsonl", "metrics.csv"


class FilesTracker(Tracker):
    """Writes ``metrics.jsonl``, ``metrics.csv`` and ``train_steps.jsonl`` into the run folder."""

    essential = True  # where all other places get what they lack

    def start(self, run: RunInfo) -> None:
        self.folder = run.folder
        for name, key, last in ((EPOCHS, "epoch", run.epochs_done), (STEPS, "step", run.resumed_at)):
            path = self.folder / name
            if run.resumed_at is not None and last is not None and path.exists():
                _rewrite(path, [row for row in read_rows(path) if row[key] <= last])
        self.epochs = read_rows(self.folder / EPOCHS)

    def log_step(self, metrics: Metrics, step: int) -> None:
        _append(self.folder / STEPS, {"step": step, **_plain(metrics)})

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        row = {"epoch": epoch, "step": step, **_plain(metrics)}
        _append(self.folder / EPOCHS, row)
        self.epochs.append(row)
        text = io.StringIO()
        columns = list(dict.fromkeys(key for one in self.epochs for key in one))
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.epochs)
        write_text_atomically(self.folder / TABLE, text.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of json lines; empty where there is none. A last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _append(path: Path, row: Mapping[str, Any]) -> None:
    append_text(path, json.dumps(row, allow_nan=False) + "\n")


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text_atomically(path, text)


def _plain(metrics: Metrics) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
