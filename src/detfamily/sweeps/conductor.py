"""The loop of a sweep: trials as processes of their own, watched epoch by epoch, given up where that is wished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from detfamily.engine.interrupt import Interruption
from detfamily.experiments.hold import Hold
from detfamily.experiments.launchers.local import LocalLauncher, LocalOptions
from detfamily.experiments.notes import note
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED
from detfamily.experiments.runner import LAUNCH, PATIENCE, POLL, UnderWay, start
from detfamily.sweeps.distribution import Point, short
from detfamily.sweeps.proposals import Proposal, Proposals
from detfamily.sweeps.sweep import Sweep
from detfamily.sweeps.trial import PRUNED, TrialRun, measured

MOST_FAILURES = 3
"""In a row, after which no further trial is started: then it is not the values that are wrong."""


class Running:
    """A trial under way.

    Args:
        proposal: its number and values.
        training: its training.
    """

    def __init__(self, proposal: Proposal, training: UnderWay) -> None:
        self.number, self.training, self.run = proposal.number, training, training.run
        self.last = 0  # epoch that was reported
        self.gives_up_at: float | None = None

    @property
    def given_up(self) -> bool:
        return self.gives_up_at is not None

    def give_up(self) -> None:
        """Ask the training to leave; it saves first, which is no loss where the answer was wrong."""
        self.gives_up_at = time.monotonic() + PATIENCE
        self.training.job.stop()

    def insist(self) -> None:
        """Kill a training that was asked to leave and does not."""
        if self.gives_up_at is not None and time.monotonic() > self.gives_up_at:
            self.training.job.kill()


class Conductor:
    """Trains what is proposed.

    Args:
        sweep: the file.
        proposals: chooses the values.
        make: the run of a trial.
        jobs: how many at once.
        say: prints a line.
        changed: called after each trial that ended.
        launch: how detfamily is called.
    """

    def __init__(
        self,
        sweep: Sweep,
        proposals: Proposals,
        make: Callable[[Proposal], TrialRun],
        jobs: int,
        say: Callable[[str], None],
        changed: Callable[[], None] = lambda: None,
        launch: Sequence[str] = LAUNCH,
    ) -> None:
        self.sweep, self.proposals, self.make, self.jobs = sweep, proposals, make, jobs
        self.say, self.changed, self.launch = say, changed, launch
        self.launcher = LocalLauncher(LocalOptions(), jobs)
        self.running: list[Running] = []
        self.problems: dict[str, str] = {}
        self._begun: set[int] = set()
        self._failures = 0

    def go(self) -> dict[str, str]:
        """Train until no more is proposed.

        Returns:
            name of each trial that failed or could not be started -> what went wrong.

        Raises:
            SystemExit: after Ctrl-C or SIGTERM, when the trainings under way have been saved.
        """
        with Interruption() as interruption:
            try:
                while not interruption.wanted:
                    while len(self.running) < self.jobs and (proposal := self._next()) is not None:
                        self._start(proposal)
                    if not self.running:
                        break
                    self._look()
                    time.sleep(POLL)
                if interruption.wanted:
                    self._stop(interruption.exit_code)
            finally:
                for one in self.running:  # a second Ctrl-C, or an error of ours
                    one.training.job.kill()
        return self.problems

    def _next(self) -> Proposal | None:
        if self._failures >= MOST_FAILURES:
            return None
        proposal = self.proposals.next()
        if proposal is None or proposal.number in self._begun:  # cut off in this call, by somebody else
            return None
        self._begun.add(proposal.number)
        return proposal

    def _start(self, proposal: Proposal) -> None:
        run = self.make(proposal)
        run.folder.mkdir(parents=True, exist_ok=True)
        hold = Hold.take(run.folder)
        if hold is None:
            self._end(proposal.number, run.name, CUT_OFF, None, f"another process is at it, in {run.folder}")
            return
        training = start(run, self.launcher, self.launch, hold)
        self.running.append(Running(proposal, training))
        self.say(f"{run.name} {training.started}: {words_of(proposal.point)}")

    def _look(self) -> None:
        for one in list(self.running):
            has_ended = one.training.job.poll()
            for line in one.training.new_epochs():
                self.say(f"  {one.run.name}: {line}")
            if not one.given_up:
                self._report(one, has_ended)
            one.insist()
            if has_ended:
                self.running.remove(one)
                self._close(one)

    def _report(self, one: Running, has_ended: bool) -> None:
        values = measured(one.run.folder, self.sweep.metric)
        epochs = int(one.run.variant.config["schedule"]["epochs"])
        for epoch in sorted(epoch for epoch in values if epoch > one.last):
            one.last = epoch
            worse = self.proposals.report(one.number, epoch, values[epoch])
            if worse and epoch < epochs and not has_ended:
                self.say(f"  {one.run.name}: given up after epoch {epoch}")
                one.give_up()
                return

    def _close(self, one: Running) -> None:
        """Settle how a trial ended. One that was finished before it could be given up counts as finished."""
        error = one.training.job.close().error
        values = measured(one.run.folder, self.sweep.metric)
        value = values[max(values)] if values else None
        if error is None and value is None:
            error = f"there is no {self.sweep.metric} in its metrics.jsonl"
            note(one.run.folder, status=FAILED, error=error)
        if error is None:
            state = FINISHED
        elif one.given_up:
            state, error = PRUNED, None
            note(one.run.folder, status=PRUNED, error=None)
        else:
            state = CUT_OFF if one.run.status() == CUT_OFF else FAILED
        shown = f", {self.sweep.label} {self.sweep.shown(value)}" if state in (FINISHED, PRUNED) else ""
        self.say(f"  {one.run.name}: {state}{shown}")
        self._end(one.number, one.run.name, state, value, error)

    def _end(self, number: int, name: str, state: str, value: float | None, error: str | None) -> None:
        self.proposals.ended(number, state, value)
        self._failures = self._failures + 1 if state == FAILED else 0
        if error is not None:
            self.problems[name] = error
            self.say(f"  {name}: {error.splitlines()[0]}")
        if self._failures == MOST_FAILURES:
            self.say(f"{MOST_FAILURES} trials in a row have failed: no further one is started")
        self.changed()

    def _stop(self, exit_code: int) -> None:
        """Ask each training to save and leave; what they reached stays open, to be gone on with."""
        self.say(f"stopping: {len(self.running)} trials finish their step and save (once more: at once)")
        for one in self.running:
            one.training.job.stop()
        until = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < until:
            self._look()
            time.sleep(POLL)
        self.say("the same command goes on from here")
        raise SystemExit(exit_code)


def words_of(point: Point) -> str:
    """The values of a trial in words."""
    return ", ".join(f"{key} {short(value)}" for key, value in point.items())
