"""``detfamily ablate``: every row of a table with several seeds, as far as it is not done yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from detfamily.errors import ConfigError, nearest
from detfamily.experiments import results
from detfamily.experiments.findings import of_folder
from detfamily.experiments.launchers.choice import Options, default_jobs, is_option, make_launcher, read_options
from detfamily.experiments.launchers.local import LocalOptions
from detfamily.experiments.notes import tail
from detfamily.experiments.report import write_report
from detfamily.experiments.results import FINISHED, LOG, REPORT, RESULTS, Plan, Record
from detfamily.experiments.runner import LAUNCH, Run, Runner
from detfamily.experiments.scale import NOT_IDENTITY, Variant, scales, variants
from detfamily.experiments.screen import Screen
from detfamily.experiments.statistics import summarize
from detfamily.experiments.table import Table, read_table
from detfamily.experiments.version import Code, code_version
from detfamily.experiments.words import RUNS_AT_ONCE, positive, read_words

USAGE = (
    "detfamily ablate TABLE.yaml scale=mini seeds=3 [rows=LABEL,...] [jobs=1] [launcher=local|slurm|ray] "
    "[output_dir=FOLDER] [overrides]"
)
_WORDS = ("scale", "seeds", "rows", "jobs", "launcher", "output_dir")
_RUNS_OWN = ("seed", "resume", "experiment")


@dataclass(frozen=True)
class Request:
    """What was typed.

    Attributes:
        table: the table.
        scale: a choice of configs/scale.
        seeds: of each row.
        rows: labels to run.
        jobs: runs at once; None: all, since the cluster has a queue.
        folder: of all runs of the table on that scale.
        further: overrides for every run.
        options: of the launcher.
    """

    table: Table
    scale: str
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    jobs: int | None
    folder: Path
    further: tuple[str, ...] = field(default=())
    options: Options = field(default=LocalOptions())


def ablate(words: Sequence[str]) -> None:
    """Run the rows of a table with several seeds, and keep their results in one file.

    Args:
        words: the table's file, then ``scale=``, ``seeds=`` and the like, then overrides for every run.

    Raises:
        ConfigError: something in what was typed, or in the table, does not exist or fit.
        SystemExit: with status 1 if a run failed; after a signal.
    """
    request = read_request(words)
    status = go(request)
    if status:
        raise SystemExit(status)


def go(request: Request, launch: Sequence[str] = LAUNCH, version: Callable[[], Code] = code_version) -> int:
    """Print the plan, run what is to be run, and print what came out.

    Args:
        request: what was typed.
        launch: how detfamily is called.
        version: says the present code.

    Returns:
        The exit status: 1 if a run failed.
    """
    code = version()
    planned = variants(request.table, request.scale, request.further)
    runs = all_runs(request, planned, code)
    folder = request.folder
    plan = Plan(
        str(request.table.path.resolve()),
        request.scale,
        request.seeds,
        tuple(one for one in request.further if one.partition("=")[0].lstrip("+~") not in NOT_IDENTITY),
        {label: one.identity for label, one in planned.items()},
        {label: one.remark for label, one in planned.items() if one.remark},
        code.identity,
        code.commit,
    )
    say(describe(request, planned, runs, plan))
    to_do = [run for run in runs if run.status() != FINISHED]
    plan.write(folder)
    gather(folder)
    problems: Mapping[str, str] = {}
    if to_do:
        jobs = min(request.jobs or len(to_do), len(to_do))
        say(forecast(runs, to_do, jobs, results.collect(folder)))
        problems = run_all(request, runs, to_do, jobs, launch, version)
    records = results.collect(folder)
    say(summary(request.table, plan, records))
    say(f"results     {folder / RESULTS}")
    if any(plan.holds(one) and one["status"] == FINISHED for one in records):
        say(f"report      {write_report(of_folder(folder, request.table), folder / REPORT)[0]}")
    for run in runs:
        if run.name in problems:
            log = tail(run.folder / LOG)
            say(f"\nFAILED: {run.name}: {problems[run.name]}\n{run.folder / LOG} ends with\n{log}")
    return 1 if problems else 0


def run_all(
    request: Request,
    runs: Sequence[Run],
    to_do: Sequence[Run],
    jobs: int,
    launch: Sequence[str],
    version: Callable[[], Code],
) -> dict[str, str]:
    """Run what is to be done where the launcher puts it.

    Args:
        request: what was typed.
        runs: all of the plan, which the screen shows.
        to_do: those that have not finished.
        jobs: runs at once.
        launch: how detfamily is called.
        version: says the present code.

    Returns:
        name of each run that failed or could not be started -> what went wrong.

    Raises:
        ConfigError: the launcher is not installed, or its cluster is not there.
        SystemExit: after a signal.
    """
    launcher = make_launcher(request.options, jobs, to_do[0].variant.config["runtime"]["device"])
    try:
        with Screen(runs, request.table.task.label, say) as screen:
            return Runner(to_do, jobs, say, lambda: gather(request.folder), launch, version, launcher, screen).go()
    finally:
        launcher.close()


def gather(folder: Path) -> None:
    """Put the results file together from the folders of the runs."""
    results.write_results(folder / RESULTS, results.collect(folder))


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


# -- what was typed ---------------------------------------------------------------------------------------------------


def read_request(words: Sequence[str]) -> Request:
    """Understand the words after ``detfamily ablate``.

    Raises:
        ConfigError: with what was expected.
    """
    typed = read_words(words, _WORDS, is_option)
    file, own, further = typed.one_file("one table", USAGE), typed.settings, typed.overrides
    for word in further:
        if word.partition("=")[0].lstrip("+~") in _RUNS_OWN:
            raise ConfigError(f"{word!r} is what each run has of its own; seeds=3 or seeds=[0,1,2] sets the seeds")
    table = read_table(file)
    scale = own.get("scale", "")
    known = scales(table.task)
    if scale not in known:
        raise ConfigError(f"scale={scale or '?'}: {nearest(scale, known)}\nusage: {USAGE}")
    folder = Path(own["output_dir"]).expanduser() if own.get("output_dir") else results.home(table.name, scale)
    rows = read_rows_wanted(own["rows"], table) if own.get("rows") else tuple(table.labels)
    launcher = own.get("launcher", "local")
    options = read_options(launcher, {key: value for key, value in own.items() if key not in _WORDS})
    jobs = positive("jobs", own["jobs"], RUNS_AT_ONCE) if "jobs" in own else default_jobs(launcher)
    return Request(table, scale, read_seeds(own.get("seeds", "1")), rows, jobs, folder, further, options)


def read_seeds(text: str) -> tuple[int, ...]:
    """``3`` stands for 0, 1, 2; a list for itself."""
    given = _parsed(text)
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return tuple(range(given))
    if isinstance(given, list) and given and all(type(one) is int and one >= 0 for one in given):
        return tuple(dict.fromkeys(given))
    raise ConfigError(f"seeds={text}: expected how many (seeds=3), or which (seeds=[0,1,2])")


def read_rows_wanted(text: str, table: Table) -> tuple[str, ...]:
    """Labels: one as it is, several separated by commas, or a list in YAML where labels have commas.

    Raises:
        ConfigError: a label that the table does not have.
    """
    if text in table.labels:
        return (text,)
    given = _parsed(text) if text.startswith("[") else text.split(",")
    if not isinstance(given, list) or not given:
        raise ConfigError(f'rows={text}: expected labels, such as rows=plain,refinement or rows=["a, b", c]')
    wanted = [table.row(str(one).strip()).label for one in given]
    return tuple(label for label in table.labels if label in wanted)


def _parsed(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


# -- what is to be done -----------------------------------------------------------------------------------------------


def all_runs(request: Request, planned: Mapping[str, Variant], code: Code) -> list[Run]:
    """Rows x seeds, a seed at a time, so that there is something to compare early; sources before what needs them."""
    table = request.table
    wanted = [table.row(label) for label in request.rows]
    sources = {row.weights_of for row in wanted if row.weights_of}
    trained = [row for row in table.rows if row.weights_of is None and (row in wanted or row.label in sources)]
    found: list[Run] = []
    for seed in request.seeds:
        first = {
            row.label: Run(table.name, request.scale, planned[row.label], seed, code, request.folder) for row in trained
        }
        found += first.values()
        for row in wanted:
            if row.weights_of:
                source = first[row.weights_of]
                found.append(Run(table.name, request.scale, planned[row.label], seed, code, request.folder, source))
    return found


def describe(request: Request, planned: Mapping[str, Variant], runs: Iterable[Run], plan: Plan) -> str:
    """The plan: rows and seeds, what is done, what the scale changes."""
    labels = list(dict.fromkeys(run.variant.row.label for run in runs))
    width = max(map(len, labels))
    cells = {(run.variant.row.label, run.seed): _cell(run) for run in runs}
    lines = [
        f"{request.table.title} ({request.table.name})",
        f"  scale {request.scale}, code {plan.commit}, runs in {request.folder}",
        "",
        f"  {'':<{width}}  " + "".join(f"{f'seed {seed}':>10}" for seed in request.seeds) + "  images",
    ]
    for label in labels:
        images = planned[label].images
        length = "evaluated only" if planned[label].row.weights_of else images if images else "the data set decides"
        marks = "".join(f"{cells[label, seed]:>10}" for seed in request.seeds)
        remark = f", {planned[label].remark}" if planned[label].remark else ""
        lines.append(f"  {label:<{width}}  {marks}  {length}{remark}")
    others = Counter(
        _other(one, plan)
        for one in results.collect(request.folder)
        if one["status"] == FINISHED and one["row"] in labels and not plan.holds(one)
    )
    lines += [
        f"  {count} finished runs of {words} stay where they are, and are not counted"
        for words, count in others.items()
    ]
    return "\n".join(lines)


def _cell(run: Run) -> str:
    status = run.status()
    if status is None:
        return "-"
    if status == results.CUT_OFF:
        return f"at {100 * run.progress():.0f} %"
    return "done" if status == FINISHED else status


def _other(record: Record, plan: Plan) -> str:
    return "other settings" if record["code"] == plan.code else f"other code ({record['commit']})"


def forecast(runs: Sequence[Run], to_do: Sequence[Run], jobs: int, records: Sequence[Record]) -> str:
    """How many runs there are, and what they may take, judged by those of the same row, else of the table."""
    begun = sum(run.status() is not None for run in to_do)
    words = f"\n{len(runs)} runs: {len(runs) - len(to_do)} done, {begun} to go on with, {len(to_do) - begun} to start"
    known = [one for one in records if one["status"] == FINISHED and one["seconds"] is not None]
    if not known:
        return words
    left = dict.fromkeys(("seconds", *HOURS), 0.0)
    for run in to_do:
        same = [one for one in known if one["row"] == run.variant.row.label]
        alike = same or [one for one in known if one["curve"]] or known
        for key in left:
            left[key] += summarize([one.get(key) or 0.0 for one in alike]).mean * (1 - run.progress())
    price = "".join(f", {one}" for one in hours(left))
    return f"{words}; about {duration(left['seconds'] / min(jobs, len(to_do)))} with {jobs} at once{price}"


HOURS = {"gpu_hours": "GPU-hours", "core_hours": "core-hours"}
"""What runs cost, by the field of their records."""


def hours(spent: Mapping[str, float]) -> list[str]:
    """A cost in words: ``["3.2 GPU-hours"]``; nothing of what costs nothing."""
    return [f"{spent[key]:.2g} {words}" for key, words in HOURS.items() if spent[key] > 0]


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summary(table: Table, plan: Plan, records: Sequence[Record]) -> str:
    """A line per row: mean and spread of what has finished so far."""
    mine = [one for one in records if plan.holds(one)]
    width = max(map(len, table.labels))
    lines = [""]
    for label in table.labels:
        found = results.values(mine, label, table.task.metric)
        if not found:
            lines.append(f"  {label:<{width}}  no results yet")
            continue
        whole = summarize(list(found.values()))
        spread = f" ± {whole.spread:.1f}" if whole.n > 1 else ""
        lines.append(f"  {label:<{width}}  {table.task.label} {whole.mean:.1f}{spread} (n = {whole.n})")
    spent = hours({key: sum(one.get(key) or 0.0 for one in mine) for key in HOURS})
    lines += [f"cost        {', '.join(spent)}"] if spent else []
    return "\n".join(lines)
