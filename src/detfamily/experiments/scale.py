"""A table on a scale: the overrides of each row's run, and the identity of what they configure.

A scale is a choice of ``configs/scale``; it goes on top of the recipe, and below what the rows override. A miniature
must not undo what a table is about, so on top of it

- settings that any row of the table overrides are, in the other rows too, as they are published;
- the lengths of training keep their ratio to the baseline's, up to ``LONGEST`` times the baseline, and the images of a
  step are its own, since its learning rate belongs to them;
- where a row needs what the scale has not got (a backbone that can be dilated, augmentation that resizes), all rows of
  its table take the choice of configs/scale that has it, ``<scale>_dilated`` or ``<scale>_resized``;
- what a recipe says of a backbone that the scale replaces (drop path, gradient checkpointing) goes with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from detfamily.config import compose, groups_for, to_container, validate
from detfamily.config.targets import argument_hints
from detfamily.errors import ConfigError, nearest
from detfamily.experiments.table import Row, Table
from detfamily.experiments.task import DETECTION, Task

LONGEST = 3.0
"""How many times the baseline's length a row of a miniature may have."""

LENGTH = ("schedule.epochs", "drop_epochs")
"""What says how long a recipe is; kept as a ratio instead of as a number."""

STEP = "schedule.total_batch_size"
"""What a learning rate belongs to: a miniature has both of its own."""

COMPANIONS = {"postprocess.layer": "decoder.num_layers"}
"""A setting -> one without whose published value it would mean something else."""

NOT_IDENTITY = (
    "seed name output_dir resume published tracking data.root runtime.threads runtime.num_workers runtime.malloc"
).split()
"""What does not change what a run is: the seed is kept beside, and the rest changes no result."""


@dataclass(frozen=True)
class Variant:
    """A row on a scale.

    Attributes:
        row: of the table.
        overrides: of the task's command, all but seed and folder; for a row that is only evaluated, of ``detfamily
            evaluate``.
        config: the resolved configuration.
        identity: hash of the configuration without seed and paths.
        remark: what the miniature could not keep; empty if nothing.
        task: what is trained.
    """

    row: Row
    overrides: tuple[str, ...]
    config: Mapping[str, Any]
    identity: str
    remark: str = ""
    task: Task = DETECTION

    @property
    def images(self) -> int | None:
        """Images of the whole training, None where the data set decides."""
        schedule = self.config["schedule"]
        if schedule["images_per_epoch"] is None:
            return None
        steps = schedule["images_per_epoch"] // schedule["total_batch_size"]
        return int(schedule["epochs"] * steps * schedule["total_batch_size"])


def scales(task: Task = DETECTION) -> list[str]:
    """The choices of ``scale=``."""
    return groups_for(task.command).get("scale", [])


def variants(table: Table, scale: str, further: Sequence[str] = ()) -> dict[str, Variant]:
    """All rows of a table on a scale, by label.

    Args:
        table: the rows.
        scale: a choice of configs/scale.
        further: overrides for every run, on top of everything.

    Raises:
        ConfigError: an unknown scale, or a row that cannot be composed; with the row.
    """
    known = scales(table.task)
    if scale not in known:
        raise ConfigError(f"there is no scale {scale!r}: {nearest(scale, known)}")
    published = {row.label: _composed(table, row, ["data.root=."]) for row in table.rows}
    scale = _fitting(scale, table, published.values())
    base = published[table.baseline]
    if _counts_images(table, scale):
        table = replace(table, rows=tuple(_without(row, STEP) for row in table.rows))
        row = _without(table.row(table.baseline), *LENGTH)
    else:
        row = table.row(table.baseline)
    others = [one for one in further if not _sets_epochs(one)]
    scaled = _composed(table, row, [f"+scale={scale}"], others)
    epochs = int(base.schedule.epochs), int(scaled.schedule.epochs)
    return {row.label: _variant(table, row, scale, published[row.label], epochs, further) for row in table.rows}


def _fitting(scale: str, table: Table, published: Iterable[DictConfig]) -> str:
    """The choice of configs/scale that has what the rows of a table need."""
    needs = {
        "dilated": any(cfg.backbone.get("dilation") for cfg in published),
        "resized": any(one.startswith("augmentation=") for row in table.rows for one in row.overrides),
    }
    name = "_".join([scale, *(need for need, present in needs.items() if present)])
    return name if name in scales(table.task) else scale


