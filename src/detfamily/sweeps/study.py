"""Trials that Optuna proposes, from what those before reached; its study lies in a file, so that it can go on."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from random import Random
from typing import Any

from detfamily.errors import ConfigError
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED
from detfamily.sweeps.proposals import Known, Proposal
from detfamily.sweeps.sweep import Sweep
from detfamily.sweeps.trial import PRUNED

STUDY = "study.db"


class Study:
    """An Optuna study in ``study.db``.

    What is proposed depends on the sweep's seed and the trials before, not on how often the sweep was cut off.

    Args:
        sweep: the file.
        folder: of the sweep; it exists.
        count: how many trials there are to be. Those that failed do not count.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, sweep: Sweep, folder: Path, count: int) -> None:
        self.optuna = import_optuna()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.sweep, self.count = sweep, count
        self.study = self.optuna.create_study(
            storage=f"sqlite:///{(folder / STUDY).resolve()}",
            study_name=sweep.name,
            direction=sweep.direction,
            pruner=self._pruner(),
            load_if_exists=True,
        )
        states = self.optuna.trial.TrialState
        self._states = {
            states.COMPLETE: FINISHED,
            states.PRUNED: PRUNED,
            states.FAIL: FAILED,
            states.RUNNING: CUT_OFF,
            states.WAITING: CUT_OFF,
        }
        self._cut_off = [one for one in self.study.trials if one.state == states.RUNNING]
        self._under_way: dict[int, Any] = {}
        self._reported: dict[int, set[int]] = {}

    def next(self) -> Proposal | None:
        done = sum(self._states[one.state] in (FINISHED, PRUNED) for one in self.study.trials)
        if done + len(self._under_way) >= self.count:
            return None
        if self._cut_off:
            frozen = self._cut_off.pop(0)
            trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
            self._reported[trial.number] = set(frozen.intermediate_values)
        else:
            self.study.sampler = self._sampler(len(self.study.trials))
            trial = self.study.ask()
            self._reported[trial.number] = set()
        self._under_way[trial.number] = trial
        return Proposal(trial.number, {key: one.suggest(trial, key) for key, one in self.sweep.parameters.items()})

    def report(self, number: int, epoch: int, value: float) -> bool:
        trial = self._under_way[number]
        if epoch not in self._reported[number]:
            self._reported[number].add(epoch)
            trial.report(value, epoch)
        return bool(trial.should_prune())

    def ended(self, number: int, state: str, value: float | None) -> None:
        trial = self._under_way.pop(number)
        if state == CUT_OFF:  # stays open in the study, so that a later call goes on with it
            return
        states = {kept: theirs for theirs, kept in self._states.items()}
        self.study.tell(trial, value if state == FINISHED else None, state=states[state])

    def known(self) -> list[Known]:
        return [Known(one.number, dict(one.params), self._states[one.state]) for one in self.study.trials]

    def _sampler(self, number: int) -> Any:
        """A sampler of its own for each trial, as one that goes on after a restart would begin its numbers again."""
        with warnings.catch_warnings(action="ignore"):  # in Optuna 4, that its defaults of Optuna 5 are new
            return self.optuna.samplers.TPESampler(
                seed=Random(f"{self.sweep.seed} {number}").getrandbits(32),
                n_startup_trials=self.sweep.random_trials,
                multivariate=True,
                constant_liar=True,  # trials under way count as bad ones, so that jobs=4 tries four different points
            )

    def _pruner(self) -> Any:
        if self.sweep.pruner is None:
            return self.optuna.pruners.NopPruner()
        warmup = self.sweep.pruner
        return self.optuna.pruners.MedianPruner(
            n_startup_trials=warmup.warmup_trials, n_warmup_steps=warmup.warmup_epochs
        )


def import_optuna() -> Any:
    """The package, which is not needed for anything else.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ConfigError(
            f"method=optuna needs Optuna, which cannot be imported ({error}): pip install 'detfamily[sweeps]', or take "
            "method=grid or method=wandb"
        ) from None
