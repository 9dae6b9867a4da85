"""What launchers have in common: an order goes in, a job comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from detfamily.experiments.hold import Hold
from detfamily.experiments.notes import note, note_job, read_job, read_state
from detfamily.experiments.results import CUT_OFF, FINISHED, QUEUED, RUNNING


@dataclass(frozen=True)
class Order:
    """What is to be run, wherever; can be pickled.

    Attributes:
        folder: of the run; its ``run.json`` says what the run is.
        command: the whole command line.
        device: ``runtime.device`` of its configuration.
        threads: of the CPU's operators; None: torch's choice.
        gpus: that it pays for: a part of one where several runs share it.
        code: identity that the package must have where it runs; None: any.
        environment: variables on top of those that there are where it runs.
        place: folder that the command's relative paths start from; None: the one of whoever runs it.
    """

    folder: Path
    command: tuple[str, ...]
    device: str = "auto"
    threads: int | None = None
    gpus: float = 1.0
    code: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    place: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        error: what went wrong; None if nothing.
        again: it was not the run's own fault (preempted, its machine died), so it is worth another start.
    """

    error: str | None = None
    again: bool = False


class Job(ABC):
    """A run that a launcher has taken.

    Attributes:
        words: what and where it is, for people: "job 123 of SLURM".
    """

    words: str

    @abstractmethod
    def poll(self) -> bool:
        """Whether it has ended; called often."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to save and leave."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once."""

    @abstractmethod
    def close(self) -> Outcome:
        """After it has ended: how, which ``run.json`` then says, too."""


class Launcher(ABC):
    """Starts runs somewhere.

    Attributes:
        name: as in ``launcher=``.
        detached: runs go on without the caller.
        threads: of each run's operators; None: torch's choice.
        processes: of each run; more than 1: with ``torchrun``.
        retries: how often a run is started again that was preempted, or whose machine died.
    """

    name: ClassVar[str]
    detached: bool = False
    threads: int | None = None
    processes: int = 1
    retries: int = 0

    @abstractmethod
    def start(self, order: Order, hold: Hold) -> Job:
        """Start a run, or queue it.

        Args:
            order: what to run.
            hold: of its folder; the job's from now on.
        """

    def attach(self, folder: Path) -> Job | None:
        """The job that an earlier call has started for a run; None where there is none any more."""
        return None

    def leave(self, jobs: list[Job]) -> str:
        """How those jobs are ended that go on without the caller, for people."""
        return ""

    def close(self) -> None:
        """The caller is done."""
        return


def submitted(order: Order, hold: Hold, record: dict[str, Any]) -> None:
    """A cluster has taken a run: say which job it is, and let its process have the folder."""
    note_job(order.folder, record)
    hold.release()


def known_job(folder: Path, launcher: str) -> dict[str, Any] | None:
    """What is written of a launcher's job that may still be under way."""
    record = read_job(folder)
    under_way = read_state(folder).get("status") in (QUEUED, RUNNING)
    return record if under_way and record.get("launcher") == launcher else None


def outcome_of(folder: Path, lost: str) -> Outcome:
    """How a run on a cluster ended, by its ``run.json``.

    Args:
        folder: of the run.
        lost: what to say where nobody has noted its end.
    """
    state = read_state(folder)
    status = state.get("status")
    if status == FINISHED:
        return Outcome()
    if status in (QUEUED, RUNNING):
        note(folder, status=CUT_OFF, error=lost)
        return Outcome(lost, again=True)
    if status == CUT_OFF:
        return Outcome("stopped by a signal", again=True)
    return Outcome(state.get("error") or f"{lost}, and its run.json does not say how")
