"""Names and settings of DAB-DETR (IDEA-Research/DAB-DETR) and of DN-DETR on it (IDEA-Research/DN-DETR, dn_dab_detr).

The official class of the model knows more choices than its command line: anchors that are points, boxes that are not
refined, other scales of the positions. Tensors tell them, so they are read and written, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from detfamily.blocks.queries import LearnedQueries
from detfamily.blocks.query_scale import ElementwiseScale, LayerScale, ScalarScale
from detfamily.blocks.references import LearnedReference
from detfamily.checkpoints import detr
from detfamily.checkpoints.adapter import Adapter, Join, Rename, Rule
from detfamily.checkpoints.conditional_detr import CONDITIONAL_LAYERS
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.variant import IN_TRAINING, Variant, backbone, position, transformer
from detfamily.detector import Detector
from detfamily.errors import CheckpointError

SLOPES = [
    Rename(f"{part}.layers.{{n}}.ffn.activation.{{rest}}", (f"transformer.{part}.layers.{{n}}.activation.{{rest}}",))
    for part in ("encoder", "decoder")
]
"""Those of PReLU."""


def adapter(detector: Detector) -> Adapter:
    """Refined boxes list the box head twice; points have no size."""
    places = ["", "transformer.decoder."] if detector.decoder.refine else [""]
    return Adapter(
        [
            Rename(
                "heads.box_heads.0.{rest}" if detector.heads.shared_boxes else "heads.box_heads.{rest}",
                tuple(f"{place}bbox_embed.{{rest}}" for place in places),
            ),
            Rename("patterns.weight", ("transformer.patterns.weight",)),
            Rename("decoder.query_position.scale.weight", ("transformer.decoder.query_scale.weight",)),
            *anchors(detector),
            Rename("encoder.pos_scale.{rest}", ("transformer.encoder.query_scale.{rest}",)),
            *SLOPES,
            *CONDITIONAL_LAYERS,
        ]
    )


def anchors(detector: Detector) -> list[Rule]:
    """The anchors, what positions are made of them, and the labels of noised copies."""
    source = detector.query_source
    boxes = (
        isinstance(source, LearnedQueries)
        and isinstance(source.reference, LearnedReference)
        and source.reference.dim == 4
    )
    center, size = "query_source.reference.center_logit", "query_source.reference.size_logit"
    return [
        Join((center, size), "refpoint_embed.weight", dim=1) if boxes else Rename(center, ("refpoint_embed.weight",)),
        Rename("decoder.query_position.position_head.{rest}", ("transformer.decoder.ref_point_head.{rest}",)),
        Rename("decoder.query_position.size_head.{rest}", ("transformer.decoder.ref_anchor_head.{rest}",)),
        Rename("denoising.label_embed.weight", ("label_enc.weight",)),
    ]


MARKS = (
    "transformer.decoder.layers.0.sa_qcontent_proj.weight",
    "transformer.decoder.layers.0.ca_qcontent_proj.weight",
    "transformer.decoder.ref_point_head.layers.0.weight",
    "transformer.encoder.query_scale.layers.0.weight",
    "class_embed.weight",
    "refpoint_embed.weight",
)
DENOISING_MARK = "label_enc.weight"
"""What every file of DN-DETR has besides."""

ACTIVATIONS = {"prelu": "PReLU", "relu": "ReLU", "gelu": "GELU", "selu": "SELU"}
"""Official name -> class of torch."""

SCALES = {"cond_elewise": "elementwise", "cond_scalar": "scalar", "fix_elewise": "layer"}
"""Official name -> our choice of query_scale."""

_SCALE_OF: dict[type, str] = {ElementwiseScale: "cond_elewise", ScalarScale: "cond_scalar", LayerScale: "fix_elewise"}

_EXPERIMENTS: dict[tuple[str | bool | int, ...], tuple[str, str | None]] = {
    ("backbone=resnet50", False, 0): ("dab_detr_r50", "dn_detr_r50"),
    ("backbone=resnet50", False, 3): ("dab_detr_r50_3pat", None),
    ("backbone=resnet50", True, 0): ("dab_detr_r50_dc5", "dn_detr_r50_dc5"),
    ("backbone=resnet50", True, 3): ("dab_detr_r50_dc5_3pat", "dn_detr_r50_dc5_3pat_12ep"),
    ("backbone=resnet101", False, 0): ("dab_detr_r101", "dn_detr_r101"),
    ("backbone=resnet101", False, 3): ("dab_detr_r101_3pat", None),
    ("backbone=resnet101", True, 0): ("dab_detr_r101_dc5", "dn_detr_r101_dc5"),
    ("backbone=resnet101", True, 3): ("dab_detr_r101_dc5_3pat", "dn_detr_r101_dc5_3pat_12ep"),
}
"""Backbone, dilation and patterns -> the recipe without and with denoising."""


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors and settings belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, a setting is of no known kind, or a variant that has no
            counterpart here.
    """
    chosen, dilated = backbone(evidence)
    queries, numbers = evidence.shape("refpoint_embed.weight", 2)
    width = evidence.shape("class_embed.weight", 2)[1]
    denoise, learned, scale = evidence.has("label_enc."), position(evidence), _scale(evidence, width)
    fields = transformer(evidence, width, queries, dropout=0.0)
    fields |= {"backbone.dilation": dilated, **anchor_fields(evidence, "transformer.patterns.weight")}
    fields |= _dense_fields(evidence, numbers) | ({} if learned else temperatures(evidence))
    refine = evidence.has("transformer.decoder.bbox_embed.")
    evidence.doubt("iter_update", refine)
    scales = [] if scale == "elementwise" else [f"query_scale={scale}"]
    unusual = [*learned, *["decoder=plain"] * (not refine), *encoder_norm(evidence, width), *scales]
    fields["heads.shared_boxes"] = False if evidence.has("bbox_embed.0.") else None
    evidence.doubt("modelname", "dn_dab_detr" if denoise else "dab_detr")
    choices = (f"family={'dn' if denoise else 'dab'}_detr", *chosen, *unusual)
    experiment = None if unusual else _experiment(tuple(chosen), fields, denoise)
    return Variant(choices, experiment, fields, evidence.assumed, tuple(evidence.doubts))


