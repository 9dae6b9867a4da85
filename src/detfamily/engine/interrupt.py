"""Signals at the right moment: Ctrl-C and SIGTERM between two steps, none in the middle of a file."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Those whose handlers raise: Python's own for Ctrl-C, and that of torch's loader for a reading process that was killed.
_RAISING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGCHLD") if hasattr(signal, name))


class Interruption:
    """While it is entered, the first signal is only remembered; the second one acts at once, as it would have.

    Args:
        grace: seconds in which further signals count as the first one: a batch system sends SIGTERM to ``torchrun``
            and to what it started, and ``torchrun`` hands it on once more.

    Attributes:
        signal: number of the signal that came, or None.
    """

    def __init__(self, grace: float = 1.0) -> None:
        self.grace = grace
        self.signal: int | None = None
        self._came = 0.0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def wanted(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> Interruption:
        # Python hands signals to the main thread only, and lets only that one ask for them.
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._remember) for one in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked reading worker inherits the handler. A terminal sends Ctrl-C to it too, and the step that is to
            # be finished needs its images; any other signal is meant for it alone.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.signal is None:
            self.signal, self._came = number, time.monotonic()
        elif time.monotonic() - self._came > self.grace:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def signals_later() -> Iterator[None]:
    """While it is entered, Python's handlers of Ctrl-C and of ended child processes wait; they run when it is left.

    They raise out of whatever line runs. In the middle of ``torch.save`` that is inside its C++ writer, which then
    reports a broken file in their place, or aborts the process. Where the block itself fails, they do not run.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread only
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in _RAISING}
    waiting = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in waiting:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in waiting.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(came):
        waiting[number](number, None)
