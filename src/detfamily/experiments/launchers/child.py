"""The process of a run: started with the folder's lock, watched, and its end and cost noted in ``run.json``."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from detfamily.experiments.devices import devices_for, spent_until_now
from detfamily.experiments.hold import Hold
from detfamily.experiments.launchers.base import Job, Order, Outcome
from detfamily.experiments.notes import last_words, note, read_state, unseen_seconds
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED, LOG, RUNNING

_INTERRUPTED = tuple(code for one in (signal.SIGINT, signal.SIGTERM) for code in (-one, 128 + one))
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Child(Job):
    """A run as a process on this machine.

    Args:
        order: what to run.
        hold: of its folder; released when the process has ended.
        bound: the process is told to save and leave when the one that started it dies, as jobs of a cluster are.
    """

    def __init__(self, order: Order, hold: Hold, bound: bool = False) -> None:
        self.folder, self.hold, self.started, self.told = order.folder, hold, time.time(), False
        before = read_state(self.folder)
        environment = {**os.environ, **order.environment}
        self.devices = devices_for(order, environment)
        self.spent = spent_until_now(before, unseen_seconds(self.folder))
        self.memory = float(before.get("memory_gib") or 0)
        note(
            self.folder,
            **{"status": RUNNING, "started": self.started, **self.spent, "error": None},
            devices=self.devices.words,
            gpus=self.devices.gpus,
            cores=self.devices.cores,
            host=socket.gethostname(),
        )
        try:
            with (self.folder / LOG).open("ab") as log:
                self.process = subprocess.Popen(
                    order.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=order.place,
                    start_new_session=True,  # so that Ctrl-C reaches the caller alone, who tells the runs in its order
                    pass_fds=(hold.handle,) if os.name == "posix" else (),
                    preexec_fn=_bind(os.getpid()) if bound and sys.platform == "linux" else None,
                )
        except BaseException:
            hold.release()
            raise
        self.words = f"process {self.process.pid}"

    def poll(self) -> bool:
        """Whether the process has ended; its largest resident memory is noted then."""
        if self.process.returncode is not None:
            return True
        if not self.hold.beat():
            self.stop()  # another machine has taken this one for dead, and goes on with the run
        if not hasattr(os, "wait4"):
            return self.process.poll() is not None
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        unit = 1 if sys.platform == "darwin" else 1024
        self.memory = max(self.memory, usage.ru_maxrss * unit / 2**30)
        return True

    def stop(self) -> None:
        # Only once: to the second signal the training listens at once, in the middle of its checkpoint.
        if not self.told and self.process.returncode is None:
            self.told = True
            self.process.terminate()

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()

    def close(self, status: str | None = None) -> Outcome:
        """Note how it ended.

        Args:
            status: that is noted where it was interrupted; ``cut off`` by default.
        """
        code = self.process.returncode
        if code == 0 and (self.folder / "metrics.json").is_file():
            return self._end(FINISHED)
        if code in _INTERRUPTED:
            return self._end(status or CUT_OFF, "stopped by a signal")
        ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return self._end(FAILED, f"{ended}; {last_words(self.folder)}")

    def _end(self, status: str, error: str | None = None) -> Outcome:
        if self.hold.lost:  # the folder, and what it says, are another machine's
            return Outcome("another machine has taken over", again=False)
        note(
            self.folder,
            **{"status": status, **self.devices.spent(self.spent, time.time() - self.started)},
            memory_gib=round(self.memory, 3) or None,
            error=error if status == FAILED else None,
        )
        self.hold.release()
        return Outcome(error, again=status not in (FINISHED, FAILED))


def _bind(parent: int) -> Callable[[], None]:
    """What the new process does first: ignore the cluster's warning, which is for its parent, and outlive it not."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def first() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)

    return first