def _experiment(chosen: tuple[str, ...], fields: Mapping[str, Any], denoise: bool) -> str | None:
    found = _EXPERIMENTS.get((*chosen, fields["backbone.dilation"], fields["model.num_patterns"]), (None, None))
    if found[0] == "dab_detr_r50_dc5" and fields["query_source.reference.random_centers"] and not denoise:
        return "dab_detr_r50_dc5_fixed_xy"
    return found[denoise]


def encoder_norm(evidence: Evidence, width: int) -> list[str]:
    """What ``pre_norm`` is here: officially a norm after the encoder is all, the layers are post-norm all the same."""
    found = evidence.has("transformer.encoder.norm.")
    evidence.doubt("pre_norm", found)
    if not found:
        return []
    return ["residual.encoder_norm._target_=torch.nn.LayerNorm", f"+residual.encoder_norm.normalized_shape={width}"]


def _scale(evidence: Evidence, width: int) -> str:
    """How positions are scaled by the content, by the shape of what says it."""
    prefix, kind = "transformer.decoder.query_scale.", "fix_elewise"
    if f"{prefix}weight" not in evidence.state:
        rows = evidence.shape(f"{prefix}layers.1.weight", 2)[0]
        if rows not in (1, width):
            raise CheckpointError(
                f"{evidence.source}: {prefix}layers.1.weight has {rows} rows, expected 1 (a factor) or {width} (one "
                "for each channel)"
            )
        kind = "cond_elewise" if rows == width else "cond_scalar"
    evidence.doubt("query_scale_type", kind)
    return SCALES[kind]


def _dense_fields(evidence: Evidence, numbers: int) -> dict[str, Any]:
    """Settings that the deformable line has not."""
    if numbers not in (2, 4):
        raise CheckpointError(
            f"{evidence.source}: refpoint_embed.weight has {numbers} numbers for an anchor, expected 2 for points or 4 "
            "for boxes"
        )
    modulated = evidence.has("transformer.decoder.ref_anchor_head.")
    keeps = evidence.has("transformer.decoder.layers.1.ca_qpos_proj.")
    stored = {"query_dim": numbers, "modulate_hw_attn": modulated, "keep_query_pos": keeps}
    for official, value in stored.items():
        evidence.doubt(official, value)
    return {
        "model.anchor_dim": numbers,
        "query_position.modulate_wh": modulated,
        "cross_attention.add_query_pos": keeps,
        "ffn.activation._target_": f"torch.nn.{activation(evidence)}",
        "postprocess.num_select": evidence.told("postprocess.num_select", "num_select", 300, "300, as published"),
    }


