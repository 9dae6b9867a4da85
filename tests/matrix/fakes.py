"""What stands in for the examination of a cell, in processes that import this file by its name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from detfamily.matrix.cell import FAILED, OK, REFUSED, Figures, Outcome
from detfamily.matrix.request import Cell

STOP = "stop"
"""A file of this name in the working directory: the second cell asks the first process to end, as Ctrl-C does."""


def figures(cell: Cell) -> Figures:
    """Numbers that tell cells apart."""
    size = len(cell.family) * 1_000_000
    return Figures(size, size, 2 * size, 3 * size, None, 0.001 * len(cell.attention), 1.0, "", "cpu")


def outcome(cell: Cell) -> Outcome:
    """Depends on the names of the cell, and is noted in a file."""
    with Path("seen.txt").open("a") as file:
        file.write(f"{cell.name}\n")
    if Path(STOP).exists() and cell.attention == "ms_deform":
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
    if cell.family == "detr" and cell.attention == "ms_deform":
        return Outcome(REFUSED, "it says no,\n  and why")
    if cell.family == "dino" and cell.attention == "dense":
        return Outcome(FAILED, "KeyError: 'x'", "Traceback\n  in a line\nKeyError: 'x'\n")
    return Outcome(OK, figures=figures(cell))


def good(cell: Cell) -> Outcome:
    """What a cell gives whatever it is."""
    return Outcome(OK, figures=figures(cell))


def killed(cell: Cell) -> Outcome:
    """The process dies in one of the cells."""
    if cell.attention == "dense":
        os.kill(os.getpid(), signal.SIGKILL)
    return good(cell)
