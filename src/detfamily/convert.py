"""``detfamily convert``: official checkpoints become ours, and ours become official ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detfamily.checkpoints.adapter import listed
from detfamily.checkpoints.coco_classes import COLUMNS
from detfamily.checkpoints.official import (
    Translated,
    label_map_for,
    model_overrides,
    official_label_map,
    read_official,
    to_official,
    translate,
)
from detfamily.checkpoints.read import read_file
from detfamily.checkpoints.registry import UPSTREAMS
from detfamily.checkpoints.variant import IN_TRAINING, as_override
from detfamily.config import validate
from detfamily.data.coco import read_object
from detfamily.data.labels import LabelMap
from detfamily.engine import checkpoint
from detfamily.engine.evaluate import on_top_of, split_overrides
from detfamily.engine.run import label_words, listing
from detfamily.errors import CheckpointError, ConfigError, DataError
from detfamily.files import write_atomically

_USAGE = "detfamily convert INPUT OUTPUT [categories=ANNOTATIONS.json] [ema=true|false] [overrides of train]"


def convert(words: Sequence[str]) -> Path:
    """``detfamily convert INPUT OUTPUT``: the direction follows from what INPUT is.

    An official file becomes a checkpoint of ours that knows its config and labels, so that ``detfamily evaluate``,
    ``predict`` and ``init_from`` need nothing else. Overrides of ``detfamily train`` change that config.
    ``categories=`` is the COCO json whose categories the columns of the class head stand for; without it, 91 columns
    are COCO's, and of Co-DETR 80. A checkpoint of ours becomes an official file, {model, args}, or of Co-DETR {meta,
    state_dict}. ``ema=`` says whether to take averaged weights; without it, those of our files are taken where there
    are any, and of official files those that the official code evaluates.

    Returns:
        The file that was written.

    Raises:
        ConfigError: not two files, or an override that cannot be applied.
        CheckpointError: INPUT is missing, broken, hostile or of nothing that can be read, or OUTPUT cannot be written.
        DataError: the categories cannot be read, or do not fit the class head.
    """
    own, others = split_overrides([one for one in words[2:] if "=" in one], ("categories", "ema"))
    _check_words(words)
    source, target = checkpoint.require(words[0]), Path(words[1]).expanduser()
    if target.exists():
        raise ConfigError(f"{target} exists already: remove it, or choose another name")
    content = read_file(source)
    if checkpoint.is_ours(content):
        if more := [one for one in words[2:] if not one.startswith("ema=")]:
            raise ConfigError(
                f"{source} is a checkpoint of detfamily, which knows its config and labels: leave {more[0]} out"
            )
        rows = _to_official(checkpoint.check(content, source), source, target, own["ema"])
    else:
        rows = _to_ours(content, source, target, own["categories"], own["ema"], others)
    print(f"converted {source}\n{listing(rows)}")
    return target


def _check_words(words: Sequence[str]) -> None:
    if len(words) < 2 or any("=" in one and not Path(one).exists() for one in words[:2]):
        raise ConfigError(f"convert needs two files: {_USAGE}")
    if more := [one for one in words[2:] if "=" not in one]:
        raise ConfigError(f"{more[0]!r} is neither of the two files nor an override: {_USAGE}")
    if odd := [one for one in words[2:] if one.startswith("ema=") and one not in ("ema=true", "ema=false")]:
        raise ConfigError(f"{odd[0]}: expected true, the averaged weights, or false, the trained ones")


def _to_ours(
    content: Any, source: Path, target: Path, categories: str | None, ema: bool | None, overrides: Sequence[str]
) -> list[tuple[str, str]]:
    file = read_official(content, source, ema)
    by_id = not UPSTREAMS[file.family].of_mmcv
    label_map = None if categories is None else _label_map(Path(categories), file.columns, by_id)
    found = translate(file, overrides, label_map)
    if found.label_map is None:
        raise CheckpointError(
            f"{source} does not say what the {file.columns} columns of its class head stand for "
            f"({COLUMNS if by_id else 80} would be COCO's): add categories=ANNOTATIONS.json, the COCO json that it was "
            "trained on"
        )
    origin = {
        "repository": found.repository,
        "file": source.name,
        "fits": list(model_overrides(found.variant)),
        "assumed": list(found.variant.assumed),
    }
    checkpoint.save(
        target,
        {
            "config": found.config,
            "template": OmegaConf.to_container(found.cfg, resolve=False),
            "label_map": found.label_map.state_dict(),
            "model": found.weights,
            "ema": None,
            "origin": origin,
        },
    )
    return [("read as", found.repository), *_words(found), ("written", str(target))]


def _words(found: Translated) -> list[tuple[str, str]]:
    assert found.label_map is not None
    file, variant = found.file, found.variant
    numbers = sum(value.numel() for value in found.weights.values())
    ignored = f", {len(file.ignored)} ignored ({listed(file.ignored, 3)})" if file.ignored else ""
    rows = [
        ("model", " ".join(one for one in found.overrides if not one.startswith("data."))),
        *_averaging(file.averaged),
        ("tensors", f"{len(file.state)} read{ignored}; {len(found.weights)} written, {numbers / 1e6:.2f} M numbers"),
        ("labels", f"{found.label_map.num_classes} columns: {label_words(found.label_map.names)}"),
    ]
    if found.left_out:
        rows.append(("left out", f"{len(found.left_out)} tensors for training alone ({listed(found.left_out, 3)})"))
    given = {one.partition("=")[0] for one in found.overrides}
    assumed = [
        f"{as_override(key, variant.fields[key])} ({why})"
        for key, why in variant.assumed.items()
        if key in variant.fields and key not in given and why != IN_TRAINING
    ]
    if assumed:
        rows.append(("not told", f"the file does not say; taken as {', '.join(assumed)}; override what is otherwise"))
    rows += [("warning", words) for words in (*variant.doubts, *_name_doubts(file.path))]
    return rows


def _averaging(averaged: bool | None) -> list[tuple[str, str]]:
    """Which of two sets of weights was taken; None where there is one only."""
    if averaged is None:
        return []
    other = "trained ones, too, which ema=false takes" if averaged else "averaged ones, too, which ema=true takes"
    return [("weights", f"the {'averaged' if averaged else 'trained'} ones; the file has {other}")]


def _name_doubts(path: Path) -> list[str]:
    """DETR's files carry the beginning of their SHA-256 in their name; a file that came damaged shows there."""
    named = re.fullmatch(r"detr-r\d+[\w-]*-([0-9a-f]{8})\.pth", path.name)
    if not named:
        return []
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.startswith(named[1]):
        return []
    return [f"its SHA-256 begins with {digest[:8]}, not with {named[1]}: it is not the published file of that name"]


