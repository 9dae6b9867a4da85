"""What runs leave: a record per run, and one tidy file of all records of a table.

Each run has a folder of its own, named after row, seed, configuration and code, so that runs which differ in any of
these never meet. ``run.json`` in it says what the run is and how it stands; the rest is what ``detfamily train``
writes. The results file is put together from the folders every time, so it can neither lose a run nor count one twice.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detfamily.errors import DataError
from detfamily.experiments.task import DETECTION, TASKS, Task
from detfamily.files import read_json, write_text_atomically
from detfamily.tracking.files import EPOCHS, read_rows

RUN, LOG, RESULTS, PLAN, REPORT = "run.json", "log.txt", "results.jsonl", "plan.json", "report.md"
HOME = Path("runs") / "ablate"

FINISHED, FAILED, RUNNING, CUT_OFF, QUEUED = "finished", "failed", "running", "cut off", "queued"
"""How a run stands. ``running`` is also what a run is left at whose caller was killed; a ``queued`` one waits on a
cluster."""

COST = ("devices", "gpu_hours", "core_hours")
"""What runs of before there were launchers do not say."""

Record = dict[str, Any]
"""A line of the results file."""


@dataclass(frozen=True)
class Plan:
    """What one call of ``detfamily ablate`` asked for; the report is about this.

    Attributes:
        table: the table's file.
        scale: the choice of configs/scale.
        seeds: of every row.
        further: overrides for all runs, without paths.
        rows: label -> identity of its configuration.
        remarks: label -> what the scale could not keep.
        code: identity of the code.
        commit: the same for people.
    """

    table: str
    scale: str
    seeds: tuple[int, ...]
    further: tuple[str, ...]
    rows: Mapping[str, str]
    remarks: Mapping[str, str]
    code: str
    commit: str

    def write(self, folder: Path) -> None:
        write_text_atomically(folder / PLAN, json.dumps(vars(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a folder of runs.

        Raises:
            DataError: there is none, or it is broken.
        """
        content = read_json(folder / PLAN)
        try:
            return cls(**{**content, "seeds": tuple(content["seeds"]), "further": tuple(content["further"])})
        except (TypeError, KeyError) as error:
            raise DataError(f"{folder / PLAN} is not what detfamily ablate writes: {error}") from None

    def holds(self, record: Record) -> bool:
        """Whether a record belongs to the plan: the same code, and the row as it is configured now."""
        return record["code"] == self.code and self.rows.get(record["row"]) == record["config"]


def slug(text: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "row"


def record_of(folder: Path) -> Record | None:
    """The record of a run folder; None where no run has ever been started."""
    try:
        run = read_json(folder / RUN)
    except DataError:
        return None
    epochs, task = read_rows(folder / EPOCHS), task_of(run)
    record: Record = {
        **{key: run[key] for key in ("table", "scale", "row", "seed", "status", "config", "code", "commit")},
        **({"task": run["task"]} if "task" in run else {}),
        "date": run["date"],
        "overrides": run["overrides"],
        "images_seen": _last(epochs, "images_seen") or run.get("images_seen"),
        **dict.fromkeys(task.metrics),
        "images_per_second": _median(epochs, "images_per_second"),
        "memory_gib": _last(epochs, "peak_memory_gib") or run["memory_gib"],
        "memory_of": "cuda" if _last(epochs, "peak_memory_gib") else "process",
        "seconds": run["seconds"],
        **{key: run.get(key) for key in COST},
        "curve": [[row["images_seen"], row[task.metric]] for row in epochs if _measured(row.get(task.metric))],
        "error": run["error"],
    }
    if run["status"] == FINISHED:
        try:
            numbers = read_json(folder / "metrics.json")
        except DataError as error:
            return {**record, "status": FAILED, "error": str(error)}
        record |= {name: numbers[name] for name in task.metrics if _measured(numbers.get(name))}
    return record


def home(table: str, scale: str) -> Path:
    """Where the runs of a table, by its name, lie on a scale by default."""
    return HOME / f"{table}-{scale}"


def collect(folder: Path) -> list[Record]:
    """The records of all runs below a folder, in the order of row, seed, configuration and code."""
    found = [record_of(file.parent) for file in folder.glob(f"*/*/{RUN}")]
    order = ("row", "seed", "config", "code")
    return sorted((one for one in found if one is not None), key=lambda one: [one[key] for key in order])


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Write a results file, complete or not at all."""
    write_text_atomically(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))


def read_results(path: Path) -> list[Record]:
    """Read a results file.

    Raises:
        DataError: there is none, or a line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the results {path}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({key: record[key] for key in (*_KEYS, *task_of(record).metrics, *record)})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}, is not the record of a run: {error}") from None
    return records


_KEYS = ("table", "scale", "row", "seed", "status", "config", "code", "commit", "images_seen", "curve")


def task_of(record: Mapping[str, Any]) -> Task:
    """What a run trained; those of before there were several tasks, and all of detectors, do not say it."""
    return TASKS[record.get("task", "detection")]


def values(records: Sequence[Record], row: str, metric: str = DETECTION.metric) -> dict[int, float]:
    """Seed -> value in per cent, of the finished runs of a row."""
    return {
        one["seed"]: 100 * one[metric]
        for one in records
        if one["row"] == row and one["status"] == FINISHED and one[metric] is not None
    }


def _measured(value: float | None) -> bool:
    """COCO's -1 says that there was nothing to measure."""
    return value is not None and value >= 0


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(found) if found else None
