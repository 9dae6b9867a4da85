"""What a foreign state dict says about the model that it belongs to, in the words of our configs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detfamily.checkpoints import swin
from detfamily.checkpoints.evidence import Evidence
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
        check_count(evidence, f"transformer.{part}.layers.", fields[f"{part}.num_layers"])
    stored = {"hidden_dim": width, "num_queries": queries, "dim_feedforward": fields["model.ffn_dim"]}
    stored |= {"enc_layers": fields["encoder.num_layers"], "dec_layers": fields["decoder.num_layers"]}
    for official, value in stored.items():
        evidence.doubt(official, value)
    return fields


def check_count(evidence: Evidence, prefix: str, count: int) -> None:
    """Refuse a number of layers that a file has no tensors for: names can have any number.

    Raises:
        CheckpointError: there are fewer tensors than layers.
    """
    if count > len(evidence.state):
        raise CheckpointError(f"{evidence.source}: it has {prefix}{count - 1}, and not all before")


def backbone(evidence: Evidence) -> tuple[list[str], bool]:
    """Choices for the official backbone under ``backbone.0``, and whether it is dilated (DC5).

    Dilation of a ResNet leaves no trace in the tensors: the stored settings tell, else the file's name.
    """
    for prefix in swin.PREFIXES:
        if evidence.has(f"{prefix}patch_embed."):
            name, fields = swin.recognise(evidence, prefix)
            choices = [f"backbone={name}", *(as_override(key, value) for key, value in fields.items())]
            return choices, swin.is_dilated(evidence, prefix)
    chosen = resnet(evidence, "backbone.0.body.")
    named = "dc5" in Path(evidence.source).name.lower()
    dilated = evidence.told("backbone.dilation", "dilation", named, "the file's name says DC5" if named else "not DC5")
    return chosen, bool(dilated)


def resnet(evidence: Evidence, prefix: str) -> list[str]:
    """Choices for the ResNet behind a prefix.

    Raises:
        CheckpointError: it is none that is known here.
    """
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
    return [f"backbone={name}"] if name != "resnet152" else ["backbone=resnet101", "backbone.name=resnet152"]


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
