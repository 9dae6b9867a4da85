"""The one interface between the training loop and every place that keeps numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Metrics = Mapping[str, float]
"""Name -> number; the slashes in a name group it ("match/5/giou", "AP/cat")."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker needs to know of the run.

    Attributes:
        name: what the user calls it.
        folder: the run folder; it exists.
        config: the resolved configuration, plain containers.
        epochs: length of the run.
        resumed_at: the optimiser step that a resumed run goes on from; None for a new run. What was logged after that
            step, by the process that was cut off, will come again.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    epochs: int
    resumed_at: int | None = None


class Tracker:
    """A place that keeps what a run reports. Only the main process has trackers.

    Constructors take the place's settings (they come from the configuration); the run introduces itself in ``start``.
    A subclass overrides what it has a use for.
    """

    def start(self, run: RunInfo) -> None:
        """Called once, before anything is logged."""

    def log_step(self, metrics: Metrics, step: int) -> None:
        """Training numbers, averaged since the last call, every ``tracking.log_every`` optimiser steps."""

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        """The numbers of an epoch, with those of the evaluation where there was one.

        Args:
            metrics: finite or NaN.
            epoch: epochs done, from 1.
            step: optimiser steps done.
        """

    def log_image(self, name: str, path: Path, step: int) -> None:
        """A picture that was written to a file."""

    def finish(self) -> None:
        """Called once at the end, however the run ends."""


class Trackers(Tracker):
    """Several trackers as one.

    Args:
        members: told in this order.
    """

    def __init__(self, members: list[Tracker]) -> None:
        self.members = members

    def start(self, run: RunInfo) -> None:
        for member in self.members:
            member.start(run)

    def log_step(self, metrics: Metrics, step: int) -> None:
        for member in self.members:
            member.log_step(metrics, step)

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        for member in self.members:
            member.log_epoch(metrics, epoch, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        for member in self.members:
            member.log_image(name, path, step)

    def finish(self) -> None:
        for member in self.members:
            member.finish()
