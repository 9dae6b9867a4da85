"""What a cluster's machine does with an order: hold the folder, run the process, hand signals on, note the end."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from detfamily.experiments.hold import Hold
from detfamily.experiments.launchers.base import Order
from detfamily.experiments.launchers.child import Child
from detfamily.experiments.notes import note, read_state
from detfamily.experiments.results import FAILED, FINISHED, QUEUED
from detfamily.experiments.version import code_version

POLL = 0.2  # seconds between two looks at the process
PATIENCE = 120.0  # seconds to wait for whoever is at the folder, or for a process to save and leave


class Work:
    """An order at work; submitit calls and pickles it.

    Args:
        order: what to run.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.child: Child | None = None
        self.stopped = False

    def __call__(self) -> str | None:
        """Run it, as far as it is not done.

        Returns:
            What went wrong, which ``run.json`` says, too; None if nothing.
        """
        folder = self.order.folder
        hold = Hold.take(folder, PATIENCE)
        if hold is None:
            return "another process is at it"  # which says in run.json how it stands
        if read_state(folder).get("status") == FINISHED and (folder / "metrics.json").is_file():
            hold.release()
            return None
        if self.order.code is not None and (now := code_version()).identity != self.order.code:
            error = f"not started: the code has changed since it was queued (now {now.commit})"
            note(folder, status=FAILED, error=error)
            hold.release()
            return error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._told)
        try:
            self.child = Child(self.order, hold, bound=True)
        except OSError as error:
            note(folder, status=FAILED, error=f"not started: {error}")
            return str(error)
        if self.stopped:
            self.child.stop()
        while not self.child.poll():
            time.sleep(POLL)
        outcome = self.child.close()
        if outcome.again:  # submitit must not take it for done, and SLURM may queue it again
            raise SystemExit(128 + signal.SIGTERM)
        return outcome.error

    def stop(self) -> None:
        """Let the process save and leave."""
        self.stopped = True
        if self.child is not None:
            self.child.stop()

    def checkpoint(self) -> Any:
        """SLURM is about to take the machine: save. What is returned is queued in our place."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self.child is not None and self.child.hold.handle >= 0:
            until = time.monotonic() + PATIENCE
            while not self.child.poll() and time.monotonic() < until:
                time.sleep(POLL)
            if self.child.poll():
                self.child.close(QUEUED)
        return DelayedSubmission(Work(self.order))

    def _told(self, number: int, frame: FrameType | None) -> None:
        self.stop()
