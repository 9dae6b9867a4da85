"""Runs of a table as processes of their own: started in turn, several at once, resumed, never two in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detfamily.engine.interrupt import Interruption
from detfamily.errors import DataError
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED, LOG, RUN, RUNNING, slug
from detfamily.experiments.scale import Variant
from detfamily.experiments.task import DETECTION, TASKS
from detfamily.experiments.version import PACKAGE, Code, code_version
from detfamily.files import read_json, write_text_atomically
from detfamily.tracking.console import epoch_line
from detfamily.tracking.files import EPOCHS, read_rows
from detfamily.tracking.labels import label_words

try:
    import fcntl
except ImportError:  # not on Windows; there, two calls at once may start the same run
    fcntl = None  # type: ignore[assignment]

LAUNCH = (sys.executable, "-m", "detfamily")
POLL = 0.1  # seconds between two looks at the processes
PATIENCE = 120  # seconds for a run to finish its step, save and leave, before it is killed
TAIL = 15  # lines of a failed run's log that are shown

_INTERRUPTED = tuple(code for one in (signal.SIGINT, signal.SIGTERM) for code in (-one, 128 + one))


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        table: name of the table.
        scale: name of the scale.
        variant: the row on that scale.
        seed: of the training.
        code: that it is made with.
        root: folder of all runs of the table.
        source: the run whose weights are evaluated; None for a run that trains.
    """

    table: str
    scale: str
    variant: Variant
    seed: int
    code: Code
    root: Path
    source: Run | None = None

    @property
    def name(self) -> str:
        return f"{self.variant.row.label}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """``<row>/seed<seed>-<configuration>-<code>`` below the root."""
        identity = f"seed{self.seed}-{self.variant.identity}-{self.code.identity}"
        return self.root / slug(self.variant.row.label) / identity

    def words(self, threads: int | None = None) -> list[str]:
        """The words of the command line after ``detfamily``."""
        cores = [] if threads is None else [f"runtime.threads={threads}"]
        if self.source is not None:
            checkpoint = [f"checkpoint={self.source.folder / 'last.pt'}"]
            return ["evaluate", *checkpoint, *self.variant.overrides, *cores, f"output_dir={self.folder}"]
        tags = (self.variant.row.label, f"seed {self.seed}", self.scale)
        given = [*cores, *self.variant.overrides, *label_words(self.variant.config, self.table, tags)]
        return [self.variant.task.command, *given, f"seed={self.seed}", f"output_dir={self.folder}", "resume=auto"]

    def state(self) -> dict[str, Any]:
        """What ``run.json`` says; empty where the run was never started."""
        try:
            found = read_json(self.folder / RUN)
        except DataError:
            return {}
        return found if isinstance(found, dict) else {}

    def status(self) -> str | None:
        """How it stands; None where it was never started. A run that nobody runs any more was cut off."""
        status = self.state().get("status")
        if status == FINISHED and not (self.folder / "metrics.json").is_file():
            return CUT_OFF
        if status == RUNNING and not self.is_locked():
            return CUT_OFF
        return status

    def is_locked(self) -> bool:
        """Whether a process of this or another call is at it."""
        handle = self._lock()
        if handle is None:
            return True
        os.close(handle)
        return False

    def progress(self) -> float:
        """The share of the epochs that is done, 0 to 1."""
        if self.source is not None or not (rows := read_rows(self.folder / EPOCHS)):
            return 0.0
        return float(min(1.0, rows[-1]["epoch"] / self.variant.config["schedule"]["epochs"]))

    def _lock(self) -> int | None:
        """Take the folder's lock, which the run's process inherits and keeps for as long as it lives."""
        if not self.folder.is_dir():
            return os.open(os.devnull, os.O_RDONLY)
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                return None
        return handle


class Process:
    """A run under way.

    Args:
        run: what runs; its folder's lock is taken.
        lock: file descriptor that holds the lock.
        launch: how detfamily is called.
        threads: of the CPU's operators; None leaves torch's choice.
    """

    def __init__(self, run: Run, lock: int, launch: Sequence[str], threads: int | None) -> None:
        self.run, self.started, self.seen = run, time.time(), 0
        before = run.state()
        self.seconds = float(before.get("seconds") or 0) + _unseen_seconds(run, before)
        self.memory = float(before.get("memory_gib") or 0)
        self.shown = len(read_rows(run.folder / EPOCHS))
        self.write(RUNNING)
        places = (str(PACKAGE.parent), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        try:
            with (run.folder / LOG).open("ab") as log:
                self.process = subprocess.Popen(
                    [*launch, *run.words(threads)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that Ctrl-C reaches the caller alone, who tells the runs in its order
                    pass_fds=(lock,) if os.name == "posix" else (),
                )
        finally:
            os.close(lock)

    def write(self, status: str, error: str | None = None) -> None:
        """Note in ``run.json`` how the run stands."""
        run, source, task = self.run, self.run.source, self.run.variant.task
        images = _images_seen(source) if source else None
        content = {
            "table": run.table,
            "scale": run.scale,
            **({} if task is DETECTION else {"task": next(name for name, one in TASKS.items() if one is task)}),
            "row": run.variant.row.label,
            "seed": run.seed,
            "status": status,
            "config": run.variant.identity,
            "code": run.code.identity,
            "commit": run.code.commit,
            "overrides": [one for one in run.variant.overrides if not one.startswith("data.root=")],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "started": self.started,
            "seconds": round(self.seconds + (0 if status == RUNNING else time.time() - self.started), 2),
            "memory_gib": round(self.memory, 3) or None,
            "images_seen": images,
            "error": error,
        }
        write_text_atomically(run.folder / RUN, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def poll(self) -> bool:
        """Whether the process has ended; its largest resident memory is noted then."""
        if self.process.returncode is not None:
            return True
        if not hasattr(os, "wait4"):
            return self.process.poll() is not None
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        unit = 1 if sys.platform == "darwin" else 1024
        self.memory = max(self.memory, usage.ru_maxrss * unit / 2**30)
        return True

    def new_epochs(self) -> list[str]:
        """The lines of the epochs that have ended since the last call."""
        try:
            size = (self.run.folder / EPOCHS).stat().st_size
        except OSError:
            return []
        if size == self.seen:
            return []
        self.seen = size
        rows = read_rows(self.run.folder / EPOCHS)
        fresh, self.shown = rows[self.shown :], max(self.shown, len(rows))
        epochs = self.run.variant.config["schedule"]["epochs"]
        numbers = [{key: value for key, value in row.items() if value is not None} for row in fresh]
        return [epoch_line(row, int(row["epoch"]), epochs) for row in numbers]

    def close(self) -> str | None:
        """Note how it ended; returns what went wrong, or None."""
        code = self.process.returncode
        if code == 0 and (self.run.folder / "metrics.json").is_file():
            self.write(FINISHED)
            return None
        if code in _INTERRUPTED:
            self.write(CUT_OFF)
            return "stopped by a signal"
        ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        error = f"{ended}; {_last_words(self.run.folder / LOG)}"
        self.write(FAILED, error)
        return error


class Runner:
    """Goes through runs.

    Args:
        runs: in this order; a run that evaluates comes after its source.
        jobs: how many at once.
        say: prints a line.
        ended: called after each run that ended, however it did.
        launch: how detfamily is called.
        code: asked for the present code before each start.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        jobs: int,
        say: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
        launch: Sequence[str] = LAUNCH,
        code: Callable[[], Code] = code_version,
    ) -> None:
        self.waiting, self.jobs, self.say, self.ended = list(runs), jobs, say, ended
        self.launch, self.code = launch, code
        self.total, self.number = len(self.waiting), 0
        self.threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
        self.running: list[Process] = []
        self.problems: dict[str, str] = {}

    def go(self) -> dict[str, str]:
        """Run all.

        Returns:
            name of each run that failed or could not be started -> what went wrong; in no case did it stop the others.

        Raises:
            SystemExit: after Ctrl-C or SIGTERM, when the runs under way have been saved.
        """
        with Interruption() as interruption:
            try:
                while (self.waiting or self.running) and not interruption.wanted:
                    while len(self.running) < self.jobs and (run := self._next()) is not None:
                        self._start(run)
                    self._look()
                    time.sleep(POLL)
                if interruption.wanted:
                    self._stop(interruption.exit_code)
            finally:
                for one in self.running:  # a second Ctrl-C, or an error of ours
                    one.process.kill()
        return self.problems

    def _next(self) -> Run | None:
        """The next run that can be started; those that cannot be any more are taken out."""
        for run in list(self.waiting):
            source = run.source
            if source is not None and source.status() != FINISHED:
                if source in self.waiting or any(one.run == source for one in self.running):
                    continue
                self.waiting.remove(run)
                self.problems[run.name] = f"there are no weights: {source.name} has not finished"
                continue
            self.waiting.remove(run)
            return run
        return None

    def _start(self, run: Run) -> None:
        self.number += 1
        where = f"[{self.number}/{self.total}] {run.name}"
        if (now := self.code()).identity != run.code.identity:
            self.problems[run.name] = f"not started: the code has changed since ({run.code.commit}, now {now.commit})"
            self.say(f"{where}: {self.problems[run.name]}")
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = run._lock()
        if lock is None:
            self.problems[run.name] = f"another call is at it, in {run.folder}"
            self.say(f"{where}: {self.problems[run.name]}")
            return
        process = Process(run, lock, self.launch, self.threads)
        self.running.append(process)
        self.say(f"{where}: {'goes on' if process.shown else 'starts'}, in {run.folder}")

    def _look(self) -> None:
        for one in list(self.running):
            has_ended = one.poll()
            for line in one.new_epochs():
                self.say(f"  {one.run.name}: {line}")
            if has_ended:
                self.running.remove(one)
                error = one.close()
                if error is not None:
                    self.problems[one.run.name] = error
                failed = "" if one.run.status() == CUT_OFF else "FAILED, "
                self.say(f"  {one.run.name}: {'done' if error is None else failed + error.splitlines()[0]}")
                self.ended()

    def _stop(self, exit_code: int) -> None:
        """Ask each process, by its own id, to save and leave."""
        self.say(f"stopping: {len(self.running)} runs finish their step and save (once more: at once)")
        for one in self.running:
            one.process.terminate()
        until = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < until:
            self._look()
            time.sleep(POLL)
        self.say("the same command goes on from here")
        raise SystemExit(exit_code)


def tail(file: Path, lines: int = TAIL) -> str:
    """The last lines of a log."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _last_words(log: Path) -> str:
    last = tail(log, 1).strip()
    return last[:300] if last else "its log is empty"


def _unseen_seconds(run: Run, before: dict[str, Any]) -> float:
    """How long a run lasted whose end nobody noted: until the last line of its log."""
    if before.get("status") != RUNNING:
        return 0.0
    try:
        return max(0.0, (run.folder / LOG).stat().st_mtime - float(before["started"]))
    except (OSError, KeyError):
        return 0.0


def _images_seen(run: Run) -> float | None:
    rows = read_rows(run.folder / EPOCHS)
    return rows[-1]["images_seen"] if rows else None
