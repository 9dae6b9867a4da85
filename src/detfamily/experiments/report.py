"""``detfamily report``: what the runs of a table say, beside what the paper says, as Markdown with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detfamily.experiments import results
from detfamily.experiments.findings import Findings, read_findings
from detfamily.experiments.page import markdown
from detfamily.experiments.plots import plot_curves, plot_differences, plot_tradeoff
from detfamily.files import write_text_atomically

PICTURES = "pictures"


def report(words: Sequence[str]) -> None:
    """Write the report of a table: ``<table>.md``, ``<table>.jsonl`` and pictures, beside the table.

    Args:
        words: a table or a folder of runs, and ``scale=`` or ``output_dir=``.

    Raises:
        ConfigError, DataError: there is no such table, scale or result.
    """
    found = read_findings(words)
    for file in write_report(found):
        print(file)


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
    own = {"further": list(found.plan.further)}
    records = [{**one, **own, "remark": found.plan.remarks.get(one["row"], "")} for one in found.records]
    results.write_results(files[1], records)
    drawn: dict[str, str] = {}
    if found.others and found.values(found.table.baseline):
        files.append(pictures / f"{stem}-differences.png")
        published = {label: found.table.published_difference(label) for label in found.others}
        plot_differences({label: found.difference(label) for label in found.others}, published, files[-1], metric)
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
