"""Trials that are known beforehand: a grid, or values drawn at random. Their folders say what is done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from random import Random

from detfamily.errors import ConfigError
from detfamily.experiments.results import FAILED, FINISHED
from detfamily.sweeps.distribution import Point
from detfamily.sweeps.proposals import Known, Proposal
from detfamily.sweeps.sweep import Sweep


def grid(sweep: Sweep) -> list[Point]:
    """All combinations, the last parameter changing first.

    Raises:
        ConfigError: a parameter has too many values to be named.
    """
    values = []
    for key, one in sweep.parameters.items():
        if one.every is None:
            raise ConfigError(
                f"{sweep.path}: parameters: {key}: a grid needs values that can be counted, and {one.word} has none: "
                "write choice: [...] or int: [...], or take method=optuna"
            )
        values.append(one.every)
    return [dict(zip(sweep.parameters, one, strict=True)) for one in itertools.product(*values)]


def at_random(sweep: Sweep, count: int) -> list[Point]:
    """So many points; those of a smaller count are the first of a larger one."""
    generators = (Random(f"{sweep.seed} {number}") for number in range(count))
    return [{key: one.draw(random) for key, one in sweep.parameters.items()} for random in generators]


class Drawn:
    """Goes through given points, as far as they are not done.

    Args:
        points: the values of all trials, by their numbers.
        status: says how the run of a trial stands; None where it was never started.
    """

    def __init__(self, points: Sequence[Point], status: Callable[[Proposal], str | None]) -> None:
        self.points = [Proposal(number, point) for number, point in enumerate(points)]
        self.status = status
        self._waiting = [one for one in self.points if status(one) != FINISHED]
        self._failed: set[int] = set()

    def next(self) -> Proposal | None:
        return self._waiting.pop(0) if self._waiting else None

    def report(self, number: int, epoch: int, value: float) -> bool:
        return False

    def ended(self, number: int, state: str, value: float | None) -> None:
        # The folder of a trial without a value says that its training finished.
        self._failed |= {number} if state == FAILED else set()

    def known(self) -> list[Known]:
        return list(self._known())

    def _known(self) -> Iterable[Known]:
        for one in self.points:
            state = FAILED if one.number in self._failed else self.status(one)
            if state is not None:
                yield Known(one.number, one.point, state)
