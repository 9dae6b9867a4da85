"""How a run stands, in its folder: ``run.json``, and ``job.json`` where a cluster has it.

Whoever holds the folder writes ``run.json``: first the caller, then the process that runs, on whatever machine.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detfamily.errors import DataError
from detfamily.experiments.results import LOG, RUN, RUNNING
from detfamily.files import read_json, write_text_atomically

JOB = "job.json"
TAIL = 15  # lines of a failed run's log that are shown


def read_state(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says; empty where the run was never started."""
    return _read(folder / RUN)


def read_job(folder: Path) -> dict[str, Any]:
    """What ``job.json`` says: the launcher, and what its jobs are found by; empty where there is none."""
    return _read(folder / JOB)


def note(folder: Path, **changes: Any) -> None:
    """Change what ``run.json`` says."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    _write(folder / RUN, {**read_state(folder), **changes, "date": date})


def note_job(folder: Path, record: dict[str, Any]) -> None:
    """Say which job of which cluster a run is."""
    _write(folder / JOB, record)


def forget_job(folder: Path) -> None:
    """The run is no job any more."""
    (folder / JOB).unlink(missing_ok=True)


def unseen_seconds(folder: Path) -> float:
    """How long a part of a run lasted whose end nobody noted: until the last line of its log."""
    before = read_state(folder)
    if before.get("status") != RUNNING:
        return 0.0
    try:
        return max(0.0, (folder / LOG).stat().st_mtime - float(before["started"]))
    except (OSError, KeyError):
        return 0.0


def tail(file: Path, lines: int = TAIL) -> str:
    """The last lines of a log."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def last_words(folder: Path) -> str:
    """The last line of a run's log."""
    last = tail(folder / LOG, 1).strip()
    return last[:300] if last else "its log is empty"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
