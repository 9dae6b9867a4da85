"""Starting a training from the weights of another one: which tensors go over, and the words about it.

Two kinds of tensors may differ: class heads and embedded labels, whose rows go over by the classes' names, and learned
queries, of which as many go over as there are in both. Anything else that does not fit is an error that names it, or,
where that is asked for, keeps its initial value and is named too. Denoising may come or go then: what queries start
from is kept as far as the new model can say it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.checkpoints.adapter import listed
from detfamily.checkpoints.classes import (
    LABEL_EMBED,
    by_class,
    compare,
    from_class,
    is_class_row,
    is_first_row_special,
    move_rows,
    say_object,
)
from detfamily.checkpoints.official import computation, model_overrides, read_official, translate, unequal
from detfamily.checkpoints.read import read_file
from detfamily.data.labels import LabelMap
from detfamily.engine import checkpoint
from detfamily.errors import CheckpointError, ConfigError

_QUERIES = re.compile(r"query_source\.(pos|content|reference\.(center|size)_logit)")
_CONTENT = "query_source.content"
_PATTERNS = "patterns.weight"
_COUNTER = re.compile(r"\.num_batches_tracked$")
"""Norms that are trained have it, frozen ones do not, and the other tensors of both are the same."""


@dataclass(frozen=True)
class Initial:
    """Weights to start from, of ours or of an official file.

    Attributes:
        path: the file.
        origin: where it comes from, in words.
        weights: our names.
        label_map: what the columns of the class heads stand for; None where that is not known.
        config: of its model, resolved.
        assumed: settings in ``config`` that the file does not tell.
        fits: overrides that make a model of its kind; empty where they are not known.
        unused: averaged or trained weights that the file has, too, in words; "" where it has not.
    """

    path: Path
    origin: str
    weights: dict[str, Tensor]
    label_map: LabelMap | None
    config: dict[str, Any]
    assumed: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()
    unused: str = ""

    @property
    def has_backbone(self) -> bool:
        return any(name.startswith("backbone.") for name in self.weights)


@dataclass(frozen=True)
class Report:
    """What went over.

    Attributes:
        rows: a name and some words each: tensors, classes, queries.
        warnings: what did not go over, and what may be wrong about it.
    """

    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def read_initial(path: str | Path, averaged: bool | None = None) -> Initial:
    """Read weights to start from: a checkpoint of ours, or an official file.

    Args:
        path: the file.
        averaged: take the averaged weights (EMA), or the trained ones; None takes the averaged ones of our files, if
            they have any, and of official files those that the official code evaluates.

    Raises:
        CheckpointError: the file is missing, broken, hostile, or of nothing that can be read; or it has no averaged
            weights, and they are wanted.
        ConfigError: ``averaged`` is something else.
    """
    if averaged not in (None, True, False):
        raise ConfigError(f"init_ema={averaged!r}: expected true, false or null")
    path = checkpoint.require(path)
    content = read_file(path)
    if checkpoint.is_ours(content):
        return _read_ours(checkpoint.check(content, path), path, averaged)
    file = read_official(content, path, averaged)
    found = translate(file)
    assumed, fits = tuple(found.variant.assumed), model_overrides(found.variant)
    words = f"of {found.repository}" + ", averaged" * bool(file.averaged)
    unused = _unused(file.averaged)
    return Initial(path, words, found.weights, found.label_map, found.config, assumed, fits, unused)


def _read_ours(state: Mapping[str, Any], path: Path, averaged: bool | None) -> Initial:
    there = bool(state.get("ema"))
    if averaged and not there:
        raise CheckpointError(
            f"{path} has no averaged weights: it was trained without optimizer.ema_decay. Without init_ema=true, its "
            "trained ones are taken"
        )
    taken = there and averaged is not False
    weights = state["ema"]["model"] if taken else state["model"]
    if not isinstance(state["config"].get("detector"), Mapping):
        raise CheckpointError(f"{path} is damaged: its config has no detector")
    stored = state.get("origin")
    origin: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
    words = f"from {origin['repository']}" if "repository" in origin else "a checkpoint of detfamily"
    label_map = LabelMap.from_state_dict(state["label_map"])
    assumed, fits = (tuple(origin.get(key, ())) for key in ("assumed", "fits"))
    return Initial(path, words, weights, label_map, state["config"], assumed, fits, _unused(taken if there else None))


def _unused(averaged: bool | None) -> str:
    """What of a file's two sets of weights is left, from which one was taken; None where there is one only."""
    if averaged is None:
        return ""
    if averaged:
        return "the averaged weights are taken; the file has the trained ones, too (init_ema=false)"
    return "the trained weights are taken; the file has averaged ones, too (init_ema=true)"


