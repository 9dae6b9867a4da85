"""Names of facebookresearch/detr."""

from __future__ import annotations

from detfamily.checkpoints.adapter import Adapter, Rename
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
