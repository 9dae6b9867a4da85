"""The files of ``experiments/sweeps``: a recipe, the settings that vary, and the number that trials are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detfamily.config import groups_for
from detfamily.errors import ConfigError, nearest
from detfamily.experiments.scale import scales
from detfamily.experiments.task import TASKS, Task
from detfamily.sweeps.distribution import Distribution, read_distribution

DIRECTIONS = ("maximize", "minimize")
WANDB_METHODS = ("random", "grid")
LOSS = "loss"

_KEYS: dict[str, Any] = {
    "title": None,
    "base": None,
    "scale": None,
    "parameters": None,
    "task": "detection",
    "overrides": [],
    "metric": None,
    "direction": None,
    "trials": 20,
    "seed": 0,
    "random_trials": 10,
    "pruner": {},
    "wandb_method": "random",
}
"""What a file may say, and what holds where it does not; the first four it must."""
_REQUIRED = tuple(_KEYS)[:4]
_OWN = ("experiment", "resume", "output_dir", "tracking")
"""What each trial has of its own, or is no matter of a comparison."""


@dataclass(frozen=True)
class Pruner:
    """When a trial is given up: its metric after an epoch is worse than the median of the others after that epoch.

    Attributes:
        warmup_trials: this many must have finished before any is given up.
        warmup_epochs: after which a trial may be given up at the earliest.
    """

    warmup_trials: int = 5
    warmup_epochs: int = 1


@dataclass(frozen=True)
class Sweep:
    """What is varied, and how it is judged.

    Attributes:
        path: the file.
        title: what it is about.
        base: a choice of configs/experiment.
        scale: a choice of configs/scale.
        parameters: key of an override -> its values.
        task: what is trained.
        overrides: of every trial, below the parameters.
        metric: a column of ``metrics.jsonl``.
        direction: ``maximize`` or ``minimize``.
        trials: how many there are to be.
        seed: of what is drawn; that of the trainings is an override.
        random_trials: Optuna's first ones, which are drawn at random.
        pruner: None: every trial is trained to its end.
        wandb_method: how W&B draws, ``random`` or ``grid``.
    """

    path: Path
    title: str
    base: str
    scale: str
    parameters: Mapping[str, Distribution]
    task: Task
    overrides: tuple[str, ...]
    metric: str
    direction: str
    trials: int
    seed: int
    random_trials: int
    pruner: Pruner | None
    wandb_method: str

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def maximizes(self) -> bool:
        return self.direction == DIRECTIONS[0]

    @property
    def label(self) -> str:
        """The metric for people."""
        return self.task.label if self.metric == self.task.metric else self.metric

    def shown(self, value: float | None) -> str:
        """A value of the metric for people: shares in per cent, as everywhere."""
        if value is None:
            return ""
        return f"{value:.3f}" if self.metric == LOSS else f"{100 * value:.1f}"


def read_sweep(path: str | Path) -> Sweep:
    """Read the file of a sweep.

    Raises:
        ConfigError: there is no such file, it is not YAML, or a key is missing, unknown or not what it should be; with
            the file and the key.
    """
    path = Path(path).expanduser()
    content = _load(path)
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}: {nearest(str(key), _KEYS)}")
    for key in _REQUIRED:
        if key not in content:
            raise ConfigError(f"{path}: {key} is missing; a sweep needs {', '.join(_REQUIRED)}")
    given = {**_KEYS, **content}
    task = TASKS[_one_of(path, "task", given["task"], TASKS)]
    metric = _one_of(path, "metric", given["metric"] or task.metric, (*task.metrics, LOSS))
    usual = DIRECTIONS[metric == LOSS]
    return Sweep(
        path=path,
        title=_text(path, "title", given["title"]),
        base=_one_of(path, "base", given["base"], groups_for(task.command)["experiment"]),
        scale=_one_of(path, "scale", given["scale"], scales(task)),
        parameters=_parameters(path, given["parameters"]),
        task=task,
        overrides=_overrides(path, given["overrides"]),
        metric=metric,
        direction=_one_of(path, "direction", given["direction"] or usual, DIRECTIONS),
        trials=_number(path, "trials", given["trials"], 1),
        seed=_number(path, "seed", given["seed"], 0),
        random_trials=_number(path, "random_trials", given["random_trials"], 1),
        pruner=_pruner(path, given["pruner"]),
        wandb_method=_one_of(path, "wandb_method", given["wandb_method"], WANDB_METHODS),
    )


def check_free(word: str, where: str, parameters: Mapping[str, Distribution]) -> None:
    """Refuse an override of all trials that a trial has of its own.

    Raises:
        ConfigError: with where it stands.
    """
    key = word.partition("=")[0].lstrip("+~")
    if key in _OWN[:3]:
        instead = "base: in the sweep's file names the recipe" if key == "experiment" else "each trial has its own"
        raise ConfigError(f"{where}: {word!r}: {instead}")
    if key in parameters:
        raise ConfigError(f"{where}: {word!r}: {key} is one of the sweep's parameters: take it out of one of the two")


def _load(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        found = [*path.parent.glob("*.yaml"), *Path("experiments/sweeps").glob("*.yaml")]
        near = nearest(str(path), map(str, found)) if found else "a sweep is a YAML file, see docs/sweeps.md"
        raise ConfigError(f"there is no sweep {path}: {near}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping with {', '.join(_REQUIRED)}")
    return content


def _parameters(path: Path, given: Any) -> dict[str, Distribution]:
    if not isinstance(given, dict) or not given:
        raise ConfigError(
            f"{path}: parameters: expected a mapping such as optimizer.lr: {{log_uniform: [1.0e-4, 0.1]}}"
        )
    found = {}
    for key, one in given.items():
        if not isinstance(key, str) or "=" in key:
            raise ConfigError(f"{path}: parameters: {key!r} is not the key of an override, such as optimizer.lr")
        if key.partition(".")[0].lstrip("+~") in _OWN:
            raise ConfigError(f"{path}: parameters: {key} cannot be swept: each trial has its own")
        try:
            found[key] = read_distribution(one)
        except ValueError as error:
            raise ConfigError(f"{path}: parameters: {key}: {error}") from None
    return found


def _overrides(path: Path, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ConfigError(f"{path}: overrides: expected a list such as [schedule.epochs=2], not {given!r}")
    return tuple(given)


def _pruner(path: Path, given: Any) -> Pruner | None:
    if given is None:
        return None
    known = vars(Pruner())
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: pruner: expected null or a mapping with {', '.join(known)}, not {given!r}")
    for key in given:
        if key not in known:
            raise ConfigError(f"{path}: pruner: unknown key {key!r}: {nearest(str(key), known)}")
    return Pruner(**{key: _number(path, f"pruner.{key}", value, 0) for key, value in given.items()})


def _text(path: Path, key: str, given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise ConfigError(f"{path}: {key}: expected a text, not {given!r}")
    return given.strip()


def _one_of(path: Path, key: str, given: Any, known: Any) -> str:
    if given not in known:
        raise ConfigError(f"{path}: {key}: there is no {given!r}: {nearest(str(given), known)}")
    return str(given)


def _number(path: Path, key: str, given: Any, least: int) -> int:
    if type(given) is not int or given < least:
        raise ConfigError(f"{path}: {key}: expected a whole number of at least {least}, not {given!r}")
    return given
