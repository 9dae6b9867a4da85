"""Names and settings of facebookresearch/detr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detfamily.checkpoints.adapter import Adapter, Rename
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.variant import Variant, backbone, position, transformer
from detfamily.detector import Detector

_ENCODER, _DECODER = "transformer.encoder.layers.{n}.", "transformer.decoder.layers.{n}."

BACKBONE = Rename("backbone.body.{rest}", ("backbone.0.body.{rest}",))
"""The same in all repositories of the line."""

FFN = [
    Rename("encoder.layers.{n}.ffn.linear1.{rest}", (_ENCODER + "linear1.{rest}",)),
    Rename("encoder.layers.{n}.ffn.linear2.{rest}", (_ENCODER + "linear2.{rest}",)),
    Rename("encoder.layers.{n}.attention_residual.norm.{rest}", (_ENCODER + "norm1.{rest}",)),
    Rename("encoder.layers.{n}.ffn_residual.norm.{rest}", (_ENCODER + "norm2.{rest}",)),
    Rename("decoder.layers.{n}.ffn.linear1.{rest}", (_DECODER + "linear1.{rest}",)),
    Rename("decoder.layers.{n}.ffn.linear2.{rest}", (_DECODER + "linear2.{rest}",)),
    Rename("decoder.layers.{n}.ffn_residual.norm.{rest}", (_DECODER + "norm3.{rest}",)),
]

POSITION = [
    Rename("position.row_embed.{rest}", ("backbone.1.row_embed.{rest}",)),
    Rename("position.col_embed.{rest}", ("backbone.1.col_embed.{rest}",)),
]


def dense(ours: str, official: str) -> list[Rename]:
    """A dense attention of ours against a torch.nn.MultiheadAttention of theirs."""
    return [
        Rename(f"{ours}.in_proj.weight", (f"{official}.in_proj_weight",)),
        Rename(f"{ours}.in_proj.bias", (f"{official}.in_proj_bias",)),
        Rename(f"{ours}.out_proj.{{rest}}", (f"{official}.out_proj.{{rest}}",)),
    ]


def adapter(detector: Detector) -> Adapter:
    """DETR has no choice that changes names."""
    return Adapter(
        [
            BACKBONE,
            *POSITION,
            *FFN,
            Rename("neck.levels.0.0.{rest}", ("input_proj.{rest}",)),
            *dense("encoder.layers.{n}.attention", _ENCODER + "self_attn"),
            Rename("encoder.norm.{rest}", ("transformer.encoder.norm.{rest}",)),
            *dense("decoder.layers.{n}.self_attention", _DECODER + "self_attn"),
            *dense("decoder.layers.{n}.cross_attention", _DECODER + "multihead_attn"),
            Rename("decoder.layers.{n}.self_attention_residual.norm.{rest}", (_DECODER + "norm1.{rest}",)),
            Rename("decoder.layers.{n}.cross_attention_residual.norm.{rest}", (_DECODER + "norm2.{rest}",)),
            Rename("decoder.norm.{rest}", ("transformer.decoder.norm.{rest}",)),
            Rename("query_source.pos", ("query_embed.weight",)),
            Rename("heads.class_heads.0.{rest}", ("class_embed.{rest}",)),
            Rename("heads.box_heads.0.{rest}", ("bbox_embed.{rest}",)),
        ]
    )


MARKS = (
    "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
    "class_embed.weight",
    "query_embed.weight",
)
"""Names that every file has, and no other project's file together."""

_EXPERIMENTS: dict[tuple[str | bool, ...], str] = {
    ("backbone=resnet50", False): "detr_r50_500ep",
    ("backbone=resnet50", True): "detr_r50_dc5_500ep",
    ("backbone=resnet101", False): "detr_r101_500ep",
    ("backbone=resnet101", True): "detr_r101_dc5_500ep",
}
"""The recipes of the released checkpoints."""


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors and settings belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, or a setting is of no known kind.
    """
    chosen, dilated = backbone(evidence)
    pre_norm = evidence.has("transformer.encoder.norm.")
    evidence.doubt("pre_norm", pre_norm)
    queries, width = evidence.shape("query_embed.weight", 2)
    fields = transformer(evidence, width, queries) | {"backbone.dilation": dilated}
    unusual = [*position(evidence), *["residual=pre_norm"] * pre_norm]
    experiment = _EXPERIMENTS.get((*chosen, dilated)) if not unusual else None
    choices = ("family=detr", *chosen, *unusual)
    return Variant(choices, experiment, fields, evidence.assumed, tuple(evidence.doubts))


def settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The official settings of a model of ours; those that decide what it computes."""
    model = config["model"]
    return {
        "backbone": config["backbone"].get("name", ""),
        "dilation": bool(config["backbone"].get("dilation", False)),
        "position_embedding": "learned" if hasattr(detector.position, "row_embed") else "sine",
        "enc_layers": config["encoder"]["num_layers"],
        "dec_layers": config["decoder"]["num_layers"],
        "dim_feedforward": model["ffn_dim"],
        "hidden_dim": model["embed_dim"],
        "dropout": float(model["dropout"]),
        "nheads": model["num_heads"],
        "num_queries": model["num_queries"],
        "pre_norm": config["residual"]["sublayer"]["_target_"].endswith("PreNorm"),
        "masks": False,
        "aux_loss": True,
    }
