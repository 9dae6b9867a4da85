"""Means of losses that are summed up on the device and looked at now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detfamily.engine.distributed import World

Sums = dict[str, list[float]]
"""Name -> [sum, number of steps in it]."""

Window = list[tuple[list[str], Tensor]]
"""Names -> (2, names) sums and numbers of steps, on the host."""


class LossMeter:
    """Means over optimiser steps and processes: since the last look, and over the epoch.

    A step's micro-batches are added up, as their losses are divided by what the whole step holds. Values that are not
    finite are left out of the means.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._step: dict[tuple[str, ...], Tensor] = {}
        self._window: dict[tuple[str, ...], Tensor] = {}
        self._epoch: Sums = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars of a micro-batch to the present step."""
        if values:
            names = tuple(values)
            row = torch.stack([value.detach().float() for value in values.values()])
            self._step[names] = self._step[names] + row if names in self._step else row

    def step_done(self) -> None:
        """The present step is complete."""
        for names, row in self._step.items():
            finite = row.isfinite()
            counted = torch.stack([torch.where(finite, row, 0.0), finite.float()])
            before = self._window.get(names)  # on the host where it comes from a checkpoint
            self._window[names] = counted if before is None else before.to(counted.device) + counted
        self._step = {}

    def read(self) -> dict[str, float]:
        """The means since the last look. This waits for the device, and is a call of all processes."""
        mine: Sums = {}
        if self._window:
            columns = torch.cat(list(self._window.values()), dim=1).T.tolist()
            for name, pair in zip((name for names in self._window for name in names), columns, strict=True):
                _add(mine, {name: pair})
        self._window = {}
        everyone: Sums = {}
        # As objects, since a process that had to leave a loss out may have other names than the rest.
        for share in self.world.gather_objects(mine):
            _add(everyone, share)
        everyone = self.world.from_main(everyone)
        _add(self._epoch, everyone)
        return _means(everyone)

    def epoch(self) -> dict[str, float]:
        """The means over all that was looked at since the last ``reset``."""
        return _means(self._epoch)

    def reset(self) -> None:
        """An epoch is over."""
        self._epoch = {}

    def state_dict(self) -> dict[str, Any]:
        """The epoch's sums up to the last look; the same in all processes."""
        return {name: list(pair) for name, pair in self._epoch.items()}

    def window(self) -> Window:
        """What this process has summed up since the last look; waits for the device."""
        return [(list(names), sums.cpu()) for names, sums in self._window.items()]

    def load_state_dict(self, state: Mapping[str, Any], windows: Sequence[Window] = ()) -> None:
        """Go on from ``state_dict`` and the ``window`` of every process, however many they were."""
        self._epoch = {name: list(pair) for name, pair in state.items()}
        same = len(windows) == self.world.size
        mine = [windows[self.world.rank]] if same else list(windows) if self.world.is_main else []
        self._window = {}
        for names, sums in (pair for window in mine for pair in window):
            key = tuple(names)
            self._window[key] = self._window[key] + sums if key in self._window else sums


def _add(sums: Sums, more: Sums) -> None:
    for name, (total, count) in more.items():
        pair = sums.setdefault(name, [0.0, 0.0])
        pair[0] += total
        pair[1] += count


def _means(sums: Sums) -> dict[str, float]:
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}
