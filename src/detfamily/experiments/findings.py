"""The results that a report is about: where they lie, and which of them belong together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detfamily.errors import ConfigError, DataError, nearest
from detfamily.experiments import results
from detfamily.experiments.results import FINISHED, HOME, PLAN, Plan, Record
from detfamily.experiments.scale import scales
from detfamily.experiments.statistics import Difference, difference, summarize
from detfamily.experiments.table import Table, read_table
from detfamily.experiments.task import TASKS

USAGE = "detfamily report [experiments|TABLE.yaml|FOLDER [scale=mini] [output_dir=FOLDER OF THE RUNS]]"


@dataclass(frozen=True)
class Cost:
    """What a row reached and what it took, over its finished runs.

    Attributes:
        reached: mean of the metric, per cent.
        spread: its standard deviation over seeds; NaN for one run.
        images_per_second: in training, of the fastest run: other work on the machine only slows a run down.
        memory_gib: peak, median; None where it was not measured.
        seconds: of the shortest run.
        params_m: millions of parameters that are trained; None where they were not counted.
        relative: the seconds as a multiple of its baseline's; None where either is not known.
        spent: hours of all of the row's runs, by what they ran on.
    """

    reached: float
    spread: float
    images_per_second: float
    memory_gib: float | None
    seconds: float | None
    params_m: float | None = None
    relative: float | None = None
    spent: Mapping[str, float] = field(default_factory=dict)


SPENT = "GPU-h are GPUs times hours, CPU-h threads times hours; runs that do not say how many they had, had one"
"""What hours mean, in words."""


@dataclass(frozen=True)
class Findings:
    """A table with the records that a report is about: one code, and one configuration for each row.

    Attributes:
        table: the table.
        plan: what was asked for.
        records: of the plan.
        left_out: finished runs of other code or settings in the same folder.
    """

    table: Table
    plan: Plan
    records: tuple[Record, ...]
    left_out: int = 0

    def values(self, label: str, metric: str | None = None) -> dict[int, float]:
        """Seed -> value in per cent, of the metric that rows are compared by or of another one."""
        return results.values(self.records, label, metric or self.table.task.metric)

    @property
    def labels(self) -> list[str]:
        """Rows with a finished run, in the table's order."""
        return [label for label in self.table.labels if self.values(label)]

    @property
    def compared(self) -> dict[str, Difference]:
        """Label -> the row minus its baseline, points, of those where both have a finished run."""
        found = {label: self.difference(label) for label in self.labels}
        return {label: one for label, one in found.items() if one is not None}

    def over_runs(self, of: Callable[[list[float]], float], label: str, field: str) -> float | None:
        """Of all of a row's finished runs, what their records say of a field, such as ``images_per_second``."""
        mine = (one for one in self.records if one["row"] == label and one["status"] == FINISHED)
        known = [float(one[field]) for one in mine if one.get(field) is not None]
        return of(known) if known else None

    def tradeoff(self) -> dict[str, Cost]:
        """Label -> what the row reached and took, of the rows whose speed is known."""
        found = {}
        for label in self.labels:
            base = self.over_runs(min, self.table.baseline_of(label) or label, "seconds")
            whole = summarize(list(self.values(label).values()))
            speed = self.over_runs(max, label, "images_per_second")
            if speed is not None:
                memory = self.over_runs(statistics.median, label, "memory_gib")
                seconds = self.over_runs(min, label, "seconds")
                relative = seconds / base if seconds is not None and base else None
                size, spent = self.over_runs(max, label, "params_m"), self.spent(label)
                found[label] = Cost(whole.mean, whole.spread, speed, memory, seconds, size, relative, spent)
        return found

    def spent(self, label: str | None = None) -> dict[str, float]:
        """Hours of all runs, also of those that failed, of a row or of the table: ``{"GPU": ..., "CPU": ...}``.

        A run that does not say how many GPUs or threads it had, had one.
        """
        found: dict[str, float] = {}
        for one in self.records:
            if label not in (None, one["row"]):
                continue
            on_gpu = bool(one.get("gpu_hours")) or one.get("memory_of") == "cuda"
            amount = one.get("gpu_hours" if on_gpu else "core_hours") or (one.get("seconds") or 0) / 3600
            kind = "GPU" if on_gpu else "CPU"
            found[kind] = found.get(kind, 0) + amount
        return {kind: amount for kind, amount in sorted(found.items(), reverse=True) if amount}

    def difference(self, label: str) -> Difference | None:
        """A row minus its baseline, points; None where one of the two has no finished run, and for a baseline."""
        base = self.table.baseline_of(label)
        if base is None or not self.values(label) or not self.values(base):
            return None
        return difference(self.values(label), self.values(base))


