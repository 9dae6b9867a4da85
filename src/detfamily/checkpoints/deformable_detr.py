"""Names and settings of fundamentalvision/Deformable-DETR.

Heads are listed once per decoder layer there, also where all layers share one; with refinement the decoder lists the
box heads again, with two stages the class heads too; the heads of the proposals are the ones after the last layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detfamily.blocks.proposals import ProposalQueries
from detfamily.checkpoints import detr
from detfamily.checkpoints.adapter import Adapter, Join, Rename, Rule
from detfamily.checkpoints.detr import BACKBONE, FFN, POSITION, dense
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.variant import Variant, backbone, position, transformer
from detfamily.detector import Detector
from detfamily.errors import CheckpointError

_ENCODER, _DECODER = "transformer.encoder.layers.{n}.", "transformer.decoder.layers.{n}."


def adapter(detector: Detector) -> Adapter:
    """Rules for the heads and queries that this detector has."""
    num_layers = len(detector.decoder.layers)
    two_stage = isinstance(detector.query_source, ProposalQueries)
    return Adapter([*_heads(num_layers, detector.heads.shared, detector.decoder.refine, two_stage), *_blocks()])


def _heads(num_layers: int, shared: bool, refine: bool, two_stage: bool) -> list[Rule]:
    class_places = ["", "transformer.decoder."] if two_stage else [""]
    box_places = ["", "transformer.decoder."] if refine else [""]

    def named(head: str, places: Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"{place}{head}.{layer}.{{rest}}" for place in places for layer in layers)

    rules: list[Rule] = []
    if two_stage:
        rules += [
            Rename("query_source.class_head.{rest}", named("class_embed", class_places, [num_layers])),
            Rename("query_source.box_head.{rest}", named("bbox_embed", box_places, [num_layers])),
        ]
    for index in range(1 if shared else num_layers):
        layers = range(num_layers) if shared else [index]
        rules += [
            Rename(f"heads.class_heads.{index}.{{rest}}", named("class_embed", class_places, layers)),
            Rename(f"heads.box_heads.{index}.{{rest}}", named("bbox_embed", box_places, layers)),
        ]
    return rules


def _blocks() -> list[Rule]:
    return [
        BACKBONE,
        *POSITION,
        *FFN,
        Rename("neck.levels.{n}.{rest}", ("input_proj.{n}.{rest}",)),
        Rename("level_embed.weight", ("transformer.level_embed",)),
        Rename("encoder.layers.{n}.attention.{rest}", (_ENCODER + "self_attn.{rest}",)),
        *dense("decoder.layers.{n}.self_attention", _DECODER + "self_attn"),
        Rename("decoder.layers.{n}.cross_attention.{rest}", (_DECODER + "cross_attn.{rest}",)),
        Rename("decoder.layers.{n}.cross_attention_residual.norm.{rest}", (_DECODER + "norm1.{rest}",)),
        Rename("decoder.layers.{n}.self_attention_residual.norm.{rest}", (_DECODER + "norm2.{rest}",)),
        Join(("query_source.pos", "query_source.content"), "query_embed.weight", dim=1),
        Rename("query_source.reference.{rest}", ("transformer.reference_points.{rest}",)),
        Rename("query_source.memory_proj.{rest}", ("transformer.enc_output.{rest}",)),
        Rename("query_source.memory_norm.{rest}", ("transformer.enc_output_norm.{rest}",)),
        Rename("query_source.pos_proj.{rest}", ("transformer.pos_trans.{rest}",)),
        Rename("query_source.pos_norm.{rest}", ("transformer.pos_trans_norm.{rest}",)),
    ]


MARKS = (
    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
    "class_embed.0.weight",
    "transformer.level_embed",
)
"""Names that every file has, and no other project's file together, unless it has names of its own besides."""

