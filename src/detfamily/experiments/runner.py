"""Runs of a table: started in turn, several at once, here or on a cluster, resumed, never two in one folder."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detfamily.engine.interrupt import Interruption
from detfamily.errors import DetfamilyError, LaunchError
from detfamily.experiments.devices import spent_until_now
from detfamily.experiments.hold import Hold, is_held
from detfamily.experiments.launchers.base import Job, Launcher, Order
from detfamily.experiments.launchers.local import LocalLauncher, LocalOptions
from detfamily.experiments.notes import forget_job, note, read_job, read_state, unseen_seconds
from detfamily.experiments.results import CUT_OFF, FAILED, FINISHED, QUEUED, RUNNING, slug
from detfamily.experiments.scale import Variant
from detfamily.experiments.screen import Progress, Screen
from detfamily.experiments.task import DETECTION, TASKS
from detfamily.experiments.version import PACKAGE, Code, code_version
from detfamily.tracking.console import epoch_line
from detfamily.tracking.files import EPOCHS, read_rows
from detfamily.tracking.labels import label_words

LAUNCH = (sys.executable, "-m", "detfamily")
POLL = 0.1  # seconds between two looks at the jobs
PATIENCE = 120  # seconds for a run to finish its step, save and leave, before it is killed


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        table: name of the table.
        scale: name of the scale.
        variant: the row on that scale.
        seed: of the training.
        code: that it is made with.
        root: folder of all runs of the table.
        source: the run whose weights are evaluated; None for a run that trains.
    """

    table: str
    scale: str
    variant: Variant
    seed: int
    code: Code
    root: Path
    source: Run | None = None

    @property
    def name(self) -> str:
        return f"{self.variant.row.label}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """``<row>/seed<seed>-<configuration>-<code>`` below the root."""
        identity = f"seed{self.seed}-{self.variant.identity}-{self.code.identity}"
        return self.root / slug(self.variant.row.label) / identity

    def words(self, threads: int | None = None) -> list[str]:
        """The words of the command line after ``detfamily``."""
        cores = [] if threads is None else [f"runtime.threads={threads}"]
        if self.source is not None:
            checkpoint = [f"checkpoint={self.source.folder / 'last.pt'}"]
            return ["evaluate", *checkpoint, *self.variant.overrides, *cores, f"output_dir={self.folder}"]
        tags = (self.variant.row.label, f"seed {self.seed}", self.scale)
        given = [*cores, *self.variant.overrides, *label_words(self.variant.config, self.table, tags)]
        return [self.variant.task.command, *given, f"seed={self.seed}", f"output_dir={self.folder}", "resume=auto"]

    def state(self) -> dict[str, Any]:
        """What ``run.json`` says; empty where the run was never started."""
        return read_state(self.folder)

    def status(self) -> str | None:
        """How it stands; None where it was never started. A run that nobody runs any more was cut off."""
        status = self.state().get("status")
        if status == FINISHED and not (self.folder / "metrics.json").is_file():
            return CUT_OFF
        if status == RUNNING and not is_held(self.folder):
            return CUT_OFF
        if status == QUEUED and not read_job(self.folder):
            return CUT_OFF
        return status

    def progress(self) -> float:
        """The share of the epochs that is done, 0 to 1."""
        if self.source is not None or not (rows := read_rows(self.folder / EPOCHS)):
            return 0.0
        return float(min(1.0, rows[-1]["epoch"] / self.variant.config["schedule"]["epochs"]))

    def note_start(self) -> None:
        """Write into ``run.json`` what the run is; what it has taken so far stays."""
        source, task, before = self.source, self.variant.task, self.state()
        note(
            self.folder,
            table=self.table,
            scale=self.scale,
            **({} if task is DETECTION else {"task": next(name for name, one in TASKS.items() if one is task)}),
            row=self.variant.row.label,
            seed=self.seed,
            config=self.variant.identity,
            code=self.code.identity,
            commit=self.code.commit,
            overrides=[one for one in self.variant.overrides if not one.startswith("data.root=")],
            memory_gib=before.get("memory_gib"),
            images_seen=_images_seen(source) if source else None,
            **spent_until_now(before, unseen_seconds(self.folder)),
            status=QUEUED,
            error=None,
        )


@dataclass
class UnderWay:
    """A run that a launcher has taken.

    Attributes:
        run: which one.
        job: of the launcher.
        progress: what of it was said.
    """

    run: Run
    job: Job
    progress: Progress

    @property
    def started(self) -> str:
        """Whether it has begun or goes on, in words."""
        return "goes on" if self.progress.shown else "starts"

    def new_epochs(self) -> list[str]:
        """The lines of the epochs that have ended since the last call."""
        epochs = self.run.variant.config["schedule"]["epochs"]
        return [epoch_line(row, int(row["epoch"]), epochs) for row in self.progress.new()]


class Runner:
    """Goes through runs.

    Args:
        runs: in this order; a run that evaluates comes after its source.
        jobs: how many at once.
        say: prints a line.
        ended: called after each run that ended, however it did.
        launch: how detfamily is called.
        code: asked for the present code before each start.
        launcher: starts them; processes of this machine by default.
        screen: shows all runs of the plan; by default lines only.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        jobs: int,
        say: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
        launch: Sequence[str] = LAUNCH,
        code: Callable[[], Code] = code_version,
        launcher: Launcher | None = None,
        screen: Screen | None = None,
    ) -> None:
        self.waiting, self.jobs, self.ended = list(runs), jobs, ended
        self.say, self.screen = screen.say if screen else say, screen
        self.launch, self.code = launch, code
        self.launcher = launcher or LocalLauncher(LocalOptions(), jobs)
        self.total, self.number = len(self.waiting), 0
        self.running: list[UnderWay] = []
        self.problems: dict[str, str] = {}
        self.again: Counter[str] = Counter()
        self.leaving = False

    def go(self) -> dict[str, str]:
        """Run all.

        Returns:
            name of each run that failed or could not be started -> what went wrong; in no case did it stop the others.

        Raises:
            SystemExit: after Ctrl-C or SIGTERM, when the runs under way have been saved, or left to their cluster.
        """
        with Interruption() as interruption:
            try:
                while (self.waiting or self.running) and not interruption.wanted:
                    while len(self.running) < self.jobs and (run := self._next()) is not None:
                        self._start(run)
                        if interruption.wanted:
                            break
                    self._look()
                    time.sleep(POLL)
                if interruption.wanted:
                    self._leave(interruption.exit_code)
            finally:
                if not self.launcher.detached:
                    for one in self.running:  # a second Ctrl-C, or an error of ours
                        one.job.kill()
        return self.problems

    def _next(self) -> Run | None:
        """The next run that can be started; those that cannot be any more are taken out."""
        for run in list(self.waiting):
            if self.again[run.name]:
                if is_held(run.folder):  # its machine is not known to be dead yet, or the cluster has queued it itself
                    continue
                if run.status() == FINISHED:
                    self.waiting.remove(run)
                    self.say(f"  {run.name}: done")
                    continue
            source = run.source
            if source is not None and source.status() != FINISHED:
                if source in self.waiting or any(one.run == source for one in self.running):
                    continue
                self.waiting.remove(run)
                self.problems[run.name] = f"there are no weights: {source.name} has not finished"
                continue
            self.waiting.remove(run)
            return run
        return None

    def _start(self, run: Run) -> None:
        """Start a run, or pick up the job of an earlier call, if nothing speaks against it."""
        self.number += not self.again[run.name]
        where = f"[{self.number}/{self.total}] {run.name}"
        job = self.launcher.attach(run.folder) if run.folder.is_dir() else None
        if job is not None:
            self.running.append(UnderWay(run, job, Progress(run, len(read_rows(run.folder / EPOCHS)))))
            self.say(f"{where}: {job.words} has it, in {run.folder}")
            return
        try:
            self.running.append(self._started(run, where))
        except DetfamilyError as error:
            self.problems[run.name] = str(error)
            self.say(f"{where}: {error}")

    def _started(self, run: Run, where: str) -> UnderWay:
        """Start a run.

        Raises:
            DetfamilyError: it cannot be, or must not be.
        """
        if (now := self.code()).identity != run.code.identity:
            raise LaunchError(f"not started: the code has changed since ({run.code.commit}, now {now.commit})")
        run.folder.mkdir(parents=True, exist_ok=True)
        other = read_job(run.folder)
        if run.status() == QUEUED and other["launcher"] != self.launcher.name:
            raise LaunchError(
                f"launcher={other['launcher']} has it in its queue: go on with that, or cancel the job and remove "
                f"{run.folder / 'job.json'}"
            )
        hold = Hold.take(run.folder)
        if hold is None:
            raise LaunchError(f"another call is at it, in {run.folder}")
        forget_job(run.folder)
        one = start(run, self.launcher, self.launch, hold)
        self.say(f"{where}: {f'{one.job.words}, ' if self.launcher.detached else ''}{one.started}, in {run.folder}")
        return one

    def _look(self) -> None:
        for one in list(self.running):
            has_ended = one.job.poll()
            if self.screen is None or not self.screen.shows_epochs:
                for line in one.new_epochs():
                    self.say(f"  {one.run.name}: {line}")
            if has_ended:
                self.running.remove(one)
                self._end(one)
        if self.screen:
            self.screen.draw()

    def _end(self, one: UnderWay) -> None:
        run, outcome = one.run, one.job.close()
        if outcome.again and not self.leaving and self.again[run.name] < self.launcher.retries:
            self.again[run.name] += 1
            self.waiting.insert(0, run)
            self.say(f"  {run.name}: {outcome.error}; once more")
        elif outcome.error is None:
            self.say(f"  {run.name}: done")
        else:
            self.problems[run.name] = outcome.error
            failed = "" if run.status() == CUT_OFF else "FAILED, "
            self.say(f"  {run.name}: {failed}{outcome.error.splitlines()[0]}")
        self.ended()

    def _leave(self, exit_code: int) -> None:
        """After a signal: leave the runs to their cluster, or ask each process, by its own id, to save and leave."""
        self.leaving = True
        jobs = [one.job for one in self.running]
        if self.launcher.detached:
            self.say(f"{len(jobs)} runs go on without this call; {self.launcher.leave(jobs)}")
            self.say("the same command picks them up, and goes on from here")
            raise SystemExit(exit_code)
        self.say(f"stopping: {len(jobs)} runs finish their step and save (once more: at once)")
        for job in jobs:
            job.stop()
        until = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < until:
            self._look()
            time.sleep(POLL)
        self.say("the same command goes on from here")
        raise SystemExit(exit_code)


