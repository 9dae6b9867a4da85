"""How long to train and with which learning rate: a multiplier per optimiser step, as a pure function of the step.

Being pure, a schedule has no state to save: the position is the step, and a resumed run that changes its length gets
exactly the multipliers of the new length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from detfamily.errors import ConfigError, require_at_least


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every schedule has.

    Attributes:
        epochs: how often to evaluate and save; the length of the run in epochs.
        total_batch_size: images of one optimiser step, over all processes and accumulated micro-batches.
        images_per_epoch: an epoch is this many images of the endless stream; None: the data set once.
        warmup_steps: optimiser steps in which the multiplier rises linearly from 1 / warmup_steps to 1.

    Raises:
        ConfigError: a value that makes no schedule.
    """

    epochs: int
    total_batch_size: int
    images_per_epoch: int | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "total_batch_size"):
            require_at_least(1, f"schedule.{name}", getattr(self, name))
        if self.images_per_epoch is not None:
            key, why = "schedule.images_per_epoch", "one step needs that many"
            require_at_least(self.total_batch_size, key, self.images_per_epoch, why)
        if self.warmup_steps is not None:
            require_at_least(0, "schedule.warmup_steps", self.warmup_steps)

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The multiplier of the base learning rate at an optimiser step.

        Args:
            step: 0 for the first optimiser step of the run.
            steps_per_epoch: optimiser steps of an epoch.
            total_steps: optimiser steps of the run.
        """
        raise NotImplementedError

    def warmup_length(self, total_steps: int) -> int:
        """Optimiser steps of the warm-up."""
        return self.warmup_steps or 0

    def describe(self, total_steps: int) -> str:
        """A few words for the recipe."""
        raise NotImplementedError

    def _warmup(self, step: int, total_steps: int) -> float:
        length = self.warmup_length(total_steps)
        return (step + 1) / length if step < length else 1.0


@dataclass(frozen=True, kw_only=True)
class StepSchedule(Schedule):
    """Multiply the learning rate by ``drop_factor`` at the start of each epoch in ``drop_epochs``.

    The schedule of DETR and its line: 0.1 once, for the last fifth or third of the run.

    Attributes:
        drop_epochs: epochs already done when the learning rate drops; 40 of 50 leaves ten epochs at the lower one.
        drop_factor: what each drop multiplies with.
    """

    drop_epochs: Sequence[int] = ()
    drop_factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for drop in self.drop_epochs:
            if not 0 < drop < self.epochs:
                last = self.epochs - 1
                after = min(last, max(1, round(0.8 * self.epochs)))
                fifths = f"[{after}] drops after four fifths as most papers do, " if last else ""
                raise ConfigError(
                    f"schedule.drop_epochs has {drop}, but the run has {self.epochs} epochs: that drop would never "
                    f"take effect; schedule.drop_epochs={fifths}[] never"
                )
        if not 0 < self.drop_factor <= 1:
            raise ConfigError(f"schedule.drop_factor is {self.drop_factor}; expected more than 0 and at most 1")

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        drops = sum(step >= drop * steps_per_epoch for drop in self.drop_epochs)
        return self._warmup(step, total_steps) * self.drop_factor**drops

    def describe(self, total_steps: int) -> str:
        drops = ", ".join(str(drop) for drop in sorted(self.drop_epochs))
        words = f"x {self.drop_factor:g} after epoch {drops}" if drops else "constant"
        return words + _warmup_words(self.warmup_length(total_steps))


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """Half a cosine from 1 after the warm-up down to ``final_factor`` at the end of the run.

    Attributes:
        warmup_fraction: the warm-up as a share of all steps, instead of ``warmup_steps``.
        final_factor: the multiplier that the curve ends at.
    """

    warmup_fraction: float | None = None
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_fraction={self.warmup_fraction} "
                "both say how long the warm-up is; set one of them to null"
            )
        for name in ("warmup_fraction", "final_factor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"schedule.{name} is {value}; expected at least 0 and less than 1")

    def warmup_length(self, total_steps: int) -> int:
        if self.warmup_fraction is not None:
            return round(self.warmup_fraction * total_steps)
        return super().warmup_length(total_steps)

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        start = self.warmup_length(total_steps)
        if step < start:
            return self._warmup(step, total_steps)
        progress = min(1.0, (step - start) / max(1, total_steps - start))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    def describe(self, total_steps: int) -> str:
        return f"cosine to x {self.final_factor:g}" + _warmup_words(self.warmup_length(total_steps))


def _warmup_words(length: int) -> str:
    return f" after {length} steps of warm-up" if length else ""
