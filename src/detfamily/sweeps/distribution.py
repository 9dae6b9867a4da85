"""What the values of a swept setting may be: one class for each word that a sweep's file knows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from detfamily.errors import nearest

Value = str | int | float | bool | None
"""Of a setting, as an override gives it."""

Point = dict[str, Value]
"""The values of one trial, by the keys of their settings."""


class Distribution(ABC):
    """What the values of one setting may be.

    Attributes:
        word: as a sweep's file calls it.
    """

    word: ClassVar[str]

    @property
    @abstractmethod
    def ends(self) -> tuple[Value, ...]:
        """The values that are tried in the check before any work: the ends of a range, all choices."""

    @property
    def every(self) -> tuple[Value, ...] | None:
        """All values; None where there are too many to name."""
        return None

    @abstractmethod
    def draw(self, random: Random) -> Value:
        """A value at random."""

    @abstractmethod
    def suggest(self, trial: Any, key: str) -> Value:
        """The value that an Optuna trial proposes."""

    @abstractmethod
    def for_wandb(self) -> dict[str, Any]:
        """As the file of a W&B sweep says it."""

    @property
    def is_logarithmic(self) -> bool:
        """Whether it is drawn, and so is to be plotted, on a logarithmic scale."""
        return False


@dataclass(frozen=True)
class Uniform(Distribution):
    """Any number between two."""

    low: float
    high: float
    word: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"expected two numbers, the lower one first, not [{self.low:g}, {self.high:g}]")

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.low, self.high

    def draw(self, random: Random) -> Value:
        return random.uniform(self.low, self.high)

    def suggest(self, trial: Any, key: str) -> Value:
        return float(trial.suggest_float(key, self.low, self.high))

    def for_wandb(self) -> dict[str, Any]:
        return {"distribution": "uniform", "min": self.low, "max": self.high}


@dataclass(frozen=True)
class LogUniform(Uniform):
    """Any number between two, each factor as likely as any other."""

    word: ClassVar[str] = "log_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise ValueError(f"expected numbers above 0, not {self.low:g}; uniform takes any")

    def draw(self, random: Random) -> Value:
        return math.exp(random.uniform(math.log(self.low), math.log(self.high)))

    def suggest(self, trial: Any, key: str) -> Value:
        return float(trial.suggest_float(key, self.low, self.high, log=True))

    def for_wandb(self) -> dict[str, Any]:
        return {"distribution": "log_uniform_values", "min": self.low, "max": self.high}

    @property
    def is_logarithmic(self) -> bool:
        return True


@dataclass(frozen=True)
class Integer(Distribution):
    """Any whole number from one to another, both included."""

    low: int
    high: int
    word: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"expected two whole numbers, the lower one first, not [{self.low}, {self.high}]")

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.low, self.high

    @property
    def every(self) -> tuple[Value, ...] | None:
        return tuple(range(self.low, self.high + 1))

    def draw(self, random: Random) -> Value:
        return random.randint(self.low, self.high)

    def suggest(self, trial: Any, key: str) -> Value:
        return int(trial.suggest_int(key, self.low, self.high))

    def for_wandb(self) -> dict[str, Any]:
        return {"distribution": "int_uniform", "min": self.low, "max": self.high}


@dataclass(frozen=True)
class Choice(Distribution):
    """One of some values: of a group's choices, or of a field's values."""

    values: tuple[Value, ...]
    word: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        if not self.values or len({override_text(one) for one in self.values}) < len(self.values):
            raise ValueError(f"expected different values, at least one, not [{', '.join(map(str, self.values))}]")

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.values

    @property
    def every(self) -> tuple[Value, ...] | None:
        return self.values

    def draw(self, random: Random) -> Value:
        return random.choice(self.values)

    def suggest(self, trial: Any, key: str) -> Value:
        found: Value = trial.suggest_categorical(key, self.values)
        return found

    def for_wandb(self) -> dict[str, Any]:
        return {"values": list(self.values)}


KINDS: dict[str, type[Distribution]] = {one.word: one for one in (LogUniform, Uniform, Integer, Choice)}


def read_distribution(given: Any) -> Distribution:
    """Read what a sweep's file says of a setting, such as ``{log_uniform: [1.0e-4, 1.0e-2]}``.

    Raises:
        ValueError: with what was expected.
    """
    if not isinstance(given, dict) or len(given) != 1:
        raise ValueError(f"expected one of {{{': [...]}, {'.join(KINDS)}: [...]}}, not {given!r}")
    ((word, values),) = given.items()
    if word not in KINDS:
        raise ValueError(f"there is no distribution {word!r}: {nearest(str(word), KINDS)}")
    if not isinstance(values, list):
        raise ValueError(f"{word}: expected a list, not {values!r}")
    if word == Choice.word:
        if wrong := [one for one in values if not isinstance(one, Value)]:
            raise ValueError(f"choice: expected texts, numbers, true, false or null; write {wrong[0]!r} in quotes")
        return Choice(tuple(values))
    numbers: list[Any] = [_whole(one) if word == Integer.word else _number(one) for one in values]
    if len(numbers) != 2:
        raise ValueError(f"{word}: expected the lowest and the highest value, not {len(numbers)} values")
    made: Callable[..., Distribution] = KINDS[word]
    return made(*numbers)


def _number(given: Any) -> float:
    """YAML takes 1e-4 (without a point) for a text; here it is a number."""
    try:
        if not isinstance(given, bool):
            return float(given)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"expected a number, not {given!r}")


def _whole(given: Any) -> int:
    if type(given) is int:
        return given
    raise ValueError(f"expected a whole number, not {given!r}")


def override_text(value: Value) -> str:
    """A value as the right side of an override.

    >>> [override_text(one) for one in (None, True, 1e-05, "refine", "[neighborhood,dense]")]
    ['null', 'true', '1e-05', 'refine', '[neighborhood,dense]']
    """
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def override_words(point: Point) -> tuple[str, ...]:
    """The overrides of a trial."""
    return tuple(f"{key}={override_text(value)}" for key, value in point.items())


def short(value: Value) -> str:
    """A value for people: four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else override_text(value)