def _counts_images(table: Table, scale: str) -> bool:
    """Whether a scale is a miniature: it says how many images an epoch has, where the data set decides otherwise."""
    cfg = _composed(table, table.row(table.baseline), [f"+scale={scale}", "data.root=."])
    return cfg.schedule.images_per_epoch is not None


def _without(row: Row, *keys: str) -> Row:
    return replace(row, overrides=tuple(one for one in row.overrides if one.partition("=")[0] not in keys))


def _variant(
    table: Table, row: Row, scale: str, published: DictConfig, base_epochs: tuple[int, int], further: Sequence[str]
) -> Variant:
    scaled = _composed(table, row, [f"+scale={scale}"], further)
    first = [f"+scale={scale}", *_left_behind(published, scaled), *_kept(table, row, published, scaled)]
    epochs, remark = _length(int(published.schedule.epochs), *base_epochs)
    if any(map(_sets_epochs, further)):
        epochs, remark = int(scaled.schedule.epochs), ""
    last = [] if epochs == scaled.schedule.epochs else [f"schedule.epochs={epochs}"]
    cfg = _composed(table, row, first, [*last, *further])
    with _naming(table, row):
        validate(cfg)
    overrides = tuple(row.overrides) if row.weights_of else tuple(_words(table, row, first, [*last, *further]))
    return Variant(row, overrides, to_container(cfg), identity(cfg, row.weights_of), remark, table.task)


def _sets_epochs(override: str) -> bool:
    return override.startswith("schedule.epochs=")


def _words(table: Table, row: Row, first: Sequence[str], last: Sequence[str]) -> list[str]:
    """The overrides of a row, between those of the scale and those of the user."""
    recipe = [one for one in row.overrides if one.startswith("experiment=")] or [f"experiment={table.base}"]
    return [*recipe, *first, *(one for one in row.overrides if one not in recipe), *last]


def _composed(table: Table, row: Row, first: Sequence[str], last: Sequence[str] = ()) -> DictConfig:
    with _naming(table, row):
        return compose(table.task.command, _words(table, row, first, last))


@contextmanager
def _naming(table: Table, row: Row) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{table.path}, row {row.label!r}: {error}") from error


def varied(table: Table) -> list[str]:
    """The settings (not the choices of groups, and not the length) that any row of a table overrides."""
    keys = [one.partition("=")[0].lstrip("+~") for row in table.rows for one in row.overrides]
    known = groups_for(table.task.command)
    fields = [key for key in keys if key not in known and key not in LENGTH]
    return list(dict.fromkeys([*fields, *(COMPANIONS[key] for key in fields if key in COMPANIONS)]))


def _kept(table: Table, row: Row, published: DictConfig, scaled: DictConfig) -> list[str]:
    """Overrides that bring what the table varies back to its published value, where the scale changed it."""
    own = [one.partition("=")[0].lstrip("+~") for one in row.overrides]
    found = []
    for key in varied(table):
        before, now = (_plain(OmegaConf.select(cfg, key)) for cfg in (published, scaled))
        if key not in own and before != now:
            found.append(f"{key}={json.dumps(before)}")
    return found


def _left_behind(published: DictConfig, scaled: DictConfig) -> list[str]:
    """Overrides that take out what a recipe says of its own backbone, where the scale's has no such setting."""
    if published.backbone._target_ == scaled.backbone._target_:
        return []
    known = {"_target_", *argument_hints(_plain(scaled.backbone))}
    return [f"~backbone.{key}" for key in scaled.backbone if key not in known]


def _plain(value: Any) -> Any:
    return to_container(value) if OmegaConf.is_config(value) else value


def _length(epochs: int, base_published: int, base_scaled: int) -> tuple[int, str]:
    """How many epochs a row has on the scale, and a remark where that is not its published share."""
    if base_published == base_scaled:
        return epochs, ""
    ratio = epochs / base_published
    remark = f"{LONGEST:g} times the length of the baseline instead of {ratio:g} times" if ratio > LONGEST else ""
    return max(1, round(min(ratio, LONGEST) * base_scaled)), remark


def identity(cfg: DictConfig, weights_of: str | None = None) -> str:
    """A hash of all that decides what a run computes, but for the code, the seed, and where the files lie."""
    content = OmegaConf.create(to_container(cfg))
    for key in NOT_IDENTITY:
        above, _, name = key.rpartition(".")
        node = OmegaConf.select(content, above) if above else content
        if node is not None and name in node:
            del node[name]
    text = json.dumps([OmegaConf.to_container(content), weights_of], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
