"""What was typed after ``detfamily sweep``, and the check that all of it composes, before any work."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detfamily.config import compose, to_container, validate
from detfamily.errors import ConfigError, nearest
from detfamily.experiments.results import slug
from detfamily.experiments.scale import Variant, identity, variants
from detfamily.experiments.table import Row, Table
from detfamily.experiments.words import positive, read_words
from detfamily.sweeps.distribution import Point, override_words
from detfamily.sweeps.sweep import Sweep, check_free, read_sweep
from detfamily.sweeps.trial import label

OPTUNA, WANDB, GRID = METHODS = ("optuna", "wandb", "grid")
USAGE = "detfamily sweep SWEEP.yaml [method=optuna|wandb|grid] [trials=N] [jobs=1] [output_dir=FOLDER] [overrides]"
HOME = Path("runs") / "sweep"
_WORDS = ("method", "trials", "jobs", "output_dir")


@dataclass(frozen=True)
class Request:
    """What was typed.

    Attributes:
        sweep: the file.
        method: of choosing the values, one of ``METHODS``.
        trials: how many there are to be; None: as many as a grid has, else as the file says.
        jobs: trials at once.
        folder: of the sweep.
        further: overrides of every trial.
    """

    sweep: Sweep
    method: str
    trials: int | None
    jobs: int
    folder: Path
    further: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return self.sweep.trials if self.trials is None else self.trials


def read_request(words: Sequence[str]) -> Request:
    """Understand the words after ``detfamily sweep``.

    Raises:
        ConfigError: with what was expected.
    """
    typed = read_words(words, _WORDS)
    file, own, further = typed.one_file("the file of one sweep", USAGE), typed.settings, typed.overrides
    method = own.get("method", OPTUNA)
    if method not in METHODS:
        raise ConfigError(f"method={method}: {nearest(method, METHODS)}\nusage: {USAGE}")
    sweep = read_sweep(file)
    for word, where in (*((one, str(sweep.path)) for one in sweep.overrides), *((one, "typed") for one in further)):
        check_free(word, where, sweep.parameters)
    trials = positive("trials", own["trials"]) if "trials" in own else None
    name = slug(sweep.name) if method == OPTUNA else f"{slug(sweep.name)}-{method}"
    folder = Path(own["output_dir"]).expanduser() if own.get("output_dir") else HOME / name
    return Request(sweep, method, trials, positive("jobs", own.get("jobs", "1")), folder, further)


class Recipe:
    """The training that the trials of a sweep share.

    Args:
        sweep: the file.
        further: overrides of every trial, on top of the file's.

    Raises:
        ConfigError: they do not compose.
    """

    def __init__(self, sweep: Sweep, further: Sequence[str] = ()) -> None:
        row = Row("without parameters", ())
        table = Table(sweep.path, sweep.title, "", "", sweep.base, row.label, (row,), sweep.task)
        given = (*sweep.overrides, *further)
        self.sweep = sweep
        self.base = variants(table, sweep.scale, given)[row.label]

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides of every trial, below its parameters."""
        return self.base.overrides

    def with_words(self, *words: str) -> Recipe:
        """The same with further overrides, which make no difference to what is trained."""
        other = copy.copy(self)
        other.base = replace(self.base, overrides=(*self.words, *words))
        return other

    @property
    def identity(self) -> str:
        """A hash of what makes trials comparable: what they share, what is varied, what they are judged by."""
        sweep = self.sweep
        content = [self.base.identity, {key: repr(one) for key, one in sweep.parameters.items()}]
        text = json.dumps([*content, sweep.metric, sweep.direction, sweep.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def variant(self, number: int, point: Point) -> Variant:
        """A trial as ``detfamily train`` gets it.

        Raises:
            ConfigError: it does not compose.
        """
        words = (*self.words, *override_words(point))
        cfg = compose(self.sweep.task.command, words)
        validate(cfg)
        row = replace(self.base.row, label=label(number))
        return Variant(row, words, to_container(cfg), identity(cfg), task=self.sweep.task)

    def check(self) -> None:
        """Compose the ends of each range and each choice, the other settings at their first value.

        Raises:
            ConfigError: names the file, the setting and the value that do not go.
        """
        first = {key: one.ends[0] for key, one in self.sweep.parameters.items()}
        seen = set()
        for key, one in self.sweep.parameters.items():
            for value in one.ends:
                point = {**first, key: value}
                if (words := override_words(point)) in seen:
                    continue
                seen.add(words)
                try:
                    self.variant(0, point)
                except ConfigError as error:
                    raise ConfigError(f"{self.sweep.path}: parameters: {key} = {value}: {error}") from error
