"""``detfamily report``: what the runs of a table say, beside what the paper says, with pictures; and all tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from detfamily.experiments import results
from detfamily.experiments.findings import Findings, read_findings
from detfamily.experiments.overview import PAGE, drawn, overview, read_tables
from detfamily.experiments.page import markdown
from detfamily.experiments.plots import plot_curves, plot_differences, plot_overview, plot_tradeoff
from detfamily.experiments.results import PLAN
from detfamily.experiments.sizes import with_parameters
from detfamily.experiments.table import table_files
from detfamily.files import write_text_atomically

PICTURES = "pictures"
EXPERIMENTS = Path("experiments")
"""The folder of all tables in a checkout."""


def report(words: Sequence[str]) -> None:
    """Write the report of a table: ``<table>.md``, ``<table>.jsonl`` and pictures, beside the table.

    Where the folder of all tables has an overview, that is written again, too. Without a table, or with that folder in
    its place, it is all that is written.

    Args:
        words: a table or a folder of runs, and ``scale=`` or ``output_dir=``; or the folder of all tables, or nothing.

    Raises:
        ConfigError, DataError: there is no such table, scale or result.
    """
    if not words or (len(words) == 1 and _is_of_tables(Path(words[0]))):
        files = write_overview(Path(words[0]) if words else EXPERIMENTS)
    else:
        found = read_findings(words)
        files = write_report(found)
        above = found.table.path.resolve().parent.parent
        if (above / PAGE).is_file():
            files += write_overview(above)
    for file in files:
        print(file)


def _is_of_tables(folder: Path) -> bool:
    """Whether it is a folder of tables, and none of runs."""
    return folder.is_dir() and not (folder / PLAN).is_file() and bool(table_files(folder))


def write_overview(folder: Path) -> list[Path]:
    """Write the page over all tables, and its picture where there is something to draw.

    Args:
        folder: the one with a folder for each paper.

    Returns:
        The files, the page first.
    """
    entries = read_tables(folder)
    given = drawn(entries)
    picture = folder / PICTURES / "overview.png"
    if given:
        plot_overview(given, picture)
    write_text_atomically(folder / PAGE, overview(entries, f"{PICTURES}/{picture.name}" if given else None))
    return [folder / PAGE, picture] if given else [folder / PAGE]


def write_report(found: Findings, page: Path | None = None) -> list[Path]:
    """Write all files.

    Args:
        found: the results.
        page: the Markdown file, which the others lie beside; None: beside the table, by its name.

    Returns:
        The files, the page first.
    """
    page = page or found.table.path.with_suffix(".md")
    stem, metric = page.stem, found.table.task.label
    pictures = page.parent / PICTURES
    files = [page, page.with_suffix(".jsonl")]
    found = replace(found, records=tuple(with_parameters(found.records)))
    own = {"further": list(found.plan.further)}
    records = [{**one, **own, "remark": found.plan.remarks.get(one["row"], "")} for one in found.records]
    results.write_results(files[1], records)
    drawn: dict[str, str] = {}
    if compared := found.compared:
        files.append(pictures / f"{stem}-differences.png")
        published = {label: found.table.published_difference(label) for label in compared}
        plot_differences(compared, published, files[-1], metric)
        drawn["Differences to the baseline"] = f"{PICTURES}/{files[-1].name}"
    if plot_curves(found.records, found.labels, pictures / f"{stem}-curves.png", metric):
        files.append(pictures / f"{stem}-curves.png")
        drawn[f"{metric} against images seen: a thin line for each seed, the thick one is their mean"] = (
            f"{PICTURES}/{files[-1].name}"
        )
    if found.table.tradeoff and plot_tradeoff(found.tradeoff(), pictures / f"{stem}-tradeoff.png", metric):
        files.append(pictures / f"{stem}-tradeoff.png")
        drawn[f"{metric} against speed in training; on the line are the rows that no other row beats in both"] = (
            f"{PICTURES}/{files[-1].name}"
        )
    write_text_atomically(page, markdown(found, drawn, files[1].name))
    return files
