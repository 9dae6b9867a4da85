"""Cells of work in processes of their own: one that is killed, or dies of compiled code, costs its cell alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

from detfamily.engine.interrupt import signals_later
from detfamily.matrix.cell import FAILED, Outcome

T = TypeVar("T")
"""What a cell is: of the matrix, a row of a table, ..."""


class Worker(Generic[T]):
    """A process that examines cells, one after the other.

    Args:
        threads: of the CPU's operators; None leaves torch's choice.
        examine: what is done with a cell; a function of a module.
    """

    def __init__(self, threads: int | None, examine: Callable[[T], Outcome]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        self.connection, theirs = context.Pipe()
        # not a daemon, which could not start processes that read or draw images; stop() ends it in any case
        self.process = context.Process(target=_serve, args=(theirs, threads, examine), daemon=False)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.cell: T | None = None

    def start(self, cell: T) -> None:
        """Hand a cell over."""
        self.cell = cell
        self.connection.send(cell)

    def result(self) -> tuple[T, Outcome]:
        """The cell and its outcome, when there is something to read; a process that is gone has failed."""
        cell, self.cell = self.cell, None
        assert cell is not None
        try:
            return cell, self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
            return cell, Outcome(FAILED, f"its process is gone: {ended}")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def examine_all(
    cells: Iterable[T], jobs: int, ended: Callable[[T, Outcome], None], examine: Callable[[T], Outcome]
) -> None:
    """Examine cells in their order, several at once.

    Args:
        cells: what is to be done.
        jobs: processes; each has its share of the cores.
        ended: called after each cell, in this process.
        examine: what is done with a cell; a function of a module.
    """
    waiting = list(cells)[::-1]
    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    workers: list[Worker[T]] = []
    try:
        while waiting or any(one.cell for one in workers):
            free = [one for one in workers if one.cell is None]
            while waiting and (free or len(workers) < jobs):
                if not free:
                    free = [Worker(threads, examine)]
                    workers += free
                free.pop().start(waiting.pop())
            busy = [one for one in workers if one.cell is not None]
            heard = wait([one.connection for one in busy])
            for one in (one for one in busy if one.connection in heard):
                cell, outcome = one.result()
                if not one.process.is_alive():
                    one.stop()
                    workers.remove(one)
                ended(cell, outcome)
    finally:
        with signals_later():  # a second Ctrl-C must not leave a process behind, for which Python would wait at its end
            for one in workers:
                one.stop()


def _serve(connection: Connection, threads: int | None, examine: Callable[[Any], Outcome]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        while True:
            connection.send(examine(connection.recv()))
    except (EOFError, BrokenPipeError):  # the first process is gone
        return
