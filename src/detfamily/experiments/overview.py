"""One page over all tables: what was run, whether it agrees with the papers, what it took, and what cannot be run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detfamily.errors import ConfigError
from detfamily.experiments.claims import NOT_RUN, Claim, claims, conclusion, counts, order_of, out_of_order
from detfamily.experiments.findings import SPENT, Findings, of_file
from detfamily.experiments.results import FINISHED
from detfamily.experiments.table import Table, read_table, table_files
from detfamily.experiments.text import figure, grid, hours, signed

PAGE = "OVERVIEW.md"


@dataclass(frozen=True)
class Entry:
    """A table.

    Attributes:
        table: the table.
        found: the results that lie beside it; None: it has not been run.
    """

    table: Table
    found: Findings | None = None

    @property
    def claims(self) -> list[Claim]:
        return claims(self.table, self.found)

    @property
    def place(self) -> str:
        """The table as a link from the page: to its report, or else to the table itself."""
        file = self.table.path.with_suffix(".md" if self.found else ".yaml").name
        return f"[`{self.table.name}`]({self.table.path.resolve().parent.name}/{file})"


def read_tables(folder: Path) -> list[Entry]:
    """All tables below a folder of papers, by name, with the results that lie beside them.

    Raises:
        ConfigError: the folder has no tables, or one of them is not right.
        DataError: results beside a table are broken or mixed.
    """
    tables = [read_table(file) for file in table_files(folder)]
    if not tables:
        raise ConfigError(f"there are no tables in {folder}: expected files such as {folder}/PAPER/TABLE.yaml")
    return [Entry(one, of_file(one) if one.path.with_suffix(".jsonl").is_file() else None) for one in tables]


def drawn(entries: Sequence[Entry]) -> dict[str, list[Claim]]:
    """Table -> its published differences of which there are ours; what the picture shows."""
    found = {one.table.name: [claim for claim in one.claims if claim.ours is not None] for one in entries}
    return {name: given for name, given in found.items() if given}


def overview(entries: Sequence[Entry], picture: str | None = None) -> str:
    """The page.

    Args:
        entries: all tables.
        picture: of published and our differences, relative to the page; None: there is none.
    """
    run = [one for one in entries if one.found]
    rest = [one for one in entries if not one.found]
    parts = [
        "# All tables",
        "Written by `detfamily report` from the tables and the results beside them; `README.md` says what they are.",
        *_summary(entries),
    ]
    if picture:
        caption = "Published differences to the baseline of a table, and ours with their 95 % intervals"
        parts.append(f"![{caption}]({picture})\n\n{caption}. In the shaded quarters both have the same sign.")
    if run:
        parts += ["## Tables with runs", _run_table(run), _WORDS]
    if rest:
        parts += ["## Tables without runs", _rest_table(rest)]
    if missing := _missing_rows(entries):
        parts += ["## Rows of the papers that the switches here cannot express"]
        parts.append(grid(["table", "row", "published", "why"], missing))
    return "\n\n".join(parts) + "\n"


_WORDS = (
    "tau-b: Kendall's, between the published order of the rows and ours; p: how often rows in random order agree as "
    "well. Then the differences to the baseline that the source prints: resolved (the 95 % interval leaves zero out) "
    "with its sign or the opposite one, not resolved (of these with its sign), published as zero, and not run. Pairs "
    f"against: two rows, resolved in the order opposite to the published one. {SPENT}."
)


def _summary(entries: Sequence[Entry]) -> list[str]:
    run = [one for one in entries if one.found]
    spent: Counter[str] = Counter()
    stand: Counter[str] = Counter()
    for one in entries:
        stand.update(counts(one.claims))
        spent.update(one.found.spent() if one.found else {})
    finished = sum(one["status"] == FINISHED for entry in run if entry.found for one in entry.found.records)
    rows = sum(len(one.table.rows) for one in entries)
    have = sum(len(one.found.labels) for one in run if one.found)
    lines = [
        f"- {len(run)} of {len(entries)} tables have runs, and {have} of {rows} rows: {finished} finished runs, "
        f"{hours(dict(sorted(spent.items(), reverse=True)))}.",
        f"- The sources print {stand.total()} differences to a baseline. {_counted(stand)}",
    ]
    for entry in run:
        for claim in entry.claims:
            if claim.ours is not None and claim.resolved and claim.agrees is False:
                apart = f"{signed(claim.ours.mean)} where {signed(claim.published)} is published"
                lines.append(f"- Opposite and resolved: `{claim.label}` of {entry.place}, {apart}.")
    small = [one for one in run if one.found and one.found.plan.scale != one.table.task.published]
    if small:
        which = "All tables with runs" if len(small) == len(run) else f"{len(small)} tables"
        lines.append(
            f"- {which} were run as miniatures, on other data with smaller models: only differences between rows are "
            "compared with the published ones, never the figures, and what differs there may be how fast rows learn. A "
            "miniature confirms no paper, and refutes none."
        )
    return ["\n".join(lines)]


def _counted(stand: Counter[str]) -> str:
    open_ = stand["open"] + stand["open, same"]
    words = f"Resolved with the published sign: {stand['same']}, with the opposite one: {stand['opposite']}; "
    words += f"not resolved: {open_}, of which {stand['open, same']} with the published sign; "
    return words + f"published as zero: {stand['equal']}; not run: {stand[NOT_RUN]}."


def _run_table(run: Sequence[Entry]) -> str:
    head = ["table", "title", "source", "rows run", "scale", "seeds", "tau-b", "same sign", "opposite", "not resolved"]
    head += ["zero", "not run", "pairs against", "together", "took"]
    return grid(head, [_run_row(one, one.found) for one in run if one.found])


def _run_row(one: Entry, found: Findings) -> list[str]:
    stand, order = counts(one.claims), order_of(found)
    seeds = sorted({len(found.values(label)) for label in found.labels})
    open_ = stand["open"] + stand["open, same"]
    return [
        one.place,
        one.table.title,
        one.table.source,
        f"{len(found.labels)} of {len(one.table.rows)}",
        f"`{found.plan.scale}`",
        str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
        f"{signed(order.tau, 2)} ({order.rows} rows, p = {order.chance:.2g})" if order else "-",
        str(stand["same"]),
        str(stand["opposite"]),
        f"{open_} ({stand['open, same']})" if open_ else "0",
        str(stand["equal"]),
        str(stand[NOT_RUN]),
        str(len(out_of_order(found))),
        conclusion(one.claims) if one.claims else "nothing to compare",
        hours(found.spent()),
    ]


def _rest_table(rest: Sequence[Entry]) -> str:
    head = ["table", "title", "source", "rows", "published differences", "runs"]
    return grid(
        head,
        [
            [one.place, one.table.title, one.table.source, str(len(one.table.rows)), str(len(one.claims)), NOT_RUN]
            for one in rest
        ],
    )


def _missing_rows(entries: Sequence[Entry]) -> list[list[str]]:
    return [
        [one.place, row.label, figure(row.published.get(one.table.task.metric)), " ".join(row.reason.split())]
        for one in entries
        for row in one.table.not_expressed
    ]