def _label_map(path: Path, number: int, by_id: bool) -> LabelMap:
    content = read_object(path.expanduser())
    categories = content.get("categories")
    if not isinstance(categories, list) or not all(isinstance(one, dict) for one in categories) or not categories:
        raise DataError(f"{path} has no list 'categories'; expected a COCO json, the annotations of the training")
    return label_map_for(categories, number, str(path), by_id)


def _to_official(state: dict[str, Any], source: Path, target: Path, ema: bool | None) -> list[tuple[str, str]]:
    there = bool(state.get("ema"))
    if ema and not there:
        raise CheckpointError(f"{source} has no averaged weights: leave ema=true out")
    averaged = there and ema is not False
    weights = state["ema"]["model"] if averaged else state["model"]
    label_map = LabelMap.from_state_dict(state["label_map"])
    try:
        cfg = on_top_of(state["template"], ())
        validate(cfg)
        content = to_official(weights, cfg, label_map, source)
    except OmegaConfBaseException as error:
        raise CheckpointError(
            f"{source} is damaged: its config lacks something ({str(error).splitlines()[0]})"
        ) from None
    try:
        write_atomically(target, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    file = read_official(content, target)
    upstream = UPSTREAMS[file.family]
    columns = "of the categories alone" if upstream.of_mmcv else "of their category ids"
    moved = "" if official_label_map(label_map, upstream) == label_map else f", moved to the columns {columns}"
    places = ("state_dict", "meta") if upstream.of_mmcv else ("model", "args")
    return [
        ("written as", f"{upstream.repository}: {target}"),
        ("weights", "the averaged ones" if averaged else "the trained ones"),
        ("tensors", f"{len(file.state)}, under '{places[0]}'; settings under '{places[1]}'"),
        ("labels", f"{file.columns} columns, {label_map.num_categories} categories{moved}"),
    ]
