"""``detfamily rehearse``: one step and one small evaluation of every row, before days are spent on it.

Each row goes the way of a real run, from the same overrides that ``detfamily ablate`` gives it: data, augmentation, a
step of training, evaluation, checkpoint. Only its length and the number of images of a step are not its own.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from detfamily.errors import ConfigError, DetfamilyError, nearest
from detfamily.experiments.ablate import read_rows_wanted, say
from detfamily.experiments.scale import Variant, scales, variants
from detfamily.experiments.table import Table, read_table, table_files
from detfamily.experiments.words import RUNS_AT_ONCE, positive, read_words
from detfamily.files import read_json
from detfamily.matrix.cell import FAILED, OK, Outcome
from detfamily.matrix.workers import examine_all

USAGE = "detfamily rehearse [TABLE.yaml|FOLDER ...] [scale=mini] [rows=LABEL,...] [jobs=1] [overrides]"
_WORDS = ("scale", "rows", "jobs")
_OWN = (
    *("seed", "output_dir", "resume", "schedule.epochs", "schedule.images_per_epoch", "schedule.total_batch_size"),
    *("runtime.batch_size_per_device", "data.limit_val"),
)
IMAGES = 2
"""Of the step, and as many that are evaluated: with all images of a real step, large ones take 20 GiB and more."""


@dataclass(frozen=True)
class Rehearsal:
    """One row.

    Attributes:
        names: ``paper/table: row`` of all rows that are this very run.
        command: of detfamily.
        overrides: of its training.
        batch: images that are computed at once.
        evaluation: overrides of ``detfamily evaluate``, for a row that is evaluated with another one's weights.
    """

    names: tuple[str, ...]
    command: str
    overrides: tuple[str, ...]
    batch: int
    evaluation: tuple[str, ...] | None = None

    def words(self, folder: Path) -> list[str]:
        """What is typed after the command."""
        step = [f"schedule.total_batch_size={IMAGES}", f"runtime.batch_size_per_device={self.batch}"]
        length = ["schedule.epochs=1", f"schedule.images_per_epoch={IMAGES}", f"data.limit_val={IMAGES}"]
        return [*self.overrides, *step, *length, "runtime.num_workers=0", f"output_dir={folder}"]


@dataclass(frozen=True)
class Rehearsed(Outcome):
    """How it went.

    Attributes:
        seconds: all of it took.
    """

    seconds: float = 0.0


Perform = Callable[[Rehearsal], Outcome]


def rehearse(words: Sequence[str]) -> None:
    """Rehearse the rows of tables, and print how each table went.

    Args:
        words: tables or folders of them, settings, overrides of every row.

    Raises:
        ConfigError: something in what was typed does not exist, or a row cannot be composed; before any work.
        SystemExit: with status 1 if a row failed.
    """
    tables, scale, rows, jobs, further = read_request(words)
    planned = plan(tables, scale, rows, further)
    if go(planned, jobs, say=say):
        raise SystemExit(1)


def go(
    planned: Sequence[Rehearsal], jobs: int, perform: Perform | None = None, say: Callable[[str], None] = print
) -> int:
    """Rehearse, several at once, and say how it went.

    Args:
        planned: what is to be done.
        jobs: processes.
        perform: does it; a function of a module.
        say: prints a line.

    Returns:
        The exit status: 1 if one failed.
    """
    count = sum(len(one.names) for one in planned)
    say(f"{count} rows, {len(planned)} of them different")
    failed: list[tuple[Rehearsal, Outcome]] = []
    done = 0

    def ended(one: Rehearsal, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        seconds = f", {outcome.seconds:.1f} s" if isinstance(outcome, Rehearsed) else ""
        more = f" (and {len(one.names) - 1} rows like it)" if len(one.names) > 1 else ""
        say(f"[{done}/{len(planned)}] {one.names[0]}{more}: {outcome.status}{seconds}")
        if outcome.status != OK:
            say(f"  {outcome.reason}")
            failed.append((one, outcome))

    examine_all(planned, jobs, ended, perform or perform_row)
    for reason in dict.fromkeys(outcome.reason for _, outcome in failed):  # rows often fail of one thing
        alike = [(one, outcome) for one, outcome in failed if outcome.reason == reason]
        say(f"\nFAILED: {'; '.join(name for one, _ in alike for name in one.names)}\n{alike[0][1].details.rstrip()}")
    bad = sum(len(one.names) for one, _ in failed)
    say(f"{count - bad} rows ok, {bad} failed")
    return int(bad > 0)


def read_request(words: Sequence[str]) -> tuple[list[Table], str, str | None, int, list[str]]:
    """Understand what was typed: tables, scale, rows, jobs, overrides.

    Raises:
        ConfigError: with what was expected.
    """
    typed = read_words(words, _WORDS)
    own = typed.settings
    for word in typed.overrides:
        if word.partition("=")[0].lstrip("+~") in _OWN:
            raise ConfigError(f"{word!r} is what a rehearsal has of its own\nusage: {USAGE}")
    tables = [table for path in typed.files or ("experiments",) for table in read_tables(Path(path))]
    scale = own.get("scale", "mini")
    for table in tables:
        if scale not in (known := scales(table.task)):
            raise ConfigError(f"scale={scale}: {nearest(scale, known)}, for {table.name}\nusage: {USAGE}")
    if own.get("rows") and len(tables) != 1:
        raise ConfigError(f"rows={own['rows']} are those of one table, and {len(tables)} are given")
    jobs = positive("jobs", own.get("jobs", "1"), RUNS_AT_ONCE)
    return tables, scale, own.get("rows"), jobs, list(typed.overrides)


def read_tables(path: Path) -> list[Table]:
    """A table, or all tables of a folder.

    Raises:
        ConfigError: there is none.
    """
    if not path.is_dir():
        return [read_table(path)]
    files = table_files(path)
    if not files:
        raise ConfigError(f"{path}: expected tables, and there is none\nusage: {USAGE}")
    return [read_table(file) for file in files]


def plan(tables: Iterable[Table], scale: str, rows: str | None = None, further: Sequence[str] = ()) -> list[Rehearsal]:
    """What is to be done; rows that are the same run are done once.

    Args:
        tables: with all their rows.
        scale: a choice of configs/scale.
        rows: labels as they are typed; None: all.
        further: overrides of every row.

    Raises:
        ConfigError: a row cannot be composed.
    """
    first: dict[tuple[str, str, str], tuple[Variant, Variant]] = {}
    names: dict[tuple[str, str, str], list[str]] = {}
    for table in tables:
        made = variants(table, scale, further)
        for label in read_rows_wanted(rows, table) if rows else table.labels:
            one = made[label]
            source = made[one.row.weights_of] if one.row.weights_of else one
            key = (one.task.command, source.identity, one.identity)
            first.setdefault(key, (source, one))
            names.setdefault(key, []).append(f"{table.name}: {label}")
    return [_rehearsal(tuple(names[key]), *found) for key, found in first.items()]


def _rehearsal(names: tuple[str, ...], trained: Variant, row: Variant) -> Rehearsal:
    batch = min(trained.config["runtime"]["batch_size_per_device"] or IMAGES, IMAGES)
    evaluation = row.overrides if row.row.weights_of else None
    return Rehearsal(names, row.task.command, trained.overrides, batch, evaluation)


def perform_row(one: Rehearsal) -> Outcome:
    """Train and evaluate in a folder that is gone afterwards; nothing that is raised goes further."""
    started, printed = time.perf_counter(), io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            call(one, Path(folder))
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        traced = "" if isinstance(error, DetfamilyError) else traceback.format_exc()
        tail = "\n".join(printed.getvalue().rstrip().splitlines()[-15:])
        return Outcome(FAILED, reason, f"{tail}\n{traced or error}")
    return Rehearsed(OK, seconds=time.perf_counter() - started)


def call(one: Rehearsal, folder: Path) -> None:
    """Run the commands, and look at what they left.

    Raises:
        ValueError: numbers that are none.
    """
    from detfamily.cli import COMMANDS

    COMMANDS[one.command].run(one.words(folder / "run"))
    numbers = read_json(folder / "run" / "metrics.json")
    if one.evaluation is not None:
        words = [f"checkpoint={folder / 'run' / 'last.pt'}", *one.evaluation, f"output_dir={folder / 'evaluated'}"]
        COMMANDS["evaluate"].run(words)
        numbers = read_json(folder / "evaluated" / "metrics.json")
    bad = [key for key, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad or not numbers:
        raise ValueError(f"metrics.json: {', '.join(bad) or 'nothing in it'}: expected numbers")
