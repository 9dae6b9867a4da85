"""Checkpoints: one file that knows its weights, its config and its labels, written so that none is ever half there.

A file holds tensors and plain containers only, so it is read with ``weights_only=True`` and can run no code. Its keys:

====================  =================================================================================================
format, version       layout of the file (an integer), version of the package that wrote it
config                the resolved configuration, plain containers
template              the same with its interpolations, so that a value changed later reaches all that refer to it
label_map             ``LabelMap.state_dict()``
model                 the trained weights
ema                   {updates, model}: the averaged weights, or None
optimizer             parameter name -> {exp_avg, exp_avg_sq, step}
scaler                state of the gradient scaler (empty unless fp16)
epoch, steps_done     epochs done, and optimiser steps done in the epoch after them
step, images_seen     both counted from the start of the run; the schedule's position is the step
plan                  {total_batch_size, steps_per_epoch}: what a step and an epoch are
meter                 loss sums of the epoch under way, up to the last look
windows               the same since then, one entry per process
not_finite            steps that were left out for not being finite, in a row
rng                   random states, one entry per process
best                  highest AP so far, or None
metrics               of the last evaluation
====================  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import detfamily
from detfamily.checkpoints.read import read_file
from detfamily.engine.interrupt import signals_later
from detfamily.errors import CheckpointError, nearest
from detfamily.files import write_atomically

FORMAT = 2
"""2: the attention of an encoder stands beside its layers, so that it can be a list; in 1 it stood in them."""

# The nodes of a config that say how a run goes; all others say what the model is. A classifier is made of some of both.
RUN_NODES = frozenset(
    "augmentation check checkpoint classifier criterion data drop_epochs evaluate_only evaluation family_name init_ema "
    "init_from init_partial name optimizer output_dir postprocess pretrained published resume runtime schedule seed "
    "tracking visualization".split()
)
_NEEDED = ("config", "template", "label_map", "model")
_OF_A_RUN = ("optimizer", "scaler", "epoch", "steps_done", "plan", "meter", "rng", "best")


class LoadedModel(NamedTuple):
    """What evaluation and prediction need of a checkpoint.

    Attributes:
        config: the configuration of the run, plain containers, with its interpolations.
        label_map: ``LabelMap.state_dict()``.
        weights: the averaged weights where the run kept them, else the trained ones.
    """

    config: dict[str, Any]
    label_map: dict[str, Any]
    weights: dict[str, Tensor]


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint. Ctrl-C, and word of a reading process that was killed, wait until it is there.

    Raises:
        CheckpointError: the file cannot be written (full disk, missing rights); an older one of that name is intact.
    """
    content = {"format": FORMAT, "version": detfamily.__version__, **state}
    with signals_later():
        _write(path, content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
        kept = f"; {path.name} of before is intact" if path.exists() else ""
        raise CheckpointError(f"cannot write the checkpoint {path}: {reason}{kept}") from error


def require(path: str | Path) -> Path:
    """The path of a checkpoint that exists.

    Raises:
        CheckpointError: there is none, with those nearby.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; {_nearby(path)}")
    return path


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: there is none (with those nearby), it is broken, or it is not one of ours.
    """
    path = require(path)
    return check(read_file(path), path)


def load_run(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that a run can go on from.

    Raises:
        CheckpointError: as for ``load``; or it holds weights only.
    """
    state = load(path)
    if missing := [key for key in _OF_A_RUN if key not in state]:
        raise CheckpointError(
            f"{path} holds weights and no state of a run (no {', '.join(missing)}), so there is nothing to resume: "
            f"start a new run from its weights with init_from={path}"
        )
    return state


def is_ours(content: Any) -> bool:
    """Whether a file's content is that of a checkpoint, whole or not."""
    return isinstance(content, Mapping) and "template" in content and "label_map" in content


def check(content: Any, path: Path) -> dict[str, Any]:
    """The content of a checkpoint, if it has what every checkpoint has.

    Args:
        content: what ``read_file`` gave.
        path: for messages.

    Raises:
        CheckpointError: something is missing or of another kind, or a newer version wrote it.
    """
    missing = [key for key in _NEEDED if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint of detfamily: it has no {', '.join(missing)}. Files of other projects become "
            f"one with: detfamily convert {path} {path.stem}-converted.pt"
        )
    version = content.get("format", 0)
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointError(
            f"{path} was written by detfamily {content.get('version')}, which is newer than this "
            f"{detfamily.__version__}"
        )
    ema = content.get("ema")
    models = [content["model"], *([ema.get("model") if isinstance(ema, Mapping) else None] if ema else [])]
    sound = all(isinstance(content[key], Mapping) for key in _NEEDED) and all(
        isinstance(one, Mapping) and all(isinstance(value, Tensor) for value in one.values()) for one in models
    )
    if not sound:
        raise CheckpointError(f"{path} is damaged: its {', '.join(_NEEDED)} are not the mappings that they should be")
    if version < 2:
        content = {
            **content,
            "config": _from_format_1(content["config"]),
            "template": _from_format_1(content["template"]),
        }
    return content


def _from_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it is called today."""
    encoder, model = config.get("encoder"), config.get("model")
    found = dict(config)
    if isinstance(encoder, Mapping) and isinstance(layer := encoder.get("layer"), Mapping) and "attention" in layer:
        others = {key: value for key, value in layer.items() if key != "attention"}
        found["encoder"] = {**encoder, "layer": others, "attention": layer["attention"]}
    if isinstance(model, Mapping) and "embed_dim" in model:
        found["model"] = {"window_size": 7, **model}
    return found


def load_model(path: str | Path) -> LoadedModel:
    """Read what evaluation and prediction need; errors as in ``load``."""
    state = load(path)
    weights = state["ema"]["model"] if state.get("ema") else state["model"]
    return LoadedModel(state["template"], state["label_map"], weights)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Put weights into a model that they must fit exactly.

    Raises:
        CheckpointError: names missing or left over, or shapes that differ, each by name.
    """
    own = model.state_dict()
    troubles = [
        *_some("missing", [name for name in own if name not in weights]),
        *_some("not in this model", [name for name in weights if name not in own]),
        *_some(
            "of another shape",
            [
                f"{name} {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
                for name in own
                if name in weights and weights[name].shape != own[name].shape
            ],
        ),
    ]
    if troubles:
        raise CheckpointError(f"the weights of {source} do not fit the model: " + "; ".join(troubles))
    model.load_state_dict(dict(weights))


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], nodes: Callable[[str], bool] = lambda _: True
) -> list[str]:
    """Say setting by setting where two configs differ: "decoder.layers: 6 in the checkpoint, 3 now".

    Args:
        saved: config of the checkpoint.
        current: config of this run.
        nodes: which top-level nodes to compare.
    """
    before, now = (
        dict(_flat({key: value for key, value in one.items() if nodes(str(key))})) for one in (saved, current)
    )
    return [
        f"{key}: {_shown(before, key)} in the checkpoint, {_shown(now, key)} now"
        for key in sorted({*before, *now})
        if _shown(before, key) != _shown(now, key)
    ]


def check_same_model(saved: Mapping[str, Any], current: Mapping[str, Any], source: str | Path) -> None:
    """Refuse to go on from a checkpoint of another model.

    Raises:
        CheckpointError: with each model setting that differs.
    """
    found = differences(saved, current, lambda node: node not in RUN_NODES)
    if found:
        raise CheckpointError(f"{source} was trained with another model: " + "; ".join(found))


def _flat(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(node) if isinstance(node, tuple) else node


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "absent"


def _some(what: str, names: list[str], most: int = 8) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what}: {', '.join(names[:most])}{rest}"]


def _reason(error: BaseException) -> str:
    """What the system said; torch buries it under what it found missing in its archive."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def _nearby(path: Path) -> str:
    folders = [folder for folder in (path.parent, path.parent.parent) if folder.is_dir()]
    found = {str(one) for folder in folders for pattern in ("*.pt", "*/*.pt") for one in folder.glob(pattern)}
    return (
        nearest(str(path), found - {str(path)})
        if found - {str(path)}
        else f"there is no .pt file in {path.parent} either"
    )
