"""W&B sweeps: their file, the sweep at the server and its agents, and the commands for a machine without a network."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from detfamily.config.overrides import quoted
from detfamily.engine.interrupt import Interruption
from detfamily.errors import ConfigError
from detfamily.experiments.results import FINISHED
from detfamily.experiments.runner import LAUNCH, PATIENCE, POLL
from detfamily.files import write_text_atomically
from detfamily.sweeps.distribution import Choice, Point
from detfamily.sweeps.request import Recipe
from detfamily.sweeps.sweep import Sweep
from detfamily.sweeps.trial import TRIALS, Trial, trial_of
from detfamily.tracking.labels import label_words
from detfamily.tracking.trackers import words_of

FILE, ID_FILE = "sweep.yaml", "wandb_sweep.txt"
PROJECT = "detfamily"
AGENT = (sys.executable, "-m", "wandb", "agent")
OFFLINE = ("offline", "dryrun")


def place_of(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Project and entity of a config with ``tracking=wandb``, as the tracker settles them."""
    given = config["tracking"]["wandb"]
    project = given.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT
    return str(project), given.get("entity") or os.environ.get("WANDB_ENTITY")


def is_online(config: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the sweep can be one of the server's; if not, it is said why.

    Raises:
        ConfigError: W&B is switched off, or not installed.
    """
    mode = config["tracking"]["wandb"].get("mode") or os.environ.get("WANDB_MODE") or "online"
    if mode == "disabled":
        raise ConfigError(
            "method=wandb, and W&B is disabled: unset WANDB_MODE and tracking.wandb.mode, or method=optuna"
        )
    wandb = import_wandb()
    if mode in OFFLINE:
        return False
    if wandb.login(prompt=False, verify=False):
        return True
    say("there is no key of W&B (wandb login, or WANDB_API_KEY): the trials are kept offline")
    return False


def import_wandb() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"method=wandb needs W&B, which cannot be imported ({error}): pip install wandb") from None
    return wandb


def definition(
    recipe: Recipe, folder: Path, project: str, entity: str | None, launch: Sequence[str] = LAUNCH
) -> dict[str, Any]:
    """The sweep in W&B's own form: https://docs.wandb.ai/models/sweeps/define-sweep-configuration.

    Its command is that of one trial; the agent puts the parameters behind it. Each trial has a folder below
    ``trials``, called after its run.

    Args:
        recipe: what the trials share.
        folder: of the sweep.
        project: where it lies at W&B.
        entity: whose it is there; None: of the key's owner.
        launch: how detfamily is called.

    Raises:
        ConfigError: a parameter that W&B would hand on as something else.
    """
    sweep = recipe.sweep
    for key, one in sweep.parameters.items():
        if isinstance(one, Choice) and None in one.values:
            raise ConfigError(f"{sweep.path}: parameters: {key}: W&B hands null on as None; take method=optuna or grid")
    trials = quoted(f"{(folder / TRIALS).resolve()}/${{oc.env:WANDB_RUN_ID}}")
    seed = recipe.base.config["seed"]
    labels = label_words(recipe.base.config, sweep.name, (f"seed {seed}", sweep.scale))
    return {
        "name": sweep.name,
        "description": sweep.title,
        "project": project,
        **({"entity": entity} if entity else {}),
        "program": "detfamily",
        "method": sweep.wandb_method,
        "metric": {"name": sweep.metric, "goal": sweep.direction},
        "parameters": {key: one.for_wandb() for key, one in sweep.parameters.items()},
        "command": [
            "${env}",
            *launch,
            sweep.task.command,
            *recipe.words,
            *labels,
            f"output_dir={trials}",
            "resume=auto",
            "${args_no_hyphens}",
        ],
    }


def write_definition(content: Mapping[str, Any], folder: Path) -> Path:
    """Write ``sweep.yaml``."""
    write_text_atomically(folder / FILE, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120))
    return folder / FILE


def commands(file: Path, project: str, entity: str | None, count: int) -> list[str]:
    """What a machine with a network is to do: create the sweep and run its agent, and send what was kept offline."""
    owner = ["--entity", entity] if entity else []
    runs = f"{shlex.quote(str(file.parent / TRIALS))}/*/wandb/offline-run-*"
    return [
        shlex.join(["wandb", "sweep", "--project", project, *owner, str(file)]),
        f"wandb agent --count {count} {entity or 'ENTITY'}/{project}/SWEEP_ID",
        f"wandb sync {runs}",
    ]


# -- at the server ----------------------------------------------------------------------------------------------------


def create(content: Mapping[str, Any], folder: Path) -> str:
    """Create the sweep, or find the one that an earlier call created; returns its path, ``[entity/]project/id``.

    Raises:
        ConfigError: the server cannot be reached, or refuses.
    """
    file = folder / ID_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    wandb = import_wandb()
    own = {key: value for key, value in content.items() if key not in ("project", "entity")}
    try:
        found = wandb.sweep(own, project=content["project"], entity=content.get("entity"))
    except Exception as error:
        raise ConfigError(
            f"the sweep cannot be created ({words_of(error)}); without the server: tracking.wandb.mode=offline"
        ) from error
    path = "/".join(filter(None, (content.get("entity"), content["project"], found)))
    write_text_atomically(file, path + "\n")
    return path


def run_agents(path: str, count: int, jobs: int, folder: Path, agent: Sequence[str] = AGENT) -> None:
    """Run agents until they have gone through so many trials, or given up: the trials' folders say what was done.

    Args:
        path: of the sweep.
        count: trials of all agents together.
        jobs: agents at once.
        folder: of the sweep, where W&B keeps what each trial was given.
        agent: how an agent is called.

    Raises:
        SystemExit: after Ctrl-C or SIGTERM, when the trainings under way have been saved.
    """
    shares = [count // jobs + (place < count % jobs) for place in range(jobs)]
    environment = {**os.environ, "WANDB_DIR": str(folder.resolve())}
    with Interruption() as interruption:
        processes = [
            subprocess.Popen(
                [*agent, "--count", str(share), path],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # so that Ctrl-C reaches this process alone, which tells the agents
            )
            for share in shares
            if share
        ]
        try:
            while any(one.poll() is None for one in processes) and not interruption.wanted:
                time.sleep(POLL)
            if interruption.wanted:
                _stop(processes)
                raise SystemExit(interruption.exit_code)
        finally:
            for one in processes:
                if one.poll() is None:
                    one.kill()


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """To an agent, the first Ctrl-C is a wish to start no more runs, the second one ends the run under way."""
    until = time.monotonic() + PATIENCE
    for _ in range(2):
        for one in processes:
            with suppress(ProcessLookupError):
                one.send_signal(signal.SIGINT)
        time.sleep(2.0)
    while any(one.poll() is None for one in processes) and time.monotonic() < until:
        time.sleep(POLL)


def agents_trials(sweep: Sweep, folder: Path) -> list[Trial]:
    """The trials of agents, in the order in which they began."""
    found: list[tuple[float, Point, Path]] = []
    for file in (folder / "wandb").glob("sweep-*/config-*.yaml"):
        run = folder / TRIALS / file.stem.removeprefix("config-")
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        point = {key: content[key]["value"] for key in sweep.parameters if key in content}
        found.append((file.stat().st_mtime, point, run))
    ordered = enumerate(sorted(found, key=lambda one: one[0]))
    return [trial_of(number, point, _state(run), run, sweep.metric) for number, (_, point, run) in ordered]


def _state(run: Path) -> str:
    return FINISHED if (run / "metrics.json").is_file() else "not finished"
