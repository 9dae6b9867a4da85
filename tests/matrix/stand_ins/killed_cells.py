"""What stands in for the examination of a cell, in processes that import this file by its name."""

from __future__ import annotations

import os
import signal

from detfamily.matrix.cell import REFUSED, Outcome
from detfamily.matrix.request import Cell


def killed(cell: Cell) -> Outcome:
    """The process dies in one of the cells."""
    if cell.attention == "dense":
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(REFUSED, f"process {os.getpid()}")


def interrupting(cell: Cell) -> Outcome:
    """The first process is asked to end, as Ctrl-C does, and this one would go on for ever."""
    os.kill(os.getppid(), signal.SIGINT)
    while True:
        signal.pause()
