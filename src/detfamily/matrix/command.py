"""``detfamily matrix``: which families, attentions and backbones go together, and what each combination costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from detfamily.config import configs_dir
from detfamily.errors import ConfigError
from detfamily.experiments.results import slug
from detfamily.experiments.version import PACKAGE, Code, code_version, hash_files
from detfamily.files import write_text_atomically
from detfamily.matrix.cell import FAILED, Outcome, examine
from detfamily.matrix.report import as_text, line_of, write_report
from detfamily.matrix.request import Cell, Request, check_names, read_request
from detfamily.matrix.results import Results
from detfamily.matrix.workers import examine_all

FAILURES = "failures"

Work = Callable[[Sequence[Cell], int, Callable[[Cell, Outcome], None]], None]


def matrix(words: Sequence[str]) -> None:
    """Examine all cells that are not done yet, and write what came out.

    Args:
        words: settings of configs/matrix.yaml, and overrides of every cell.

    Raises:
        ConfigError: something in what was typed does not exist; before any work.
        SystemExit: with status 1 if a cell failed.
    """
    if go(read_request(words)):
        raise SystemExit(1)


def files_identity() -> str:
    """The present package and configs: whatever changes there may change a cell."""
    return f"{hash_files(PACKAGE)}{hash_files(configs_dir())}"


def measure_all(cells: Sequence[Cell], jobs: int, ended: Callable[[Cell, Outcome], None]) -> None:
    """Examine cells in processes of their own."""
    examine_all(cells, jobs, ended, examine)


def go(request: Request, work: Work = measure_all, identity: Callable[[], str] = files_identity) -> int:
    """Examine the cells, and print and write how they ended.

    Args:
        request: what was typed.
        work: goes through the cells, with so many jobs, and calls back after each.
        identity: says the present code.

    Returns:
        The exit status: 1 if a cell failed.

    Raises:
        ConfigError: a name that does not exist; in the middle of the work, the code has changed.
    """
    check_names(request)
    code = Code(identity(), code_version().commit)
    cells, results = request.cells(), Results(request.folder, code)
    done = {one["key"] for one in results.of(cells) if one["status"] != FAILED}
    to_do = [one for one in cells if one.key not in done]
    say(describe(request, len(cells), len(to_do), code.commit))
    number = len(cells) - len(to_do)

    def ended(cell: Cell, outcome: Outcome) -> None:
        nonlocal number
        if identity() != code.identity:
            raise ConfigError("the code has changed meanwhile: the same command measures all cells with the new one")
        number += 1
        record = results.add(cell, {**outcome.record(), "date": datetime.now(UTC).isoformat(timespec="seconds")})
        say(f"[{number}/{len(cells)}] {cell.name}: {line_of(record)}")
        if outcome.status == FAILED:
            log = request.folder / FAILURES / f"{slug(cell.name)}-{cell.key}.txt"
            write_text_atomically(log, outcome.details or f"{outcome.reason}\n")
            say(f"  {log}")

    work(to_do, request.jobs, ended)
    records = results.of(cells)
    say(f"\n{as_text(records)}\n\n{results.path}")
    for file in write_report(request, records, code.commit):
        say(str(file))
    return 1 if any(one["status"] == FAILED for one in records) else 0


def describe(request: Request, count: int, to_do: int, commit: str) -> str:
    """The plan, in a few lines."""
    axes = (("family", request.families), (request.columns, request.attentions), ("backbone", request.backbones))
    width = max(len(name) for name, _ in axes)
    lines = [f"  {name:<{width}}  {', '.join(one.text for one in entries)}" for name, entries in axes]
    return "\n".join(
        [f"matrix of {count} cells, code {commit}", *lines, f"{count - to_do} are done, {to_do} are to do"]
    )


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)