def activation(evidence: Evidence) -> str:
    """The class of torch: PReLU has a tensor of its own; of the others the settings tell."""
    if "transformer.encoder.layers.0.activation.weight" in evidence.state:
        evidence.doubt("transformer_activation", "prelu")
        return ACTIVATIONS["prelu"]
    name = evidence.told("ffn.activation._target_", "transformer_activation", "relu", "it has no slopes of PReLU")
    if name == "prelu":
        evidence.doubt("transformer_activation", "relu")
        name = "relu"
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{evidence.source}: its stored setting transformer_activation is {name!r}, expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def temperatures(evidence: Evidence) -> dict[str, Any]:
    """Those of rows and columns; no tensor tells them."""
    key = "position.temperature"
    rows = evidence.told(key, "pe_temperatureH", 20.0, "20, as published")
    columns = evidence.told(key, "pe_temperatureW", float(rows), "20, as published")
    return {key: rows, "position.temperature_x": None if rows == columns else columns}


def anchor_fields(evidence: Evidence, patterns: str) -> dict[str, Any]:
    """The settings of anchors, patterns and noised copies.

    Centres that should stay where they were drawn were trained all the same: the official code freezes a copy.
    """
    count = evidence.shape(patterns, 2)[0] if patterns in evidence.state else 0
    evidence.doubt("num_patterns", count)
    fields = {
        "model.num_patterns": count,
        "query_source.reference.random_centers": evidence.told(
            "query_source.reference.random_centers", "random_refpoints_xy", False, IN_TRAINING
        ),
        "query_source.reference.freeze_centers": False,
    }
    if evidence.has("label_enc."):
        for key, official, default in (
            ("num_groups", "scalar", 5),
            ("label_noise", "label_noise_scale", 0.2),
            ("center_noise", "box_noise_scale", 0.4),
        ):
            fields[f"denoising.{key}"] = evidence.told(f"denoising.{key}", official, default, IN_TRAINING)
    return fields


def settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The official settings of a model of ours; those that decide what it computes."""
    scale = getattr(detector.decoder.query_position, "scale", None)
    return {
        **detr.settings(config, detector),
        **anchor_settings(config, detector, "dab_detr"),
        **layer_settings(config, detector),
        "num_select": config["postprocess"].get("num_select", 300),
        "query_dim": config["model"]["anchor_dim"],
        "iter_update": detector.decoder.refine,
        "bbox_embed_diff_each_layer": not detector.heads.shared_boxes,
        "modulate_hw_attn": getattr(detector.decoder.query_position, "size_head", None) is not None,
        "keep_query_pos": bool(config["cross_attention"].get("add_query_pos", False)),
        "query_scale_type": _SCALE_OF.get(type(scale), type(scale).__name__),
    }


def layer_settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The norm after the encoder, activations and temperatures."""
    activation = ((config["ffn"] or {}).get("activation") or {}).get("_target_", "")
    names = {f"torch.nn.{ours}": official for official, ours in ACTIVATIONS.items()}
    rows = config["position"].get("temperature", 20)
    return {
        "pre_norm": isinstance(detector.encoder.norm, nn.LayerNorm),
        "transformer_activation": names.get(activation, activation),
        "pe_temperatureH": rows,
        "pe_temperatureW": config["position"].get("temperature_x") or rows,
    }


def anchor_settings(config: Mapping[str, Any], detector: Detector, model: str) -> dict[str, Any]:
    """The official settings of anchors, patterns and noised copies."""
    denoising = config["denoising"]
    reference = config["query_source"].get("reference") or {}
    return {
        "modelname": model if denoising is None else f"dn_{model}",
        "num_patterns": config["model"]["num_patterns"],
        "random_refpoints_xy": bool(reference.get("random_centers", False)),
    } | (
        {}
        if denoising is None
        else {
            "use_dn": True,
            "scalar": denoising["num_groups"],
            "label_noise_scale": float(denoising["label_noise"]),
            "box_noise_scale": float(denoising["center_noise"]),
        }
    )
