"""What surrounds a run: its folder, the checkpoint it goes on from, the words about it before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from torch import nn

from detfamily.engine.checkpoint import require
from detfamily.engine.distributed import World
from detfamily.errors import CheckpointError, ConfigError
from detfamily.files import write_text_atomically

LAST, BEST = "last.pt", "best.pt"

# Below this, a detector that starts from random queries has hardly begun: in the miniature of the DETR line nothing is
# found before some hundred steps.
FEW_STEPS = 500

FROZEN_AT_RANDOM = (
    "backbone.weights=null leaves the frozen stages and norms of the backbone as they were drawn, for good: to train "
    "from scratch choose backbone=resnet50_scratch, or backbone.frozen_stages=0 with trained norms"
)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: the run folder; not made yet.
        checkpoint: file to go on from, or None.
        resumed: whether the folder holds an earlier part of this run, so that its logs go on.
    """

    folder: Path
    checkpoint: Path | None = None
    resumed: bool = False


def find_start(cfg: DictConfig, world: World) -> Start:
    """Settle the run folder and the checkpoint that the run goes on from, if it does.

    ``resume=null`` starts a new run, never in the folder of another one. ``resume=auto`` goes on from the last
    checkpoint of ``output_dir``, or starts there if it has none: the same command starts a run and restarts it.
    ``resume=PATH`` goes on from that checkpoint, in its own folder unless ``output_dir`` names another.

    Raises:
        ConfigError: the folder holds another run, or ``resume=auto`` without ``output_dir``.
        CheckpointError: the checkpoint is not there.
    """
    given = None if cfg.output_dir is None else Path(str(cfg.output_dir)).expanduser()
    if cfg.resume == "auto":
        if given is None:
            raise ConfigError("resume=auto looks for the last checkpoint of a run folder: say which, output_dir=...")
        last = given / LAST
        return Start(given, last if last.is_file() else None, resumed=_holds_run(given))
    if cfg.resume is not None:
        checkpoint = Path(str(cfg.resume)).expanduser()
        checkpoint = require(checkpoint / LAST if checkpoint.is_dir() else checkpoint)
        folder = given or checkpoint.parent
        same = folder.resolve() == checkpoint.parent.resolve()
        if not same:
            _refuse_occupied(folder)
        return Start(folder, checkpoint, resumed=same)
    folder = given or Path("runs") / f"{cfg.name}-{world.from_main(datetime.now().strftime('%Y%m%d-%H%M%S'))}"
    _refuse_occupied(folder)
    return Start(folder)


def check_plan(state: dict[str, Any], plan: dict[str, int], source: Path) -> None:
    """Refuse to go on where a step or an epoch has become something else: the position would mean nothing.

    Raises:
        CheckpointError: with both values and what to do instead.
    """
    for name, value in plan.items():
        if state["plan"][name] != value:
            raise CheckpointError(
                f"{source} was trained with {name}={state['plan'][name]}, now it would be {value}: an interrupted run "
                f"goes on with the same batch and data; for a new run from its weights use init_from={source}"
            )


def make_folder(folder: Path) -> None:
    """Make the run folder.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be made ({error.strerror}): set output_dir=...") from error


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Store the resolved configuration beside the run's results."""
    write_text_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def parameter_words(model: nn.Module) -> str:
    """How many parameters there are, and how many are trained."""
    every = sum(one.numel() for one in model.parameters())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return f"{every / 1e6:.2f} M parameters" + (f", {trained / 1e6:.2f} M trained" if trained != every else "")


def frozen_at_random(backbone: Mapping[str, Any], starts_from_weights: bool) -> bool:
    """Whether stages of a backbone are frozen that no weights have ever been loaded into."""
    untrained = backbone.get("weights", "some") is None and not starts_from_weights
    return untrained and bool(backbone.get("frozen_stages", 0))


def concerns(num_queries: int, max_objects: int, total_steps: int, frozen_random: bool = False) -> list[str]:
    """What silently ruins runs, in a sentence each."""
    found = []
    if num_queries < max_objects:
        found.append(
            f"the detector has {num_queries} queries, but an image of the training set has {max_objects} objects: what "
            f"is beyond can never be found; set model.num_queries={max_objects} or more"
        )
    if total_steps < FEW_STEPS:
        found.append(
            f"{total_steps} optimiser steps are few for a detector of this line: expect an AP near 0; raise "
            "schedule.epochs or schedule.images_per_epoch, or lower schedule.total_batch_size"
        )
    if frozen_random:
        found.append(FROZEN_AT_RANDOM)
    return found


def listing(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a name and some words, aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {words}" for name, words in rows)


def label_words(names: Iterable[str | None], most: int = 12) -> str:
    """The class names in the order of the head's columns, shortened."""
    known = [name for name in names if name is not None]
    rest = f", ... ({len(known)} in all)" if len(known) > most else ""
    return ", ".join(known[:most]) + rest


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or any(folder.glob("*.pt"))


def _refuse_occupied(folder: Path) -> None:
    if _holds_run(folder):
        raise ConfigError(
            f"{folder} holds a run already; go on with it (resume=auto output_dir={folder}), or choose another "
            "output_dir"
        )
