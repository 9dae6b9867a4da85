"""What a foreign state dict says about the model that it belongs to, in the words of our configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detfamily.checkpoints import swin
from detfamily.errors import CheckpointError

IN_TRAINING = "in training only"
"""Why a setting may be assumed without a word about it."""


@dataclass(frozen=True)
class Variant:
    """A model in our words.

    Attributes:
        choices: what ``detfamily train`` needs to choose its blocks ("family=detr", "backbone=resnet50", ...).
        experiment: the published recipe of this model, or None.
        fields: settings and their values; those that the chosen blocks have anyway are among them.
        assumed: of the fields, those that neither tensors nor stored settings tell, with a few words each.
        doubts: where stored settings and tensors contradict each other; the tensors decide.
    """

    choices: tuple[str, ...]
    experiment: str | None
    fields: dict[str, Any]
    assumed: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


class Evidence:
    """The tensors of a state dict and the settings stored beside them, asked with clear errors.

    Args:
        state: official names.
        args: the official settings; empty where the file has none.
        source: the file, for messages.
        num_heads: of the attentions, where the user says it; otherwise the settings tell.
    """

    def __init__(
        self, state: Mapping[str, Tensor], args: Mapping[str, Any], source: str, num_heads: int | None = None
    ) -> None:
        self.state, self.source = state, source
        self.args = dict(args) if num_heads is None else {**args, "nheads": num_heads}
        self.assumed: dict[str, str] = {}
        self.doubts: list[str] = []

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that every file of its kind has.

        Raises:
            CheckpointError: it is missing, or has another number of axes.
        """
        if name not in self.state:
            raise CheckpointError(f"{self.source} is incomplete: {name} is missing, which tells what model it is")
        shape = tuple(self.state[name].shape)
        if len(shape) != dims or 0 in shape:
            raise CheckpointError(f"{self.source}: {name} has the shape {list(shape)}, expected {dims} axes")
        return shape

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts so."""
        return any(name.startswith(prefix) for name in self.state)

    def count(self, prefix: str) -> int:
        """How many numbered parts follow a prefix: the largest number + 1."""
        numbers = [name.removeprefix(prefix).partition(".")[0] for name in self.state if name.startswith(prefix)]
        return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)

    def same(self, prefix: str, other: str) -> bool:
        """Whether the tensors under two prefixes are equal, as far as both are there: copies may be left out."""
        pairs = ((name, other + name.removeprefix(prefix)) for name in self.state if name.startswith(prefix))
        return all(torch.equal(self.state[one], self.state[two]) for one, two in pairs if two in self.state)

    def told(self, key: str, official: str, default: Any, why: str) -> Any:
        """A setting that no tensor tells: the stored one, else a default that is reported under ``key``.

        Raises:
            CheckpointError: the stored one is of another kind than the default.
        """
        if official not in self.args:
            self.assumed[key] = why
            return default
        value = self.args[official]
        wrong = type(value) is not type(default) and not (isinstance(default, float) and type(value) is int)
        if wrong or (not isinstance(default, (bool, str)) and not value >= 0) or (type(value) is int and value > 10**6):
            raise CheckpointError(
                f"{self.source}: its stored setting {official} is {value!r}, expected something like {default!r}"
            )
        return value

    def doubt(self, official: str, value: Any) -> None:
        """Note where a stored setting says something else than the tensors."""
        stored = self.args.get(official, value)
        if stored != value:
            self.doubts.append(f"its stored setting {official} is {stored!r}, its tensors are of {value!r}")


def transformer(evidence: Evidence, width: int, queries: int, dropout: float = 0.1) -> dict[str, Any]:
    """The settings that a transformer of any family has.

    Args:
        evidence: of the file.
        width: of its tokens.
        queries: how many are learned, or taken as proposals.
        dropout: the family's, where the file does not tell.
    """
    fields = {
        "model.embed_dim": width,
        "model.num_heads": evidence.told("model.num_heads", "nheads", 8, "8 heads, as published"),
        "model.ffn_dim": evidence.shape("transformer.encoder.layers.0.linear1.weight", 2)[0],
        "model.dropout": evidence.told("model.dropout", "dropout", dropout, IN_TRAINING),
        "model.num_queries": queries,
        "encoder.num_layers": evidence.count("transformer.encoder.layers."),
        "decoder.num_layers": evidence.count("transformer.decoder.layers."),
    }
    for part in ("encoder", "decoder"):
        if (count := fields[f"{part}.num_layers"]) > len(evidence.state):  # names can have any number
            last = f"transformer.{part}.layers.{count - 1}"
            raise CheckpointError(f"{evidence.source}: it has {last}, and not all before")
    stored = {"hidden_dim": width, "num_queries": queries, "dim_feedforward": fields["model.ffn_dim"]}
    stored |= {"enc_layers": fields["encoder.num_layers"], "dec_layers": fields["decoder.num_layers"]}
    for official, value in stored.items():
        evidence.doubt(official, value)
    return fields


def backbone(evidence: Evidence) -> tuple[list[str], bool]:
    """Choices for the official backbone under ``backbone.0``, and whether it is dilated (DC5).

    Dilation of a ResNet leaves no trace in the tensors: the stored settings tell, else the file's name.
    """
    for prefix in swin.PREFIXES:
        if evidence.has(f"{prefix}patch_embed."):
            name, fields = swin.recognise(evidence, prefix)
            choices = [f"backbone={name}", *(as_override(key, value) for key, value in fields.items())]
            return choices, swin.is_dilated(evidence, prefix)
    prefix = "backbone.0.body."
    depth = evidence.count(f"{prefix}layer3.")
    bottleneck = f"{prefix}layer1.0.conv3.weight" in evidence.state
    names = {6: "resnet50", 23: "resnet101", 36: "resnet152"} if bottleneck else {2: "resnet18", 6: "resnet34"}
    if depth not in names:
        raise CheckpointError(
            f"{evidence.source}: no ResNet that is known here has {depth} blocks in {prefix}layer3 (18: 2, 34 and 50: "
            "6, 101: 23, 152: 36)"
        )
    name = names[depth]
    if bottleneck:
        width, inputs = evidence.shape(f"{prefix}layer1.0.conv2.weight", 4)[:2]
        if (name, width, inputs) == ("resnet101", 256, 4):
            name = "resnext101_64x4d"
        elif (width, inputs) != (64, 64):
            raise CheckpointError(f"{evidence.source}: its backbone has blocks of {width} x {inputs}, of no known kind")
    evidence.doubt("backbone", name)
    chosen = [f"backbone={name}"] if name != "resnet152" else ["backbone=resnet101", "backbone.name=resnet152"]
    named = "dc5" in Path(evidence.source).name.lower()
    dilated = evidence.told("backbone.dilation", "dilation", named, "the file's name says DC5" if named else "not DC5")
    return chosen, bool(dilated)


def position(evidence: Evidence) -> list[str]:
    """The choice of learned codes of position, where there are some; nothing for a family's own sines."""
    learned = evidence.has("backbone.1.row_embed.")
    stored = evidence.args.get("position_embedding")
    if stored is not None and (stored in ("learned", "v3")) != learned:
        evidence.doubts.append(f"its stored setting position_embedding is {stored!r}, its tensors say otherwise")
    return ["position=learned"] * learned


def columns(evidence: Evidence, name: str, no_object: bool) -> int:
    """Columns of the class head, without the one of "no object"."""
    rows = evidence.shape(name, 2)[0] - no_object
    if rows < 1:
        raise CheckpointError(f"{evidence.source}: {name} has no row for any class")
    return rows


def as_override(key: str, value: Any) -> str:
    """``key=value`` as it would be typed."""
    return f"{key}={json.dumps(value, separators=(',', ':'))}"
