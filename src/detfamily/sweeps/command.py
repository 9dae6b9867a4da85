"""``detfamily sweep``: trials of a recipe with other values of some settings, until there are enough."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detfamily.errors import ConfigError
from detfamily.experiments.results import FINISHED
from detfamily.experiments.runner import LAUNCH
from detfamily.experiments.scale import Variant
from detfamily.experiments.version import code_version
from detfamily.files import read_json, write_text_atomically
from detfamily.sweeps import wandb_sweep
from detfamily.sweeps.conductor import Conductor
from detfamily.sweeps.distribution import Point
from detfamily.sweeps.drawn import Drawn, at_random, grid
from detfamily.sweeps.proposals import Proposal, Proposals
from detfamily.sweeps.report import PICTURE, TABLE, best, table, write_report
from detfamily.sweeps.request import GRID, OPTUNA, WANDB, Recipe, Request, read_request
from detfamily.sweeps.study import STUDY, Study, import_optuna
from detfamily.sweeps.trial import PRUNED, Trial, TrialRun, key, trial_of

try:
    import fcntl
except ImportError:  # not on Windows; there, two calls at once may propose the same trial
    fcntl = None  # type: ignore[assignment]

SWEEP = "sweep.json"


def sweep(words: Sequence[str]) -> None:
    """Go through the trials of a sweep, as far as they are not done.

    Args:
        words: the sweep's file, then ``method=``, ``trials=`` and the like, then overrides of every trial.

    Raises:
        ConfigError: something in what was typed, or in the file, does not exist or fit; before any work.
        SystemExit: with status 1 if a trial failed; after a signal.
    """
    if go(read_request(words)):
        raise SystemExit(1)


def go(request: Request, launch: Sequence[str] = LAUNCH) -> int:
    """Check everything, train what is proposed, and write and print what came out.

    Args:
        request: what was typed.
        launch: how detfamily is called.

    Returns:
        The exit status: 1 if a trial failed.
    """
    if request.method == OPTUNA:
        import_optuna()
    further = request.further
    if request.method == WANDB and not any(one.startswith("tracking=") for one in further):
        further = ("tracking=wandb", *further)
    recipe = Recipe(request.sweep, further)
    recipe.check()
    call = Call(request, recipe, launch)
    with hold(request, recipe):
        return call.go()


class Call:
    """One call of the command.

    Args:
        request: what was typed.
        recipe: what the trials share.
        launch: how detfamily is called.

    Raises:
        ConfigError: the method cannot do what the sweep's file says.
    """

    def __init__(self, request: Request, recipe: Recipe, launch: Sequence[str]) -> None:
        self.request, self.recipe, self.launch = request, recipe, launch
        self.sweep, self.folder, self.code = request.sweep, request.folder, code_version()
        self.method = request.method
        self.points: list[Point] = []  # of all trials, where they are known beforehand
        self.online = False
        if self.method == GRID:
            self.points = grid(self.sweep)[: request.trials]
        elif self.method == WANDB:
            config = recipe.base.config
            if not config["tracking"].get("wandb"):
                raise ConfigError(
                    "method=wandb needs a tracker of W&B: tracking=wandb (the default here) or tracking=all"
                )
            self.project, self.entity = wandb_sweep.place_of(config)
            self.definition = wandb_sweep.definition(recipe, self.folder, self.project, self.entity, launch)
            drawn = self.sweep.wandb_method == "random"
            self.points = (at_random(self.sweep, request.count) if drawn else grid(self.sweep))[: request.count]
            self.online = wandb_sweep.is_online(config, say)

    def go(self) -> int:
        """Train what is to be trained, in the folder that the caller holds; the exit status."""
        if self.method == WANDB:
            return self.with_wandb()
        if self.method == GRID:
            return self.train(self.drawn(), len(self.points))
        return self.train(Study(self.sweep, self.folder, self.request.count), self.request.count)

    def with_wandb(self) -> int:
        """Let W&B's agents run the trials, or run them here where there is no server."""
        file = wandb_sweep.write_definition(self.definition, self.folder)
        if self.online:
            return self.with_agents()
        self.method = f"{WANDB} ({self.sweep.wandb_method}, offline)"
        self.recipe = self.recipe.with_words("tracking.wandb.mode=offline")
        status = self.train(self.drawn(), len(self.points))
        say("\nwhere there is a network, this creates the sweep at W&B and runs it there, and the last line sends the")
        say("trials above, as runs of one group:")
        for line in wandb_sweep.commands(file, self.project, self.entity, len(self.points)):
            say(f"  {line}")
        return status

    def with_agents(self) -> int:
        """Create the sweep at the server, and run its agents."""
        path, count = wandb_sweep.create(self.definition, self.folder), len(self.points)
        done = sum(one.state == FINISHED for one in wandb_sweep.agents_trials(self.sweep, self.folder))
        say(f"{self.sweep.title}\n  W&B sweep {path}: {done} trials of {count} are done, in {self.folder}")
        try:
            if done < count:
                wandb_sweep.run_agents(path, count - done, self.request.jobs, self.folder)
        finally:
            trials = wandb_sweep.agents_trials(self.sweep, self.folder)
            self.method = f"{WANDB} ({self.sweep.wandb_method})"
            self.write(trials)
        self.show(trials)
        lacking = count - sum(one.state == FINISHED for one in trials)
        if lacking > 0:
            say(f"{lacking} trials have not finished; W&B's page of the sweep has what they said")
        return int(lacking > 0)

    def drawn(self) -> Drawn:
        """Proposals whose folders say what is done."""
        return Drawn(self.points, lambda one: self._place(one.number).status())

    def train(self, proposals: Proposals, count: int) -> int:
        """Go through what is proposed."""
        known = self.trials(proposals)
        done = sum(one.state in (FINISHED, PRUNED) for one in known)
        say(f"{self.sweep.title}\n  method {self.method}, {done} trials of {count} are done, in {self.folder}")
        conductor = Conductor(
            self.sweep,
            proposals,
            self.run_of,
            self.request.jobs,
            say,
            lambda: self.write(self.trials(proposals)),
            self.launch,
        )
        problems = conductor.go()
        trials = self.trials(proposals)
        self.write(trials)
        self.show(trials)
        for name, words in problems.items():
            say(f"\nFAILED: {name}: {words}")
        return int(bool(problems))

    def run_of(self, one: Proposal) -> TrialRun:
        """The run of a trial."""
        return self._run(one.number, self.recipe.variant(*one))

    def _run(self, number: int, variant: Variant) -> TrialRun:
        seed = int(variant.config["seed"])
        return TrialRun(self.sweep.name, self.sweep.scale, variant, seed, self.code, self.folder, key=key(number))

    def _place(self, number: int) -> TrialRun:
        """A trial as far as its folder is concerned: its own config would take a moment to compose."""
        return self._run(number, self.recipe.base)

    def trials(self, proposals: Proposals) -> list[Trial]:
        """All trials that have been started, with what their folders say."""
        return [trial_of(*one, self._place(one.number).folder, self.sweep.metric) for one in proposals.known()]

    def write(self, trials: Sequence[Trial]) -> None:
        """Write table and picture."""
        write_report(self.recipe, trials, self.method, self.folder)

    def show(self, trials: Sequence[Trial]) -> None:
        """Print the table, and where things lie."""
        say("\n" + table(self.sweep, sorted(trials, key=lambda one: one.number)))
        if (found := best(self.sweep, trials)) is not None:
            say(f"\nbest        trial {found.number}, {self.sweep.label} {self.sweep.shown(found.value)}")
        say(f"table       {self.folder / TABLE}")
        if (self.folder / PICTURE).is_file():
            say(f"picture     {self.folder / PICTURE}")
        if self.method == OPTUNA:
            say(f"study       {self.folder / STUDY}")


@contextmanager
def hold(request: Request, recipe: Recipe) -> Iterator[None]:
    """Take the folder of a sweep for this call, and see that it holds no other sweep.

    Raises:
        ConfigError: another call is at it, or it holds trials that cannot be compared with these.
    """
    folder = request.folder
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"another call is at the sweep in {folder}: wait for it, take jobs=N there, or another output_dir="
                ) from None
        mine = {"method": request.method, "identity": recipe.identity}
        if (file := folder / SWEEP).is_file():
            found = read_json(file)
            for name, value in mine.items():
                if found.get(name) != value:
                    other = f"method={found.get(name)}" if name == "method" else "other settings, ranges or metric"
                    raise ConfigError(
                        f"{folder} holds a sweep with {other}: its trials cannot be compared with these; choose "
                        "another output_dir=, or remove that folder"
                    )
        write_text_atomically(file, json.dumps({**mine, "file": str(request.sweep.path.resolve())}, indent=2) + "\n")
        yield
    finally:
        os.close(handle)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)
