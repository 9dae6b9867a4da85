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
        epochs_done: epochs that a resumed run has behind it. The row of the epoch under way comes again even if all
            its steps are done: the process may have been cut off in its evaluation, or just after it.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    epochs: int
    resumed_at: int | None = None
    epochs_done: int = 0


class Tracker:
    """A place that keeps what a run reports. Only the main process has trackers.

    Constructors take the place's settings (they come from the configuration); the run introduces itself in ``start``.
    A subclass overrides what it has a use for, and may raise wherever it fails: ``Trackers`` decides what that means.

    Attributes:
        essential: whether a run without it is worth nothing, so that its failure ends the run.
        patience: None for a place that is as fast as a local file. Else the tracker works in a thread of its own, and
            this many seconds are the longest that the end of a run waits for it.
    """

    essential: bool = False
    patience: float | None = None

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

    def finish(self, completed: bool = True) -> None:
        """Called once at the end.

        Args:
            completed: whether the run went through; False after an error or an interruption.
        """

    def abandon(self) -> None:
        """Called from another thread when ``patience`` is over: let go of what would keep the process from ending."""
