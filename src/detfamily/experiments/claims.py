"""Whether what a source found shows here, too: the sign and size of each difference that it prints, and the order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from detfamily.experiments.findings import Findings
from detfamily.experiments.statistics import Difference, Order, difference, order
from detfamily.experiments.table import Table
from detfamily.experiments.text import names

NOT_RUN = "not run"

SHOWN = 4
"""Pairs of rows that a sentence names."""


@dataclass(frozen=True)
class Claim:
    """A row against its baseline: what the source prints, and what came out here.

    Attributes:
        label: the row.
        published: the difference to the baseline, points; None where the source does not print it.
        ours: the same of our runs; None where the row or the baseline has no finished run.
    """

    label: str
    published: float | None
    ours: Difference | None

    @property
    def resolved(self) -> bool:
        return self.ours is not None and self.ours.resolved

    @property
    def agrees(self) -> bool | None:
        """Whether the sign is the published one; None where there is no sign to compare."""
        if not self.published or self.ours is None or self.ours.mean == 0:
            return None
        return (self.published > 0) == (self.ours.mean > 0)

    @property
    def holds_size(self) -> bool | None:
        """Whether the interval holds the published difference; None where there is none of the two."""
        if self.published is None or self.ours is None or not self.ours.has_interval:
            return None
        return self.ours.low <= self.published <= self.ours.high

    @property
    def verdict(self) -> str:
        """In words: the sign against the published one, and whether it could be told from chance."""
        if self.ours is None:
            return NOT_RUN
        told = "resolved" if self.resolved else "not resolved" if self.ours.has_interval else "no interval"
        if self.published is None:
            return told
        if self.published == 0:
            return f"published as equal, {told}"
        if self.agrees is None:
            return f"no difference, {told}"
        return f"{'same' if self.agrees else 'opposite'} sign, {told}"


def claim_of(table: Table, label: str, found: Findings | None = None) -> Claim:
    """A row against its baseline.

    Args:
        table: the table.
        label: of the row.
        found: the runs; None: there are none.
    """
    return Claim(label, table.published_difference(label), found.difference(label) if found else None)


def claims(table: Table, found: Findings | None = None) -> list[Claim]:
    """The differences to their baselines that the source prints, in the table's order."""
    every = [claim_of(table, label, found) for label in table.labels]
    return [one for one in every if one.published is not None]


def baseline_words(table: Table) -> str:
    """What rows are compared with, in a sentence."""
    return f"`{table.baseline}`" if len(table.baselines) == 1 else f"the {len(table.baselines)} baselines"


def order_of(found: Findings) -> Order | None:
    """The order of the rows beside the published one; None where there are not two rows to put in order."""
    return order(found.table.published_order(), {label: found.values(label) for label in found.labels})


def out_of_order(found: Findings) -> list[tuple[str, str]]:
    """Pairs of rows, the better one as published first, whose order is the other way round here, and resolved."""
    levels = {label: value for label, value in found.table.published_order().items() if found.values(label)}
    pairs = [(one, other) for one in levels for other in levels if levels[one] > levels[other]]
    apart = {pair: difference(found.values(pair[0]), found.values(pair[1])) for pair in pairs}
    return [pair for pair, one in apart.items() if one.resolved and one.mean < 0]


def conclusion(given: Sequence[Claim]) -> str:
    """What the signs say together, in a few words."""
    signs = [one.agrees for one in given if one.resolved and one.agrees is not None]
    if not signs:
        return "open"
    if not all(signs):
        return "holds in part" if any(signs) else "contradicted"
    return "holds" if len(signs) == sum(bool(one.published) for one in given) else "holds where resolved"


def counts(given: Sequence[Claim]) -> dict[str, int]:
    """How many claims stand how; the parts add up to all."""
    found = Counter({"same": 0, "opposite": 0, "open, same": 0, "open": 0, "equal": 0, NOT_RUN: 0})
    for one in given:
        if one.ours is None:
            found[NOT_RUN] += 1
        elif one.published == 0:
            found["equal"] += 1
        elif one.resolved:
            found["same" if one.agrees else "opposite"] += 1
        else:
            found["open, same" if one.agrees else "open"] += 1
    return dict(found)


def summary(found: Findings) -> str:
    """The signs of all published differences in a sentence, and which rows are in another order for sure."""
    given = claims(found.table, found)
    if not given:
        return "The source prints no differences between these rows, so there are no figures to hold it to."
    if all(one.ours is None for one in given):
        return "Not told: no row with a published difference has been run beside its baseline."
    stand = counts(given)
    against = [one.label for one in given if one.resolved and one.agrees is False]
    open_, likewise = stand["open"] + stand["open, same"], stand["open, same"]
    parts = [
        f"{stand['same']} resolved with the published sign",
        f"{stand['opposite']} resolved with the opposite one{f' ({names(against)})' if against else ''}",
        f"{open_} not resolved{f' (with the published sign: {likewise})' if open_ else ''}",
    ]
    parts += [f"{stand['equal']} published as zero"] * bool(stand["equal"])
    parts += [f"{stand[NOT_RUN]} not run"] * bool(stand[NOT_RUN])
    number = f"{len(given)} published difference{'s' if len(given) > 1 else ''} to {baseline_words(found.table)}"
    words = f"{conclusion(given).capitalize()}, at this scale. Of {number}: {', '.join(parts)}."
    pairs = out_of_order(found)
    if pairs:
        several = f"{len(pairs)} pairs of rows are" if len(pairs) > 1 else "one pair of rows is"
        shown = ", ".join(f"`{worse}` above `{better}`" for better, worse in pairs[:SHOWN])
        words += f" But {several} resolved against the published order: {shown}{', ...' if pairs[SHOWN:] else '.'}"
    return words
