"""Several trackers as one, of which each fails or hangs alone."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detfamily.tracking.tracker import Metrics, RunInfo, Tracker


class Trackers(Tracker):
    """Several trackers as one.

    A member that raises is warned of once, and does not concern the others or the training; only an ``essential`` one
    ends the run. One that has ``patience`` is told in a thread of its own, so that it cannot hold up the training.

    Args:
        members: told in this order.
    """

    def __init__(self, members: Sequence[Tracker]) -> None:
        self.members = [one if one.patience is None else Background(one) for one in members]
        self._warned: set[int] = set()
        self._dead: set[int] = set()

    def start(self, run: RunInfo) -> None:
        self._tell("start", run)

    def log_step(self, metrics: Metrics, step: int) -> None:
        self._tell("log_step", metrics, step)

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        self._tell("log_epoch", metrics, epoch, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._tell("log_image", name, path, step)

    def finish(self, completed: bool = True) -> None:
        self._tell("finish", completed)

    def _tell(self, call: str, *values: Any) -> None:
        for index, member in enumerate(self.members):
            if index in self._dead:
                continue
            try:
                getattr(member, call)(*values)
            except Exception as error:
                if member.essential:
                    raise
                if call == "start":
                    self._dead.add(index)
                if index not in self._warned:
                    self._warned.add(index)
                    warn(member, error)


class Background(Tracker):
    """Tells a tracker in a thread of its own.

    Nothing that the tracker does takes time of the training, whatever it waits for; the end of the run waits for it,
    but no longer than its ``patience``. If it raises, there is one warning, and it is told what comes next all the
    same; one that could not start is left alone.

    Args:
        member: the tracker, with a ``patience``.
    """

    def __init__(self, member: Tracker) -> None:
        assert member.patience is not None
        self.member, self.seconds = member, member.patience
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._done = threading.Event()
        self._abandoned = False

    def start(self, run: RunInfo) -> None:
        self._calls.put(("start", (run,)))
        # A daemon: a thread that hangs must not keep the process from ending.
        name = f"tracking-{type(self.member).__name__}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def log_step(self, metrics: Metrics, step: int) -> None:
        self._calls.put(("log_step", (dict(metrics), step)))

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        self._calls.put(("log_epoch", (dict(metrics), epoch, step)))

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._calls.put(("log_image", (name, path, step)))

    def finish(self, completed: bool = True) -> None:
        self._calls.put(("finish", (completed,)))
        quiet = min(5.0, self.seconds)
        if self._done.wait(quiet):
            return
        print(f"waiting for {_name(self.member)}, {self.seconds:g} s at the most", flush=True)
        if not self._done.wait(self.seconds - quiet):
            self._abandoned = True
            self.member.abandon()
            raise TimeoutError(f"it was not done after {self.seconds:g} s, and is left alone")

    def _work(self) -> None:
        alive, warned, call = True, False, ""
        try:
            while call != "finish":
                call, values = self._calls.get()
                try:
                    if alive:
                        getattr(self.member, call)(*values)
                except Exception as error:
                    alive = alive and call != "start"
                    if not (warned or self._abandoned):
                        warned = True
                        warn(self.member, error)
        finally:
            self._done.set()


def warn(tracker: Tracker, reason: Exception, and_now: str = "the run's own files have everything") -> None:
    """Print one line about a tracker in trouble.

    Args:
        tracker: the one.
        reason: what happened.
        and_now: what this means.
    """
    print(f"warning: {_name(tracker)}: {words_of(reason)}; {and_now}", flush=True)


def words_of(error: Exception, most: int = 300) -> str:
    """The first line of an exception, without the key of Weights & Biases, which must not get into logs."""
    line = (str(error).strip().splitlines() or [""])[0]
    key = os.environ.get("WANDB_API_KEY")
    line = line.replace(key, "<key>") if key else line
    line = line if len(line) <= most else line[:most] + "..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _name(tracker: Tracker) -> str:
    """A WandbTracker is "wandb"."""
    member = tracker.member if isinstance(tracker, Background) else tracker
    return type(member).__name__.removesuffix("Tracker").lower()
