"""The page of a report: tables, and what can be told from them, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping

from detfamily.experiments.claims import NOT_RUN, baseline_words, claim_of, claims, order_of, summary
from detfamily.experiments.findings import SPENT, Findings, frontier
from detfamily.experiments.results import FAILED, FINISHED
from detfamily.experiments.statistics import LEVEL, Difference, summarize
from detfamily.experiments.table import Table
from detfamily.experiments.text import figure, grid, hours, names, number, signed, with_spread


def markdown(found: Findings, pictures: Mapping[str, str], records: str | None = None) -> str:
    """The page.

    Args:
        found: the results.
        pictures: caption -> file, relative to the page.
        records: the file that holds the runs; None: the one beside the table.
    """
    table, label = found.table, found.table.task.label
    records = f"`{records or f'{table.path.stem}.jsonl'}`"
    parts = [
        f"# {table.title}",
        f"`{table.name}`: written by `detfamily report` from the {len(found.records)} runs in {records}.",
        f"**The claim** ({table.source}): {' '.join(table.claim.split())}",
        f"**Here:** {_setting(found)}",
        f"**Does it hold here?** {summary(found)}",
        "## Reading",
        "\n".join(f"- {sentence}" for sentence in reading(found)),
        "## Ours beside published",
        _main_table(found),
        f"{label} in per cent; ± is the standard deviation of a single run over the seeds. The difference is that of "
        f"the means to {_compared_with(table)}, in points, with its 95 % t-interval; *paired* compares runs of the "
        "same seed. The verdict compares the sign with the published one; resolved: the interval leaves zero out.",
        *(f"![{caption}]({file})\n\n{caption}." for caption, file in pictures.items()),
        f"## {table.task.others}",
        _size_table(found),
        *_cost_parts(found),
        "## What was run",
        _run_table(found),
    ]
    if troubles := _troubles(found):
        parts += ["## Missing and failed", "\n".join(troubles)]
    return "\n\n".join(parts) + "\n"


def _setting(found: Findings) -> str:
    plan = found.plan
    # The scale may have had to take another of its choices, so that every row fits.
    chosen = {one[7:] for record in found.records for one in record["overrides"] if one.startswith("+scale=")}
    words = f"scale `{' '.join(sorted(chosen)) or plan.scale}`, {len(found.labels)} of {len(found.table.rows)} rows, "
    words += f"seeds {', '.join(map(str, plan.seeds))}; code {plan.commit}"
    if plan.further:
        words += "; further overrides " + ", ".join(f"`{one}`" for one in plan.further)
    if plan.scale == found.table.task.published:
        return f"{words}."
    return (
        f"{words}. Other data and a smaller {found.table.task.model} than the paper's: absolute figures are not "
        "comparable with the published ones, only differences between rows are, and those with care."
    )


def reading(found: Findings) -> list[str]:
    """What can be told from these runs, and what cannot, in sentences."""
    absent, compared = _absent(found), found.compared
    if not compared:
        return absent
    verdict = _verdict(compared, baseline_words(found.table))
    return [*absent, verdict, *_order(found), *_sizes(found), *_precision(compared), *_cautions(found)]


def _absent(found: Findings) -> list[str]:
    """Which baselines are missing that rows were run for, and whether nothing but baselines was run."""
    needed = [found.table.baseline_of(label) for label in found.labels]
    sentences = [
        f"The baseline `{base}` has no finished run, so there is nothing to compare with."
        for base in found.table.baselines
        if base in needed and not found.values(base)
    ]
    if not any(needed):
        one = len(found.labels) == 1
        which = f"the baseline {names(found.labels)} has" if one else f"baselines, {names(found.labels)}, have"
        sentences.append(f"Only {which} finished, so there is nothing to compare.")
    return sentences


def _compared_with(table: Table) -> str:
    """The baseline of a row, as the words below the main table name it."""
    return f"`{table.baseline}`" if len(table.baselines) == 1 else "the row named under *against*"


def _verdict(compared: Mapping[str, Difference], base: str) -> str:
    resolved = {label: one for label, one in compared.items() if one.resolved}
    unresolved = {label: one for label, one in compared.items() if one.has_interval and not one.resolved}
    single = {label: one for label, one in compared.items() if not one.has_interval}
    words = f"Differences to {base} that are resolved (the 95 % interval leaves zero out): {len(resolved)} of "
    words += f"{len(compared)}{': ' if resolved else ''}{_listing(resolved)}."
    if unresolved:
        words += f" Not resolved, the interval contains zero: {_listing(unresolved)}."
    if single:
        words += f" One run on either side has no spread, so nothing can be told from chance: {_listing(single)}."
    return words


def _order(found: Findings) -> list[str]:
    """Whether the rows come in the published order."""
    one = order_of(found)
    if one is None:
        return []
    words = (
        f"Order: Kendall's tau-b between the published figures and ours is {signed(one.tau, 2)} over {one.rows} rows "
    )
    words += f"({one.agree} pairs in the published order, {one.against} against it). "
    if math.isnan(one.low):
        words += "No row has two seeds, so how far chance could move it is not known. "
    else:
        words += f"With the seeds drawn again, 95 % lie from {signed(one.low, 2)} to {signed(one.high, 2)} "
        words += f"(at most {one.seeds} seeds a row{', from so few rather too narrow' if one.seeds < 10 else ''}). "
    words += f"Rows in random order agree as well with a probability of {one.chance:.2g}"
    least = f"; {one.rows} rows allow no less than {one.least:.2g}" if one.least > 1 - LEVEL else ""
    return [f"{words}{least}."]


def _sizes(found: Findings) -> list[str]:
    """Whether differences are as large as published."""
    known = {one.label: one.holds_size for one in claims(found.table, found) if one.holds_size is not None}
    if not known:
        return []
    inside = [label for label, holds in known.items() if holds]
    words = f"Size: the published one lies in {len(inside)} of {len(known)} intervals"
    words += f" ({names(inside)})." if inside else "."
    if found.plan.scale != found.table.task.published:
        words += " On a miniature, whose training is short, sizes need not be the paper's."
    return [words]


def _precision(compared: Mapping[str, Difference]) -> list[str]:
    """How small a difference these seeds can show."""
    reach = [one.half_width for one in compared.values() if one.has_interval]
    if not reach:
        return []
    between = f"{reach[0]:.1f}" if len(reach) == 1 else f"{min(reach):.1f} to {max(reach):.1f}"
    sentences = [
        f"At this number of seeds the intervals reach {between} points to each side: smaller differences cannot be "
        "told from chance here. The spread itself is poorly known from few seeds."
    ]
    if len(reach) > 1:
        sentences.append(
            f"Each of the {len(reach)} intervals stands for itself, without a correction for their number: of 20 rows "
            "without any effect, one would be expected to leave zero out."
        )
    return sentences


def _cautions(found: Findings) -> list[str]:
    means = {label: summarize(list(found.values(label).values())).mean for label in found.labels}
    low = [label for label, mean in means.items() if mean < 1]
    nothing = (
        f"{names(low)}: {found.table.task.label} below 1, next to nothing was learned; that says nothing about the "
    )
    sentences = [f"{nothing}claim."] * bool(low)
    if len({_images(found, label) for label in found.labels} - {None}) > 1:
        sentences.append("The rows saw different numbers of images: the last column of the next table.")
    return sentences + [f"`{label}`: {words}." for label, words in found.plan.remarks.items() if label in found.labels]


def _listing(compared: Mapping[str, Difference]) -> str:
    return ", ".join(f"`{label}` {signed(one.mean)} (n = {one.n})" for label, one in compared.items())


def _main_table(found: Findings) -> str:
    table, task = found.table, found.table.task
    against = ["against"] if len(table.baselines) > 1 else []
    head = ["row", *against, f"published {task.label}", "published difference", f"our {task.label}", "n"]
    head += ["our difference", "95 % interval", "verdict", "images"]
    lines = []
    for row in table.rows:
        ours, base, claim = found.values(row.label), table.baseline_of(row.label), claim_of(table, row.label, found)
        whole = summarize(list(ours.values())) if ours else None
        cells = [row.label, *(base or "-" for _ in against), figure(row.published.get(task.metric))]
        cells.append("baseline" if base is None else signed(claim.published))
        cells += [with_spread(whole.mean, whole.spread), str(whole.n)] if whole else ["-", "0"]
        if base is None:
            cells += ["baseline" if whole else "-", "-", "-" if whole else NOT_RUN]
        else:
            cells += [*_difference_cells(claim.ours), claim.verdict]
        lines.append([*cells, number(_images(found, row.label))])
    return grid(head, lines)


def _difference_cells(one: Difference | None) -> list[str]:
    if one is None:
        return ["-", "-"]
    if not one.has_interval:
        return [signed(one.mean), "none (n = 1)"]
    kind = "paired" if one.paired else "unpaired"
    return [signed(one.mean), f"{signed(one.low)} to {signed(one.high)} ({kind}, n = {one.n})"]


def _size_table(found: Findings) -> str:
    others = found.table.task.metrics[1:]
    shown = [metric for metric in others if any(found.values(label, metric) for label in found.labels)]
    head = ["row", *(f"{metric} {which}" for metric in shown for which in ("published", "ours"))]
    lines = []
    for label in found.labels:
        cells = [label]
        for metric in shown:
            ours = found.values(label, metric)
            whole = summarize(list(ours.values())) if ours else None
            cells += [figure(found.table.row(label).published.get(metric))]
            cells += [with_spread(whole.mean, whole.spread) if whole else "-"]
        lines.append(cells)
    return grid(head, lines)


def _cost_parts(found: Findings) -> list[str]:
    """What a row takes, where that is known."""
    costs = found.tradeoff()
    if not costs:
        return []
    best = frontier(costs)
    lines = [
        [
            label,
            with_spread(one.reached, one.spread),
            "-" if one.params_m is None else f"{one.params_m:.3g}",
            f"{one.images_per_second:.1f}",
            "-" if one.memory_gib is None else f"{one.memory_gib:.2f}",
            "-" if one.seconds is None else f"{one.seconds / 60:.1f}",
            "-" if one.relative is None else f"{one.relative:.2f}",
            hours(one.spent),
            "yes" if label in best else "no",
        ]
        for label, one in costs.items()
    ]
    head = [
        "row",
        f"our {found.table.task.label}",
        "parameters, M",
        "images/s in training",
        "peak memory, GiB",
        "minutes",
        "of the baseline's time",
        "all its runs",
        "on the frontier",
    ]
    words = (
        "Parameters are those that are trained, in millions. Speed and minutes are those of a row's fastest run, since "
        "other work on the machine only slows a run down; memory is the median. On the frontier: no other row has both "
        f"a higher {found.table.task.label} and a higher speed. The multiple of the baseline's time compares two such "
        f"runs, so where the machine was busy it tells of that, too. All {len(found.records)} runs together: "
        f"{hours(found.spent())}; {SPENT}."
    )
    return ["## What a row costs", grid(head, lines), words]


def _run_table(found: Findings) -> str:
    task = found.table.task
    head = ["row", "seed", "status", "images", task.label, "images/s", "peak memory", "seconds", "commit", "date"]
    lines = []
    for label in found.table.labels:
        for one in found.records:
            if one["row"] != label:
                continue
            memory = f"{one['memory_gib']:.2f} GiB ({one['memory_of']})" if one.get("memory_gib") else "-"
            lines.append(
                [
                    label,
                    str(one["seed"]),
                    one["status"],
                    number(one["images_seen"]),
                    figure(None if one[task.metric] is None else 100 * one[task.metric]),
                    figure(one.get("images_per_second")),
                    memory,
                    number(one.get("seconds")),
                    one["commit"],
                    str(one.get("date", "-"))[:10],
                ]
            )
    return grid(head, lines)


def _troubles(found: Findings) -> list[str]:
    """What is not there, by name."""
    begun = {one["row"] for one in found.records}
    never = [label for label in found.table.labels if label not in begun]
    lines = [f"- not run: {names(never)}"] * bool(never)
    for label in (one for one in found.table.labels if one in begun):
        there = {one["seed"]: one for one in found.records if one["row"] == label}
        absent = [str(seed) for seed in found.plan.seeds if seed not in there]
        if absent:
            lines.append(f"- `{label}`: not run, seed {', '.join(absent)}")
        for seed, one in there.items():
            if one["status"] == FAILED:
                lines.append(f"- `{label}`, seed {seed}: failed: {one['error']}")
            elif one["status"] != FINISHED:
                lines.append(f"- `{label}`, seed {seed}: not finished ({number(one['images_seen'])} images)")
    if found.left_out:
        lines.append(f"- left out: {found.left_out} finished runs of other code or settings in the same folder")
    return lines


def _images(found: Findings, label: str) -> float | None:
    seen = [one["images_seen"] for one in found.records if one["row"] == label and one["status"] == FINISHED]
    return max((one for one in seen if one is not None), default=None)