def frontier(costs: Mapping[str, Cost]) -> list[str]:
    """The rows that no other row beats in the metric without being slower, the fastest first (the Pareto frontier)."""
    best, kept = float("-inf"), []
    for label in sorted(costs, key=lambda one: (-costs[one].images_per_second, -costs[one].reached)):
        if costs[label].reached > best:
            best = costs[label].reached
            kept.append(label)
    return kept


def read_findings(words: Sequence[str]) -> Findings:
    """The results that the words mean.

    Raises:
        ConfigError: not one table or folder, an unknown word or scale, or several scales to choose from.
        DataError: no results yet.
    """
    own = {key: value for key, equals, value in (word.partition("=") for word in words) if equals}
    places = [word for word in words if "=" not in word]
    if len(places) != 1 or (unknown := set(own) - {"scale", "output_dir"}):
        reason = f"{nearest(min(unknown), ['scale', 'output_dir'])}; " if len(places) == 1 else ""
        raise ConfigError(f"{reason}expected one table or one folder of runs\nusage: {USAGE}")
    scale = own.get("scale")
    known = {name for task in TASKS.values() for name in scales(task)}
    if scale is not None and scale not in known:
        raise ConfigError(f"there is no scale {scale!r}: {nearest(scale, known)}")
    place = Path(places[0]).expanduser()
    if place.is_dir():
        return of_folder(place)
    table = read_table(place)
    if "output_dir" in own:
        return of_folder(Path(own["output_dir"]).expanduser(), table)
    folders = (
        [results.home(table.name, scale)] if scale else sorted((HOME / table.name).parent.glob(f"{table.path.stem}-*"))
    )
    folders = [one for one in folders if (one / PLAN).is_file() and Plan.read(one).scale == one.name.rpartition("-")[2]]
    if len(folders) > 1:
        names = ", ".join(f"scale={Plan.read(one).scale}" for one in folders)
        raise ConfigError(f"{table.name} has results on several scales, say which: {names}")
    return of_folder(folders[0], table) if folders else of_file(table, scale)


def of_folder(folder: Path, table: Table | None = None) -> Findings:
    """The results of the last plan of a folder of runs.

    Raises:
        DataError: the folder holds none.
    """
    if not (folder / PLAN).is_file():
        raise DataError(f"no results yet in {folder}: detfamily ablate TABLE.yaml scale=... output_dir={folder}")
    plan = Plan.read(folder)
    table = table or read_table(plan.table)
    every = results.collect(folder)
    mine = tuple(one for one in every if plan.holds(one))
    others = sum(one["status"] == FINISHED and not plan.holds(one) for one in every)
    return _checked(Findings(table, plan, mine, others), str(folder))


def of_file(table: Table, scale: str | None = None) -> Findings:
    """The results that lie beside a table.

    Raises:
        DataError: there are none, or they mix code or configurations.
    """
    file = table.path.with_suffix(".jsonl")
    if not file.is_file():
        way = f"detfamily ablate {table.path} scale={scale or 'mini'} seeds=3"
        raise DataError(f"no results yet of {table.name}: {way}")
    records = results.read_results(file)
    rows: dict[str, str] = {}
    for one in records:
        first = records[0]
        if (one["code"], one["scale"]) != (first["code"], first["scale"]) or (
            rows.setdefault(one["row"], one["config"]) != one["config"]
        ):
            raise DataError(f"{file} mixes runs of different code, scale or settings: {one['row']}, seed {one['seed']}")
    if not records or (scale and scale != records[0]["scale"]):
        raise DataError(f"no results yet of {table.name} on scale={scale or 'mini'} in {file}")
    first = records[0]
    remarks = {one["row"]: one["remark"] for one in records if one.get("remark")}
    seeds = tuple(sorted({one["seed"] for one in records}))
    further = tuple(first.get("further", ()))
    plan = Plan(str(table.path), first["scale"], seeds, further, rows, remarks, first["code"], first["commit"])
    return _checked(Findings(table, plan, tuple(records)), str(file))


def _checked(found: Findings, where: str) -> Findings:
    if not found.labels:
        raise DataError(f"no results yet in {where}: no run of the last plan has finished; the same ablate goes on")
    return found
