"""The tables of ``experiments/``: what a paper varies, and the overrides that express it; its README has the keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from detfamily.config import groups_for
from detfamily.errors import ConfigError, nearest
from detfamily.experiments.task import DETECTION, TASKS, Task

SWEEPS = "sweeps"
_COSTS = ("params_m", "gflops")
_TABLE_KEYS = ("title", "claim", "source", "base", "baseline", "rows", "not_expressed", "task", "tradeoff")
_ROW_KEYS = ("label", "overrides", "published", "difference", "against", "weights_of", "note")


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        label: its name in the table.
        overrides: on top of the table's base.
        published: figures that the source prints, metrics in per cent.
        difference: to the baseline, in per cent, where the source prints only that.
        against: label of the row that it is compared with; None: the table's baseline.
        weights_of: label of the row whose weights are evaluated with these overrides; None for a row that is trained.
        note: a remark.
    """

    label: str
    overrides: tuple[str, ...]
    published: Mapping[str, float] = field(default_factory=dict)
    difference: Mapping[str, float] = field(default_factory=dict)
    against: str | None = None
    weights_of: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class NotExpressed:
    """A row of the source that the switches here cannot express.

    Attributes:
        label: its name in the source.
        reason: what is missing here.
        published: figures that the source prints, metrics in per cent.
    """

    label: str
    reason: str
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Variants that belong together.

    Attributes:
        path: the file.
        title: what is varied.
        claim: what the source found.
        source: where.
        base: a choice of configs/experiment, the same for all rows.
        baseline: label of the row that those are compared with which name no other.
        rows: in the order of the file.
        task: what they train.
        tradeoff: whether rows differ in what they take as much as in what they reach, so that the report draws both.
        not_expressed: rows of the source that are not among ``rows``.
    """

    path: Path
    title: str
    claim: str
    source: str
    base: str
    baseline: str
    rows: tuple[Row, ...]
    task: Task = DETECTION
    tradeoff: bool = False
    not_expressed: tuple[NotExpressed, ...] = ()

    @property
    def name(self) -> str:
        """``paper/table``, as the folder and the file are called."""
        return f"{self.path.resolve().parent.name}/{self.path.stem}"

    @property
    def labels(self) -> list[str]:
        return [row.label for row in self.rows]

    def row(self, label: str) -> Row:
        """The row of a label.

        Raises:
            ConfigError: there is none, with the nearest labels.
        """
        for row in self.rows:
            if row.label == label:
                return row
        raise ConfigError(f"{self.path} has no row {label!r}: {nearest(label, self.labels)}")

    @property
    def baselines(self) -> list[str]:
        """Labels of the rows that others are compared with; they themselves are compared with none."""
        named = {self.baseline, *(row.against for row in self.rows)}
        return [label for label in self.labels if label in named]

    def baseline_of(self, label: str) -> str | None:
        """The label that a row is compared with; None for a baseline."""
        return None if label in self.baselines else self.row(label).against or self.baseline

    def published_difference(self, label: str, metric: str | None = None) -> float | None:
        """What the source says a row differs from its baseline by, per cent; None where it does not say."""
        base, row, metric = self.baseline_of(label), self.row(label), metric or self.task.metric
        if base is None:
            return None
        if metric in row.difference:
            return float(row.difference[metric])
        published = self.row(base).published
        if metric in row.published and metric in published:
            return float(row.published[metric]) - float(published[metric])
        return None

    def published_order(self) -> dict[str, float]:
        """What the source puts the rows in order by: differences to the baseline, or else figures; others left out.

        With several baselines it is figures, as differences to one say nothing about those to another.
        """
        metric = self.task.metric
        apart = {one: self.published_difference(one) for one in self.labels if one != self.baseline}
        if len(self.baselines) > 1 or all(one is None for one in apart.values()):
            return {row.label: float(row.published[metric]) for row in self.rows if metric in row.published}
        levels = {one: 0.0 if one == self.baseline else apart[one] for one in self.labels}
        # Rounded, so that rows with the same figure stay equal.
        return {one: round(value, 6) for one, value in levels.items() if value is not None}


def table_files(folder: Path) -> list[Path]:
    """The tables of a folder: its own, or those of the papers below; sweeps, which have a folder beside, are none."""
    return sorted(file for file in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml")) if file.parent.name != SWEEPS)


def read_table(path: str | Path) -> Table:
    """Read a table.

    Raises:
        ConfigError: there is no such file, it is not YAML, or a key is missing, unknown or not what it should be; with
            the file and the key.
    """
    path = Path(path).expanduser()
    content = _load(path)
    _check_keys(content, _TABLE_KEYS, ("not_expressed", "task", "tradeoff"), str(path))
    task = TASKS.get(content.get("task", "detection"))
    if task is None:
        raise ConfigError(f"{path}: task: there is no task {content['task']!r}: {nearest(str(content['task']), TASKS)}")
    for key in _TABLE_KEYS[:5]:
        _check(isinstance(content[key], str) and bool(content[key].strip()), path, key, "a text", content[key])
    known = groups_for(task.command)["experiment"]
    if content["base"] not in known:
        near = nearest(content["base"], known)
        raise ConfigError(f"{path}: base: there is no experiment {content['base']!r}: {near}")
    found = content["rows"]
    _check(isinstance(found, list) and len(found) > 0, path, "rows", "a list of rows", found)
    tradeoff = content.get("tradeoff", False)
    _check(isinstance(tradeoff, bool), path, "tradeoff", "true or false", tradeoff)
    rows = tuple(_row(path, index, one, task) for index, one in enumerate(found))
    title, claim, source, base, baseline = (content[key].strip() for key in _TABLE_KEYS[:5])
    missing = _not_expressed(path, content.get("not_expressed", []), task)
    table = Table(path, title, claim, source, base, baseline, rows, task, tradeoff, missing)
    _check_labels(table)
    return table


def _load(path: Path) -> Any:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"there is no table {path}: {_nearby(path)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping with {', '.join(_TABLE_KEYS[:-1])}")
    return content


def _nearby(path: Path) -> str:
    folder = next((one for one in (path, *path.parents) if one.is_dir()), Path())
    found = [*table_files(folder), *table_files(Path("experiments"))]
    return (
        nearest(str(path), map(str, found)) if found else "a table is a YAML file such as experiments/PAPER/TABLE.yaml"
    )


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], optional: Iterable[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}: {nearest(str(key), known)}")
    missing = [key for key in known if key not in given and key not in optional]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing")


def _check(right: bool, path: Path, key: str, expected: str, given: object) -> None:
    if not right:
        raise ConfigError(f"{path}: {key}: expected {expected}, not {given!r}")


def _row(path: Path, index: int, given: Any, task: Task) -> Row:
    where = f"rows.{index}"
    _check(isinstance(given, dict), path, where, "a mapping with label and overrides", given)
    label = given.get("label")
    _check(isinstance(label, str) and bool(label.strip()), path, f"{where}.label", "a text (in quotes)", label)
    where = f"{where} ({label})"
    _check_keys(given, _ROW_KEYS, _ROW_KEYS[2:], f"{path}: {where}")
    overrides = given["overrides"]
    fine = isinstance(overrides, list) and all(isinstance(one, str) for one in overrides)
    _check(fine, path, f"{where}.overrides", "a list of overrides such as [decoder=refine]", overrides)
    _check_figures(path, where, given, task)
    for key in ("against", "weights_of", "note"):
        _check(given.get(key) is None or isinstance(given[key], str), path, f"{where}.{key}", "a text", given.get(key))
    if given.get("weights_of") is not None and task is not DETECTION:
        raise ConfigError(f"{path}: {where}.weights_of: only detectors can be evaluated in other ways than trained")
    return Row(**{**given, "overrides": tuple(overrides)})


def _check_figures(path: Path, where: str, given: Mapping[str, Any], task: Task) -> None:
    for key, known in (("published", (*task.metrics, *_COSTS)), ("difference", task.metrics)):
        figures = given.get(key, {})
        _check(isinstance(figures, dict), path, f"{where}.{key}", f"a mapping such as {{{task.metric}: 43.8}}", figures)
        _check_keys(figures, known, known, f"{path}: {where}.{key}")
        for name, value in figures.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _check(number, path, f"{where}.{key}.{name}", "a number", value)


def _not_expressed(path: Path, given: Any, task: Task) -> tuple[NotExpressed, ...]:
    _check(isinstance(given, list), path, "not_expressed", "a list of rows", given)
    found = []
    for index, one in enumerate(given):
        where = f"not_expressed.{index}"
        _check(isinstance(one, dict), path, where, "a mapping with label and reason", one)
        _check_keys(one, ("label", "reason", "published"), ("published",), f"{path}: {where}")
        for key in ("label", "reason"):
            _check(isinstance(one[key], str) and bool(one[key].strip()), path, f"{where}.{key}", "a text", one[key])
        _check_figures(path, where, one, task)
        found.append(NotExpressed(**one))
    return tuple(found)


def _check_labels(table: Table) -> None:
    """Labels are unique, each that is named exists; baselines have none; weights come from rows that are trained."""
    path, labels = table.path, table.labels
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{path}: rows: the label {label!r} stands for {labels.count(label)} rows")
    if table.baseline not in labels:
        raise ConfigError(f"{path}: baseline: there is no row {table.baseline!r}: {nearest(table.baseline, labels)}")
    for row in table.rows:
        if row.against is not None and row.against not in labels:
            raise ConfigError(f"{path}: {row.label}.against: no row {row.against!r}: {nearest(row.against, labels)}")
        if row.against is not None and row.label in table.baselines:
            raise ConfigError(f"{path}: {row.label}.against: it is a baseline itself, so it is compared with no row")
    trained = [row.label for row in table.rows if row.weights_of is None]
    for row in table.rows:
        if row.weights_of is not None and row.weights_of not in trained:
            near = nearest(row.weights_of, trained)
            raise ConfigError(f"{path}: {row.label}.weights_of: no row {row.weights_of!r} is trained: {near}")
