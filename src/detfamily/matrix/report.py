"""What came out of a matrix: as text, as CSV, and as a page of Markdown with pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from detfamily.experiments.results import slug
from detfamily.files import write_text_atomically
from detfamily.matrix.cell import FAILED, OK, REFUSED
from detfamily.matrix.measures import Measure, measures_of
from detfamily.matrix.plots import plot_matrix
from detfamily.matrix.request import Request
from detfamily.matrix.results import Record

CSV, PAGE, PICTURES = "matrix.csv", "matrix.md", "pictures"

AXES = ("family", "attention", "backbone")

FIELDS = (
    *(*AXES, "status", "parameters", "trained", "multiply_adds", "kept_bytes", "peak_bytes", "seconds", "loss"),
    *("remark", "reason", "device", "commit"),
)
"""Columns of the CSV."""


def write_report(request: Request, records: Sequence[Record], commit: str) -> list[Path]:
    """Write the CSV, the page and the pictures.

    Args:
        request: what was asked for.
        records: of its cells.
        commit: of the code.

    Returns:
        The files.
    """
    folder, pictures = request.folder, {}
    for backbone in dict.fromkeys(one["backbone"] for one in records):
        own = [one for one in records if one["backbone"] == backbone]
        name = f"{PICTURES}/{slug(backbone)}.png"
        if plot_matrix(own, f"family x {request.columns}, backbone {backbone}", folder / name):
            pictures[backbone] = name
    write_text_atomically(folder / CSV, as_csv(records))
    write_text_atomically(folder / PAGE, as_markdown(request, records, commit, pictures))
    return [folder / CSV, folder / PAGE, *(folder / name for name in pictures.values())]


def counted(records: Sequence[Record]) -> str:
    """How many cells ended how."""
    counts = {status: sum(one["status"] == status for one in records) for status in (OK, REFUSED, FAILED)}
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def line_of(record: Record) -> str:
    """How a cell ended, in a line."""
    if record["status"] != OK:
        return f"{record['status']}: {record['reason'].splitlines()[0]}"
    return ", ".join(f"{one.title.partition(',')[0]} {_with_unit(one, record)}" for one in measures_of([record]))


def as_text(records: Sequence[Record]) -> str:
    """All cells as aligned lines, then why some of them did not work."""
    measures = measures_of(records)
    head = [*AXES, *(one.title for one in measures), "status"]
    rows = [[one[key] for key in AXES] + [m.text(one) for m in measures] + [one["status"]] for one in records]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        words = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        for place in range(len(AXES), len(row) - 1):
            words[place] = f"{row[place]:>{widths[place]}}"
        lines.append("  ".join(words).rstrip())
    lines += ["", f"{len(records)} cells: {counted(records)}"]
    for status in (REFUSED, FAILED):
        for reason, names in _grouped(records, "reason", status).items():
            lines += [f"  {status}: {reason}", f"    {'; '.join(names)}"]
    return "\n".join(lines)


def as_csv(records: Sequence[Record]) -> str:
    """All cells, with figures as they are in the results file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_markdown(request: Request, records: Sequence[Record], commit: str, pictures: Mapping[str, str]) -> str:
    """The page: a table and a picture for each backbone, then the reasons of what did not work.

    Args:
        request: what was asked for.
        records: of its cells.
        commit: of the code.
        pictures: label of a backbone -> its picture, relative to the page.
    """
    measures, settings = measures_of(records), request.settings
    devices = "; ".join(sorted({one["device"] for one in records if "device" in one})) or "no device"
    lines = [
        f"# family x {request.columns} x backbone",
        "",
        f"{len(records)} cells: {counted(records)}. Batches of {settings.batch_size} images of {settings.size[0]} x "
        f"{settings.size[1]}; training steps are the median of {settings.repeats}; {devices}; code {commit}.",
        "",
        f"Overrides of every cell: `{' '.join((*request.below, *request.above)) or 'none'}`.",
        "",
        f"In the tables: {' / '.join(one.title for one in measures)}.",
    ]
    for backbone in dict.fromkeys(one["backbone"] for one in records):
        own = [one for one in records if one["backbone"] == backbone]
        lines += ["", f"## {backbone}", "", *_table(own, measures)]
        if backbone in pictures:
            lines += ["", f"![{backbone}]({pictures[backbone]})"]
    for title, key, status in (("Failed", "reason", FAILED), ("Refused", "reason", REFUSED), ("Remarks", "remark", OK)):
        found = _grouped(records, key, status)
        lines += ["", f"## {title}", ""] if found else []
        lines += [f"- {words}: {'; '.join(names)}" for words, names in found.items()]
    return "\n".join(lines) + "\n"


def _table(records: Sequence[Record], measures: Sequence[Measure]) -> list[str]:
    """Families x attentions, of one backbone."""
    own = {(one["family"], one["attention"]): one for one in records}
    attentions = list(dict.fromkeys(attention for _, attention in own))
    rows = [["", *attentions], ["---"] * (1 + len(attentions))]
    for family in dict.fromkeys(family for family, _ in own):
        rows.append([family, *(_cell(own.get((family, one)), measures) for one in attentions)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(record: Record | None, measures: Sequence[Measure]) -> str:
    if record is None:
        return "not yet"
    if record["status"] != OK:
        return str(record["status"])
    return " / ".join(one.text(record) for one in measures)


def _grouped(records: Sequence[Record], key: str, status: str) -> dict[str, list[str]]:
    """Words of the records with a status -> the cells that they are about."""
    found: dict[str, list[str]] = {}
    for one in records:
        words = " ".join(str(one.get(key) or "").split())
        if one["status"] == status and words:
            found.setdefault(words, []).append(" x ".join(one[axis] for axis in AXES))
    return found


def _with_unit(measure: Measure, record: Record) -> str:
    return f"{measure.text(record)} {measure.title.partition(', ')[2]}".rstrip()
