"""What the user sees: a progress bar on long work, one line per epoch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detfamily.tracking.tracker import Metrics, RunInfo, Tracker

SHOWN = ("AP", "AP50", "top1", "top5")
"""In the line of an epoch, in per cent."""


class ProgressBar:
    """Shows how far a piece of work is; to be used in a ``with`` statement.

    On a terminal it is a bar that goes away when the work is done. Elsewhere (a log file, a pipe) it is a plain line
    now and then, as a bar would fill a file with control characters.

    Args:
        label: what is being done.
        total: number of pieces.
        shown: False shows nothing (processes other than the main one).
        every: seconds between two plain lines.
    """

    def __init__(self, label: str, total: int, shown: bool = True, every: float = 30.0) -> None:
        self.label, self.total, self.every = label, total, every
        self.done, self.words = 0, ""
        self._bar: Progress | None = None
        self._plain = shown and not sys.stdout.isatty()
        if shown and not self._plain:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}"),
            )
            self._bar = Progress(*columns, transient=True)
            self._task = self._bar.add_task(label, total=total, words="")

    def __enter__(self) -> ProgressBar:
        self._last = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, words: str | None = None) -> None:
        """One more piece is done; ``words`` replaces the remark at the end of the bar."""
        self.done += 1
        self.words = self.words if words is None else words
        if self._bar:
            self._bar.update(self._task, advance=1, words=self.words)
        elif self._plain and time.monotonic() - self._last >= self.every and self.done < self.total:
            self._last = time.monotonic()
            print(f"{self.label}: {self.done}/{self.total}  {self.words}".rstrip(), flush=True)


class ConsoleTracker(Tracker):
    """Prints one line per epoch, the AP beside the loss, which says little about how good these models are."""

    def start(self, run: RunInfo) -> None:
        self.epochs = run.epochs

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        print(epoch_line(metrics, epoch, self.epochs), flush=True)

    def log_image(self, name: str, path: Path, step: int) -> None:
        print(f"{name:<12}{path}", flush=True)


def epoch_line(metrics: Metrics, epoch: int, epochs: int) -> str:
    """The line of an epoch; AP, or the accuracy of a classifier, in per cent.

    >>> epoch_line({"loss": 9.5, "AP": 0.25, "AP50": 0.4, "lr": 1e-4, "images_per_second": 70.0}, 3, 50)
    'epoch  3/50  AP 25.0  AP50 40.0  loss 9.500  lr 0.0001  70.0 images/s'
    """
    words = [f"epoch {epoch:>{len(str(epochs))}}/{epochs}"]
    words += [f"{name} {100 * metrics[name]:.1f}" for name in SHOWN if metrics.get(name, -1) >= 0]
    words += [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
    words += [f"lr {metrics['lr']:.2g}"] if "lr" in metrics else []
    words += [f"{metrics['images_per_second']:.1f} images/s"] if "images_per_second" in metrics else []
    words += [f"{metrics['peak_memory_gib']:.1f} GiB"] if "peak_memory_gib" in metrics else []
    words += [f"{duration(metrics['seconds_left'])} left"] if metrics.get("seconds_left", 0) >= 1 else []
    return "  ".join(words)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