def start(run: Run, launcher: Launcher, launch: Sequence[str], hold: Hold) -> UnderWay:
    """Hand a run to a launcher.

    Args:
        run: which one.
        launcher: takes it.
        launch: how detfamily is called.
        hold: of the run's folder; the job's from now on.

    Raises:
        DetfamilyError: it cannot be started; ``run.json`` says so, and the folder is free.
    """
    run.note_start()
    progress = Progress(run, len(read_rows(run.folder / EPOCHS)))
    try:
        return UnderWay(run, launcher.start(order_of(run, launcher, launch), hold), progress)
    except DetfamilyError as error:
        note(run.folder, status=FAILED, error=f"not started: {error}")
        hold.release()
        raise


def order_of(run: Run, launcher: Launcher, launch: Sequence[str]) -> Order:
    """What a launcher is to do."""
    threads, processes = launcher.threads, launcher.processes
    places = (str(PACKAGE.parent), os.environ.get("PYTHONPATH", ""))
    return Order(
        run.folder,
        (*with_processes(launch, processes), *run.words(threads and max(1, threads // processes))),
        device=run.variant.config["runtime"]["device"],
        threads=threads,
        code=run.code.identity if tuple(launch) == LAUNCH else None,
        environment={"PYTHONPATH": os.pathsep.join(filter(None, places))},
        place=Path.cwd(),
    )


def with_processes(launch: Sequence[str], processes: int) -> tuple[str, ...]:
    """How detfamily is called with several processes, each on a GPU of its own: by ``torchrun``."""
    if processes == 1:
        return tuple(launch)
    own = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return (launch[0], *own, *launch[1:])


def _images_seen(run: Run) -> float | None:
    rows = read_rows(run.folder / EPOCHS)
    return rows[-1]["images_seen"] if rows else None