def start_from(
    detector: nn.Module, initial: Initial, config: Mapping[str, Any], label_map: LabelMap, partial: bool = False
) -> Report:
    """Put the weights into a detector, as far as they fit, and say so.

    Args:
        detector: with its initial values.
        initial: the weights.
        config: of the detector, resolved.
        label_map: of the data that it will be trained on.
        partial: leave initial values where a tensor is missing or of another shape, instead of an error.

    Raises:
        CheckpointError: tensors that do not fit (each by name, with what would make them fit); or nothing fits.
    """
    own = detector.state_dict()
    weights = {name: value for name, value in initial.weights.items() if name in own or not _COUNTER.search(name)}
    agnostic = [say_object(one) for one in (initial.config, config)]
    new, wrong, equal, queries = {}, [], 0, ""
    for name, target in own.items():
        if name not in weights:
            continue
        given = weights[name]
        if is_class_row(name) and initial.label_map != label_map:
            special = [one and is_first_row_special(name) for one in agnostic]
            moved = _class_rows(name, given, target, initial.label_map, label_map, special[1])
            if moved is None or special[0] != special[1]:
                wrong.append(f"{name} {list(given.shape)}, a class head of another kind than {list(target.shape)}")
            else:
                new[name] = moved
        elif given.shape == target.shape:
            new[name], equal = given, equal + 1
        elif _QUERIES.fullmatch(name) and (fitted := _same_width(name, given, target)) is not None:
            count = min(len(given), len(target))
            new[name] = torch.cat([fitted[:count].to(target.dtype), target[count:]])
            if len(given) != len(target):
                queries = f"the first {count} of {len(given)}" + f", {len(target) - count} new" * (len(target) > count)
        else:
            wrong.append(f"{name} {list(given.shape)}, expected {list(target.shape)}")
    missing = [name for name in own if name not in weights and not _COUNTER.search(name)]
    left = [name for name in weights if name not in own]
    _refuse(initial, config, missing, left, wrong, bool(new), partial)
    content, kept = "", True
    if all(_starts_empty(one) or _CONTENT in tensors for one, tensors in ((initial.config, weights), (config, own))):
        content, kept = _keep_content(weights, own, new)
    detector.load_state_dict(new, strict=False)

    rows = [("weights", f"{initial.path} ({initial.origin}): {equal} of {len(own)} tensors as they are")]
    if initial.unused:
        rows.append(("averaging", initial.unused))
    if initial.label_map != label_map:
        rows.append(("classes", _class_words(initial, label_map)))
    if queries:
        rows.append(("queries", queries))
    if content and kept:
        rows.append(("content", content))
    lists = (("stay as they were drawn", missing), ("are left out", left), ("are skipped for their shape", wrong))
    warnings = [f"{len(names)} tensors {words}: {listed(names, 6)}" for words, names in lists if names]
    if content and not kept:
        warnings.append(f"the queries' content {content}")
    if other := _other_settings(initial, config):
        warnings.append(f"the weights of {initial.path} were trained with other settings: {listed(other, 6)}")
    return Report(tuple(rows), tuple(warnings))


def _same_width(name: str, given: Tensor, target: Tensor) -> Tensor | None:
    """Learned queries in the width of the target; None if they are of another kind.

    Content has a channel less with denoising, which marks its copies there: elsewhere the mark is zero.
    """
    more = target.shape[-1] - given.shape[-1]
    if given.ndim != target.ndim or (more and (name != _CONTENT or abs(more) != 1)):
        return None
    return F.pad(given, (0, more))


