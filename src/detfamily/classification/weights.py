"""``init_from`` of a classifier: a checkpoint of ours, or an official file of ImageNet weights with its head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detfamily.backbones.weights import resized_table
from detfamily.checkpoints.adapter import listed
from detfamily.checkpoints.classes import move_rows
from detfamily.checkpoints.classifiers import classifier_adapter, tables
from detfamily.checkpoints.read import read_file
from detfamily.checkpoints.transfer import Initial, Report
from detfamily.classification.classifier import Classifier
from detfamily.data.labels import LabelMap
from detfamily.engine import checkpoint
from detfamily.errors import CheckpointError

OFFICIAL = "an official classifier"
"""The origin of weights that have official names still."""

_HEAD = "head."
_COUNTER = ".num_batches_tracked"


def read_initial(path: str | Path, averaged: bool | None = None) -> Initial:
    """Read weights to start from, or to evaluate.

    Args:
        path: a checkpoint of ours, or an official file: the state dict, or a mapping that has it as its "model".
        averaged: take the averaged weights (EMA) of ours, or the trained ones; None takes the averaged ones, if any.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    path = checkpoint.require(path)
    content = read_file(path)
    if checkpoint.is_ours(content):
        state = checkpoint.check(content, path)
        there = bool(state.get("ema"))
        if averaged and not there:
            raise CheckpointError(f"{path} has no averaged weights: it was trained without optimizer.ema_decay")
        weights = state["ema"]["model"] if there and averaged is not False else state["model"]
        label_map = LabelMap.from_state_dict(state["label_map"])
        return Initial(path, "a checkpoint of detfamily", weights, label_map, state["config"])
    return Initial(path, OFFICIAL, dict(_state_dict(content, path)), None, {})


def start_from(net: Classifier, initial: Initial, label_map: LabelMap, partial: bool = False) -> Report:
    """Put the weights into a classifier, as far as they fit, and say so.

    Rows of the head go over by the classes' names. An official file does not say which they are: its head goes over as
    it is where it has as many, and the order of the folders' names is taken to be that of its classes, as in ImageNet.
    Its tables of position biases are interpolated where they have another size.

    Args:
        net: with its initial values.
        initial: the weights.
        label_map: of the data.
        partial: leave initial values where a tensor is missing or of another shape, instead of an error.

    Raises:
        CheckpointError: tensors that do not fit, each by name.
    """
    own, weights, resizable = net.state_dict(), initial.weights, tables(net.backbone)
    if initial.origin == OFFICIAL:
        weights = classifier_adapter(net.backbone).to_ours(weights)
    new, wrong, resized = {}, [], 0
    for name, target in own.items():
        given = weights.get(name)
        if given is None:
            continue
        fits = given.shape[1:] == target.shape[1:]
        if name.startswith(_HEAD) and fits and initial.label_map is not None and initial.label_map != label_map:
            given = move_rows(given, initial.label_map, target, label_map, False)
        if name in resizable and given.ndim == target.ndim and given.shape != target.shape:
            given, resized = resized_table(given, target), resized + 1
        if given.shape == target.shape:
            new[name] = given
        else:
            wrong.append(f"{name} {list(given.shape)}, expected {list(target.shape)}")
    missing = [name for name in own if name not in weights and not name.endswith(_COUNTER)]
    left = [name for name in weights if name not in own and not name.endswith(_COUNTER)]
    lists = (("missing", missing), ("not in this model", left), ("of another shape", wrong))
    troubles = [f"{words}: {listed(names)}" for words, names in lists if names]
    if troubles and not (partial and new):
        raise CheckpointError(
            f"the weights of {initial.path} ({initial.origin}) do not fit the model: {'; '.join(troubles)}"
            + ("" if partial else ". init_partial=true takes what fits, and leaves the rest new")
        )
    net.load_state_dict(new, strict=False)
    words = f"{initial.path} ({initial.origin}): {len(new)} of {len(own)} tensors"
    rows = [("weights", words), ("classes", _class_words(initial, label_map))]
    if resized:
        rows.append(("tables", f"{resized} of position biases, interpolated to another size"))
    return Report(tuple(rows), tuple(troubles))


def _class_words(initial: Initial, label_map: LabelMap) -> str:
    if initial.label_map is None:
        return "the file does not name them: taken to be those of the folders, in this order"
    known = {name for name in initial.label_map.names if name in label_map.names}
    return f"{len(known)} of {label_map.num_categories} by name"


def _state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict, neither by itself nor as its 'model'")
    return state