_EXPERIMENTS = {
    ("backbone=resnet50",): "deformable_detr_r50",
    ("backbone=resnet50", "decoder=refine"): "deformable_detr_r50_refine",
    ("backbone=resnet50", "decoder=refine", "query_source=proposals"): "deformable_detr_r50_two_stage",
    ("backbone=resnet101", "decoder=refine", "query_source=proposals"): "deformable_detr_r101_two_stage",
    ("backbone=resnext101_64x4d", "decoder=refine", "query_source=proposals"): "deformable_detr_x101_two_stage",
}
"""The recipes with four levels."""


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors and settings belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, a setting is of no known kind, or a variant that has no
            counterpart here.
    """
    chosen, dilated = backbone(evidence)
    refine, two_stage = stages(evidence)
    blocks = (*(["decoder=refine"] * refine), *(["query_source=proposals"] * two_stage))
    levels, width = evidence.shape("transformer.level_embed", 2)
    queries = num_proposals(evidence) if two_stage else evidence.shape("query_embed.weight", 2)[0]
    fields = sampling_transformer(evidence, levels, width, queries) | {"backbone.dilation": dilated}
    unusual = position(evidence)
    choices = ("family=deformable_detr", *chosen, *blocks, *unusual)
    experiment = None if unusual else _experiment((*chosen, *blocks), levels, dilated)
    return Variant(choices, experiment, fields, evidence.assumed, tuple(evidence.doubts))


def stages(evidence: Evidence) -> tuple[bool, bool]:
    """Whether each layer refines the boxes of the one before, and whether the encoder proposes the first ones.

    Raises:
        CheckpointError: proposals without refinement.
    """
    refine, two_stage = evidence.has("transformer.decoder.bbox_embed."), evidence.has("transformer.enc_output.")
    if two_stage and not refine:
        raise CheckpointError(
            f"{evidence.source}: two stages without box refinement (transformer.enc_output.weight, but no "
            "transformer.decoder.bbox_embed) have no counterpart here"
        )
    evidence.doubt("with_box_refine", refine)
    evidence.doubt("two_stage", two_stage)
    return refine, two_stage


def num_proposals(evidence: Evidence) -> int:
    """How many of the encoder's boxes become queries, of which no tensor is as long."""
    number: int = evidence.told("model.num_queries", "num_queries", 300, "300 proposals, as published")
    return number


def _experiment(choices: tuple[str, ...], levels: int, dilated: bool) -> str | None:
    if levels > 1:
        return None if dilated else _EXPERIMENTS.get(choices)
    return "deformable_detr_r50_single_scale" + "_dc5" * dilated if choices == ("backbone=resnet50",) else None


def sampling_transformer(
    evidence: Evidence, levels: int, width: int, queries: int, dropout: float = 0.1
) -> dict[str, Any]:
    """The settings of a transformer that samples its maps."""
    fields = transformer(evidence, width, queries, dropout)
    points = {
        part: _points(
            evidence,
            f"transformer.{part}.layers.0.{name}.attention_weights.weight",
            fields["model.num_heads"] * levels,
        )
        for part, name in (("encoder", "self_attn"), ("decoder", "cross_attn"))
    }
    for official, value in (
        ("num_feature_levels", levels),
        ("enc_n_points", points["encoder"]),
        ("dec_n_points", points["decoder"]),
    ):
        evidence.doubt(official, value)
    return fields | {
        "model.num_levels": levels,
        "model.stages": [3, 4, 5] if levels > 1 else [5],
        "model.num_points": points["encoder"],
        "cross_attention.num_points": points["decoder"],
    }


def _points(evidence: Evidence, name: str, heads_times_levels: int) -> int:
    rows = evidence.shape(name, 2)[0]
    if rows % heads_times_levels:
        raise CheckpointError(
            f"{evidence.source}: {name} has {rows} rows, which are not a multiple of {heads_times_levels} (heads times "
            "levels): say how many heads the model has, model.num_heads=..."
        )
    return rows // heads_times_levels


def settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The official settings of a model of ours; those that decide what it computes."""
    common = {key: value for key, value in detr.settings(config, detector).items() if key != "pre_norm"}
    return common | {
        "num_feature_levels": config["model"]["num_levels"],
        "enc_n_points": _points_of(config["encoder_attention"]),
        "dec_n_points": _points_of(config["cross_attention"]),
        "with_box_refine": detector.decoder.refine,
        "two_stage": isinstance(detector.query_source, ProposalQueries),
    }


def _points_of(attention: Any) -> int:
    """Of other attentions, and of a list of them, there is no official number."""
    return int(attention.get("num_points", 0)) if isinstance(attention, Mapping) else 0
