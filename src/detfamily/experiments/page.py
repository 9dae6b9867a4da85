"""The page of a report: tables, and what can be told from them, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from detfamily.experiments.findings import Findings, frontier
from detfamily.experiments.results import FAILED, FINISHED
from detfamily.experiments.statistics import Difference, summarize
from detfamily.experiments.table import Table


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
        "## Reading",
        "\n".join(f"- {sentence}" for sentence in reading(found)),
        "## Ours beside published",
        _main_table(found),
        f"{label} in per cent; ± is the standard deviation of a single run over the seeds. The difference is that of "
        f"the means to `{table.baseline}`, in points, with its 95 % t-interval; *paired* compares runs of the same "
        "seed.",
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
    base = found.table.baseline
    if not found.values(base):
        return [f"The baseline `{base}` has no finished run, so there is nothing to compare with."]
    if not found.others:
        return [f"Only the baseline `{base}` has finished, so there is nothing to compare."]
    compared = {label: found.difference(label) for label in found.others}
    return [_verdict(compared, base), *_signs(found.table, compared), *_precision(compared), *_cautions(found)]


def _verdict(compared: Mapping[str, Difference], base: str) -> str:
    resolved = {label: one for label, one in compared.items() if one.resolved}
    unresolved = {label: one for label, one in compared.items() if one.has_interval and not one.resolved}
    single = {label: one for label, one in compared.items() if not one.has_interval}
    words = f"Differences to `{base}` that are resolved (the 95 % interval leaves zero out): {len(resolved)} of "
    words += f"{len(compared)}{': ' if resolved else ''}{_listing(resolved)}."
    if unresolved:
        words += f" Not resolved, the interval contains zero: {_listing(unresolved)}."
    if single:
        words += f" One run on either side has no spread, so nothing can be told from chance: {_listing(single)}."
    return words


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
        f"{_names(low)}: {found.table.task.label} below 1, next to nothing was learned; that says nothing about the "
    )
    sentences = [f"{nothing}claim."] * bool(low)
    if len({_images(found, label) for label in found.labels} - {None}) > 1:
        sentences.append("The rows saw different numbers of images: the last column of the next table.")
    return sentences + [f"`{label}`: {words}." for label, words in found.plan.remarks.items() if label in found.labels]


def _signs(table: Table, compared: Mapping[str, Difference]) -> list[str]:
    """Whether resolved differences have the published sign."""
    known = {label: value for label in compared if (value := table.published_difference(label))}
    told = [label for label in known if compared[label].resolved]
    if not known:
        return ["The source prints no differences for these rows."]
    agree = [label for label in told if math.copysign(1, known[label]) == math.copysign(1, compared[label].mean)]
    against = [label for label in told if label not in agree]
    words = f"The source prints {len(known)} of these differences; resolved here with its sign: {len(agree)}, "
    words += f"with the opposite sign: {len(against)}{f' ({_names(against)})' if against else ''}, "
    return [words + f"open: {len(known) - len(told)}."]


def _listing(compared: Mapping[str, Difference]) -> str:
    return ", ".join(f"`{label}` {_signed(one.mean)} (n = {one.n})" for label, one in compared.items())


def _names(labels: Iterable[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def _main_table(found: Findings) -> str:
    task = found.table.task
    head = ["row", f"published {task.label}", "published difference", f"our {task.label}", "n"]
    head += ["our difference", "95 % interval", "resolved", "images"]
    lines = []
    for row in found.table.rows:
        ours = found.values(row.label)
        whole = summarize(list(ours.values())) if ours else None
        cells = [
            row.label,
            _figure(row.published.get(task.metric)),
            _signed(found.table.published_difference(row.label)),
        ]
        cells += [_mean(whole.mean, whole.spread), str(whole.n)] if whole else ["-", "0"]
        if whole is None or not found.values(found.table.baseline):
            cells += ["-", "-", "-"]
        elif row.label == found.table.baseline:
            cells[2] = "baseline"
            cells += ["baseline", "-", "-"]
        else:
            cells += _difference_cells(found.difference(row.label))
        lines.append([*cells, _number(_images(found, row.label))])
    return _grid(head, lines)


def _difference_cells(one: Difference) -> list[str]:
    if not one.has_interval:
        return [_signed(one.mean), "none (n = 1)", "no"]
    kind = "paired" if one.paired else "unpaired"
    interval = f"{_signed(one.low)} to {_signed(one.high)} ({kind}, n = {one.n})"
    return [_signed(one.mean), interval, "yes" if one.resolved else "no"]


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
            cells += [_figure(found.table.row(label).published.get(metric))]
            cells += [_mean(whole.mean, whole.spread) if whole else "-"]
        lines.append(cells)
    return _grid(head, lines)


def _cost_parts(found: Findings) -> list[str]:
    """What a row takes, where that is known."""
    costs = found.tradeoff()
    if not costs:
        return []
    best = frontier(costs)
    lines = [
        [
            label,
            _mean(one.reached, one.spread),
            f"{one.images_per_second:.1f}",
            "-" if one.memory_gib is None else f"{one.memory_gib:.2f}",
            "-" if one.seconds is None else f"{one.seconds / 60:.1f}",
            "yes" if label in best else "no",
        ]
        for label, one in costs.items()
    ]
    head = [
        "row",
        f"our {found.table.task.label}",
        "images/s in training",
        "peak memory, GiB",
        "minutes",
        "on the frontier",
    ]
    words = (
        f"Speed and minutes are those of a row's fastest run, since other work on the machine only slows a run down; "
        f"memory is the median. On the frontier: no other row has both a higher {found.table.task.label} and a higher "
        "speed."
    )
    return ["## What a row costs", _grid(head, lines), words]


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
                    _number(one["images_seen"]),
                    _figure(None if one[task.metric] is None else 100 * one[task.metric]),
                    _figure(one.get("images_per_second")),
                    memory,
                    _number(one.get("seconds")),
                    one["commit"],
                    str(one.get("date", "-"))[:10],
                ]
            )
    return _grid(head, lines)


def _troubles(found: Findings) -> list[str]:
    """What is not there, by name."""
    lines = []
    for label in found.table.labels:
        there = {one["seed"]: one for one in found.records if one["row"] == label}
        absent = [str(seed) for seed in found.plan.seeds if seed not in there]
        if absent:
            lines.append(f"- `{label}`: not run, seed {', '.join(absent)}")
        for seed, one in there.items():
            if one["status"] == FAILED:
                lines.append(f"- `{label}`, seed {seed}: failed: {one['error']}")
            elif one["status"] != FINISHED:
                lines.append(f"- `{label}`, seed {seed}: not finished ({_number(one['images_seen'])} images)")
    if found.left_out:
        lines.append(f"- left out: {found.left_out} finished runs of other code or settings in the same folder")
    return lines


def _images(found: Findings, label: str) -> float | None:
    seen = [one["images_seen"] for one in found.records if one["row"] == label and one["status"] == FINISHED]
    return max((one for one in seen if one is not None), default=None)


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _mean(mean: float, spread: float) -> str:
    return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}".replace("-", "−")  # noqa: RUF001


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
