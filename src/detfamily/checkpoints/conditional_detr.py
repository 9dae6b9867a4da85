"""Names and settings of Atten4Vis/ConditionalDETR."""

from __future__ import annotations

from detfamily.checkpoints.adapter import Adapter, Rename, Rule
from detfamily.checkpoints.detr import BACKBONE, FFN, POSITION, dense
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.variant import Variant, backbone, position, transformer
from detfamily.detector import Detector
from detfamily.errors import CheckpointError

_DECODER = "transformer.decoder.layers.{n}."


def _split(ours: str, official: str, kinds: dict[str, str]) -> list[Rule]:
    return [Rename(f"{ours}.{kind}.{{rest}}", (f"{official}{name}.{{rest}}",)) for kind, name in kinds.items()]


CONDITIONAL_LAYERS: list[Rule] = [
    BACKBONE,
    *POSITION,
    *FFN,
    Rename("neck.levels.0.0.{rest}", ("input_proj.{rest}",)),
    *dense("encoder.layers.{n}.attention", "transformer.encoder.layers.{n}.self_attn"),
    Rename("encoder.norm.{rest}", ("transformer.encoder.norm.{rest}",)),
    *_split(
        "decoder.layers.{n}.self_attention",
        _DECODER,
        {
            "query_content_proj": "sa_qcontent_proj",
            "query_pos_proj": "sa_qpos_proj",
            "key_content_proj": "sa_kcontent_proj",
            "key_pos_proj": "sa_kpos_proj",
            "value_proj": "sa_v_proj",
            "out_proj": "self_attn.out_proj",
        },
    ),
    *_split(
        "decoder.layers.{n}.cross_attention",
        _DECODER,
        {
            "query_content_proj": "ca_qcontent_proj",
            "query_pos_proj": "ca_qpos_proj",
            "query_sine_proj": "ca_qpos_sine_proj",
            "key_content_proj": "ca_kcontent_proj",
            "key_pos_proj": "ca_kpos_proj",
            "value_proj": "ca_v_proj",
            "out_proj": "cross_attn.out_proj",
        },
    ),
    Rename("decoder.layers.{n}.self_attention_residual.norm.{rest}", (_DECODER + "norm1.{rest}",)),
    Rename("decoder.layers.{n}.cross_attention_residual.norm.{rest}", (_DECODER + "norm2.{rest}",)),
    Rename("decoder.norm.{rest}", ("transformer.decoder.norm.{rest}",)),
    Rename("decoder.query_position.scale.mlp.{rest}", ("transformer.decoder.query_scale.{rest}",)),
    Rename("heads.class_heads.0.{rest}", ("class_embed.{rest}",)),
]
"""What Conditional DETR and DAB-DETR share."""


def adapter(detector: Detector) -> Adapter:
    """Conditional DETR has no choice that changes names."""
    return Adapter(
        [
            Rename("query_source.pos", ("query_embed.weight",)),
            Rename("query_source.reference.{rest}", ("transformer.decoder.ref_point_head.{rest}",)),
            Rename("heads.box_heads.0.{rest}", ("bbox_embed.{rest}",)),
            *CONDITIONAL_LAYERS,
        ]
    )


MARKS = (
    "transformer.decoder.layers.0.sa_qcontent_proj.weight",
    "transformer.decoder.layers.0.ca_qcontent_proj.weight",
    "transformer.decoder.ref_point_head.layers.0.weight",
    "class_embed.weight",
    "query_embed.weight",
)

_EXPERIMENTS: dict[tuple[str | bool, ...], str] = {
    ("backbone=resnet50", False): "conditional_detr_r50",
    ("backbone=resnet50", True): "conditional_detr_r50_dc5",
    ("backbone=resnet101", False): "conditional_detr_r101",
    ("backbone=resnet101", True): "conditional_detr_r101_dc5",
}
"""The recipes of the released checkpoints."""


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors and settings belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, a setting is of no known kind, or a pre-norm encoder, beside
            which the official code has no decoder.
    """
    if evidence.has("transformer.encoder.norm."):
        raise CheckpointError(
            f"{evidence.source}: a pre-norm Conditional DETR (transformer.encoder.norm.weight) has no counterpart "
            "here, nor a decoder in the official code"
        )
    chosen, dilated = backbone(evidence)
    queries, width = evidence.shape("query_embed.weight", 2)
    fields = transformer(evidence, width, queries) | {"backbone.dilation": dilated}
    unusual = position(evidence)
    experiment = _EXPERIMENTS.get((*chosen, dilated)) if not unusual else None
    choices = ("family=conditional_detr", *chosen, *unusual)
    return Variant(choices, experiment, fields, evidence.assumed, tuple(evidence.doubts))