def _keep_content(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], new: dict[str, Tensor]) -> tuple[str, bool]:
    """Have queries start from what they start from in the file, where one of the two models denoises.

    Args:
        weights: of the file.
        own: initial values of the detector.
        new: what goes over; changed here.

    Returns:
        What the content is now in words, "" where there is nothing to say; and whether it is what it was.
    """
    if (_CONTENT in weights) != (_CONTENT in own) or (LABEL_EMBED in weights) == (LABEL_EMBED in own):
        return "", True
    if _CONTENT in own:
        if _CONTENT not in new or weights[_CONTENT].shape[-1] == own[_CONTENT].shape[-1]:
            return "", True
        if LABEL_EMBED in weights:
            return "as before, with zero in the last channel, where denoising had its mark", True
        return "goes over without the last channel, where denoising has its mark", False
    if LABEL_EMBED in own:
        new[LABEL_EMBED] = torch.cat([own[LABEL_EMBED][:-1], torch.zeros_like(own[LABEL_EMBED][-1:])])
        return 'zero as before: so is the embedding of "unknown", the others are as they were drawn', True
    unknown = F.pad(weights[LABEL_EMBED][-1], (0, 1))
    if _PATTERNS in new and new[_PATTERNS].shape[1:] == unknown.shape:
        new[_PATTERNS] = new[_PATTERNS] + unknown
        return 'as before: the embedding of "unknown" is added to the patterns', True
    return 'is no longer the embedding of "unknown", which has no place without denoising', False


def _starts_empty(config: Mapping[str, Any]) -> bool:
    """Whether queries bring no content: those that the encoder proposes always do."""
    return "class_head" not in config["detector"]["query_source"]


def _class_rows(
    name: str, given: Tensor, target: Tensor, theirs: LabelMap | None, ours: LabelMap, first_row_special: bool
) -> Tensor | None:
    """The head's tensor with the rows that go over; None if it is a head of another kind."""
    if theirs is None:
        unknown = name == LABEL_EMBED and given.shape[1:] == target.shape[1:]
        return torch.cat([target[:-1], given[-1:].to(target.dtype)]) if unknown else target
    rows, own = by_class(name, given, theirs.num_classes), by_class(name, target, ours.num_classes)
    no_object = [tensor.shape[0] - one.num_classes for tensor, one in ((rows, theirs), (own, ours))]
    if rows.shape[1:] != own.shape[1:] or no_object[0] != no_object[1] or no_object[0] < 0:
        return None
    return from_class(name, move_rows(rows, theirs, own, ours, first_row_special), target)


def _class_words(initial: Initial, label_map: LabelMap) -> str:
    if initial.label_map is None:
        return (
            "the file does not say which, so the class heads start anew; to keep rows, convert it first: "
            f"detfamily convert {initial.path} NAME.pt categories=ANNOTATIONS.json"
        )
    found = compare(initial.label_map, label_map)
    words = [f"{len(found.known)} of {label_map.num_categories} by name{_in_brackets(found.known)}"]
    if found.new:
        words.append(f"{len(found.new)} new{_in_brackets(found.new)}")
    if found.dropped:
        words.append(f"{len(found.dropped)} of the checkpoint are not needed")
    return "; ".join(words)


def _in_brackets(names: tuple[str, ...]) -> str:
    return f" ({listed(names, 6)})" if names else ""


def _refuse(
    initial: Initial,
    config: Mapping[str, Any],
    missing: list[str],
    left: list[str],
    wrong: list[str],
    anything: bool,
    partial: bool,
) -> None:
    lists = (("missing", missing), ("not in this model", left), ("of another shape", wrong))
    troubles = [f"{words}: {listed(names)}" for words, names in lists if names]
    if not troubles or (partial and anything):
        return
    text = f"the weights of {initial.path} ({initial.origin}) do not fit the model: " + "; ".join(troubles)
    if initial.fits:
        text += f". They fit {' '.join(initial.fits)}"
    elif other := _other_settings(initial, config):
        text += f". Settings that differ: {listed(other, 6)}"
    raise CheckpointError(text + ("" if partial else ". init_partial=true takes what fits, and leaves the rest new"))


def _other_settings(initial: Initial, config: Mapping[str, Any]) -> list[str]:
    """Where the model computes something else from the same tensors; what the file does not tell is not compared."""
    guessed = [_last_part(key) for key in initial.assumed]
    guessed += [".num_points"] * (".num_heads" in guessed)  # told from tensors that have a row for each of both
    guessed += [".temperature_x"] * (".temperature" in guessed)
    told, now = (
        {key: value for key, value in computation(one).items() if not key.endswith(tuple(guessed))}
        for one in (initial.config, config)
    )
    return unequal(told, now, "{key} was {0}, now {1}")


def _last_part(key: str) -> str:
    """By what a setting of the config's groups is known in the detector that is made of them."""
    group, _, name = key.rpartition(".")
    return f".{group.rpartition('.')[2]}.{name}" if name == "_target_" else f".{name}"
