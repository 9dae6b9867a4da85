"""The one interface between the loop that trains and whatever chooses the values of the trials."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from detfamily.sweeps.distribution import Point


class Proposal(NamedTuple):
    """A trial that is to be trained: its number, from 0, and its values."""

    number: int
    point: Point


class Known(NamedTuple):
    """A trial that has been started, and how it stands."""

    number: int
    point: Point
    state: str


class Proposals(Protocol):
    """Chooses the values of the trials, and learns how each one ended."""

    def next(self) -> Proposal | None:
        """The next trial to train: first those that were cut off; None when there are enough, with those under way."""
        ...

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Learn the metric after an epoch; says whether the trial is to be given up."""
        ...

    def ended(self, number: int, state: str, value: float | None) -> None:
        """Learn how a trial ended: finished (with its value), pruned, failed or cut off."""
        ...

    def known(self) -> list[Known]:
        """All trials that have been started, by this call or an earlier one."""
        ...
