"""All runs of a table on one screen, while they run; nothing where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from detfamily.experiments.notes import read_state
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED, QUEUED, RUNNING
from detfamily.tracking.console import duration
from detfamily.tracking.files import EPOCHS, read_rows

if TYPE_CHECKING:
    from detfamily.experiments.runner import Run

EVERY = 1.0  # seconds between two pictures
MARGIN = 5  # lines of the terminal that the rows do not take: head, summary, prompt
_ORDER = (RUNNING, QUEUED, FAILED, CUT_OFF, None, FINISHED)
"""Who is shown where there is not room for all."""
_COLOURS = {RUNNING: "cyan", FINISHED: "green", FAILED: "red", CUT_OFF: "yellow", QUEUED: "blue"}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        run: which one.
        shown: lines of its epochs that were returned by ``new``.
    """

    run: Run
    shown: int = 0
    _size: int = -1
    _rows: Sequence[dict[str, Any]] = ()
    _changed: float = 0.0

    def rows(self) -> Sequence[dict[str, Any]]:
        """Of ``metrics.jsonl``, which is read again when it has grown."""
        file = self.run.folder / EPOCHS
        try:
            found = file.stat()
        except OSError:
            return ()
        if found.st_size != self._size:
            self._size, self._rows, self._changed = found.st_size, read_rows(file), found.st_mtime
        return self._rows

    def new(self) -> list[dict[str, Any]]:
        """The rows that came since the last call."""
        rows = self.rows()
        fresh, self.shown = rows[self.shown :], max(self.shown, len(rows))
        return [{key: value for key, value in row.items() if value is not None} for row in fresh]

    def cells(self, status: str | None) -> tuple[str, ...]:
        """Row, seed, status, epoch, metric, images per second, time left."""
        run = self.run
        rows = () if run.source else self.rows()
        last = rows[-1] if rows else {}
        metric = last.get(run.variant.task.metric)
        left = (last.get("seconds_left") or 0) - (time.time() - self._changed)
        total = run.variant.config["schedule"]["epochs"]
        return (
            run.variant.row.label,
            str(run.seed),
            status or "waiting",
            "evaluated only" if run.source else f"{last.get('epoch', 0):.0f}/{total}",
            "" if metric is None or metric < 0 else f"{100 * metric:.1f}",
            f"{last['images_per_second']:.1f}" if last.get("images_per_second") else "",
            duration(left) if status == RUNNING and left >= 1 else "",
        )


class Screen:
    """A table that is drawn anew while runs go on; to be used in a ``with`` statement.

    Args:
        runs: all of the plan.
        metric: what they are judged by, in words.
        say: prints a line where the output is no terminal.
        console: where to draw.
    """

    def __init__(
        self, runs: Sequence[Run], metric: str, say: Callable[[str], None], console: Console | None = None
    ) -> None:
        self.progress = {run.folder: Progress(run) for run in runs}
        self.metric, self._say = metric, say
        self.console = console or Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._drawn = float("-inf")
        # A status that is older than this screen may be that of a run which was killed since.
        self._before = {run.folder: (run.state(), run.status()) for run in runs}
        self._ended: set[Path] = set()

    def __enter__(self) -> Screen:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(self.picture(), refresh=True)
            self.live.stop()

    def say(self, line: str) -> None:
        """Print a line, above the table where there is one."""
        if self.live:
            self.live.console.print(Text(line))
        else:
            self._say(line)

    @property
    def shows_epochs(self) -> bool:
        """Whether the epochs are on the screen, so that nobody need say them."""
        return self.live is not None

    def draw(self) -> None:
        """Draw, if it is time to."""
        if self.live and time.monotonic() - self._drawn >= EVERY:
            self._drawn = time.monotonic()
            self.live.update(self.picture(), refresh=True)

    def picture(self) -> Group:
        """The table as it is now: as many runs as there is room for, in the plan's order."""
        states = {folder: self._status(folder) for folder in self.progress}
        room = max(1, self.console.height - MARGIN)
        first = sorted(states, key=lambda folder: _ORDER.index(states[folder]))[:room]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("row", "seed", "status", "epoch", self.metric, "images/s", "left"):
            table.add_column(name, justify="left" if name in ("row", "status") else "right", no_wrap=True)
        for folder in (one for one in states if one in first):
            style = _COLOURS.get(states[folder] or "", "dim")
            table.add_row(*map(Text, self.progress[folder].cells(states[folder])), style=style)
        counts = {status: list(states.values()).count(status) for status in _ORDER}
        words = ", ".join(f"{count} {status or 'waiting'}" for status, count in counts.items() if count)
        hidden = len(states) - len(first)
        return Group(table, Text(words + (f"; {hidden} more than there is room for" if hidden else "")))

    def _status(self, folder: Path) -> str | None:
        """As ``run.json`` says; what has finished is not asked again."""
        if folder in self._ended:
            return FINISHED
        state, (before, status) = read_state(folder), self._before[folder]
        if state != before:
            status = state.get("status")
        if status == FINISHED:
            self._ended.add(folder)
        return status if status in _ORDER else None
