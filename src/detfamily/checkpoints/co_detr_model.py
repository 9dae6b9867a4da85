"""What a file of Co-DETR (Sense-X/Co-DETR) says about its model, and what such a file has to say about one of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from detfamily.auxiliary.atss import ATSS
from detfamily.auxiliary.faster_rcnn import FasterRCNN
from detfamily.backbones.swin import Swin
from detfamily.checkpoints import swin
from detfamily.checkpoints.adapter import listed
from detfamily.checkpoints.co_detr import LABEL_BOOK, TRANSFORMER
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.mmcv import Place
from detfamily.checkpoints.variant import Variant, as_override, check_count, resnet
from detfamily.detector import Detector
from detfamily.errors import CheckpointError

_QUERY_HEAD = ("model", "query_head")
_LAYER = (*_QUERY_HEAD, "transformer", "encoder", "transformerlayers", "attn_cfgs")
_NOISE = (*_QUERY_HEAD, "dn_cfg", "noise_scale")

PLACES: dict[str, Place] = {
    "nheads": (*_LAYER, "num_heads"),
    "temperature": (*_QUERY_HEAD, "positional_encoding", "temperature"),
    "offset": (*_QUERY_HEAD, "positional_encoding", "offset"),
    "look_forward_twice": (*_QUERY_HEAD, "transformer", "decoder", "look_forward_twice"),
    "label_noise": (*_NOISE, "label"),
    "box_noise": (*_NOISE, "box"),
    "num_dn_queries": (*_QUERY_HEAD, "dn_cfg", "group_cfg", "num_dn_queries"),
    "with_attn_mask": ("model", "with_attn_mask"),
    "finest_scale": ("model", "roi_head", 0, "bbox_roi_extractor", "finest_scale"),
    "drop_path_rate": ("model", "backbone", "drop_path_rate"),
    "use_checkpoint": ("model", "backbone", "use_checkpoint"),
    "max_per_img": ("model", "test_cfg", 0, "max_per_img"),
    "nms_type": ("model", "test_cfg", 0, "nms", "type"),
    "nms_iou": ("model", "test_cfg", 0, "nms", "iou_threshold"),
}
"""Settings that no tensor tells -> where they stand in the config that a file may hold."""

_PUBLISHED = {
    ("co_dino", "resnet50", 6, 900, ""): "co_dino_r50_5scale_12ep",
    ("co_dino", "resnet50", 6, 900, "lsj"): "co_dino_r50_5scale_lsj_12ep",
    ("co_dino", "resnet50", 9, 900, "lsj"): "co_dino_r50_5scale_9enc_lsj_12ep",
    ("co_dino", "swin_l_384_22k", 6, 900, ""): "co_dino_swin_l_5scale_12ep",
    ("co_dino", "swin_l_384_22k", 6, 900, "lsj"): "co_dino_swin_l_5scale_lsj_12ep",
    ("co_dino", "swin_l_384_22k", 6, 900, "o365"): "co_dino_swin_l_5scale_o365_16ep",
    ("co_deformable_detr", "resnet50", 6, 300, ""): "co_deformable_detr_r50_12ep",
    ("co_deformable_detr", "swin_t", 6, 300, ""): "co_deformable_detr_swin_t_12ep",
    ("co_deformable_detr", "swin_s", 6, 300, ""): "co_deformable_detr_swin_s_12ep",
    ("co_deformable_detr", "swin_b_384_22k", 6, 300, ""): "co_deformable_detr_swin_b_12ep",
    ("co_deformable_detr", "swin_l_384_22k", 6, 300, ""): "co_deformable_detr_swin_l_12ep",
    ("co_deformable_detr", "swin_l_384_22k", 6, 900, ""): "co_deformable_detr_swin_l_900q_36ep",
}
"""Family, backbone, encoder layers, queries, and images -> the first recipe; those that train longer have the same."""

_MASKS = re.compile(r"(roi_head\.\d+\.)?(mask_head|mask_iou_head)\.")


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors, and settings if there are some, belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, a setting is of no known kind, or a variant that has no
            counterpart here.
    """
    _refuse(evidence)
    family = "co_dino" if evidence.has(f"{TRANSFORMER}decoder.ref_point_head.") else "co_deformable_detr"
    backbone = _backbone(evidence)
    heads = _heads(evidence)
    fields = _transformer(evidence, family) | _positions(evidence) | _of_backbone(evidence)
    fields |= _answers(evidence, family, fields["model.num_queries"])
    unusual = [] if len(heads) == 2 else [f"auxiliary={heads[0] if heads else 'none'}"]
    if heads:
        fields |= _auxiliary(evidence, heads)
    if LABEL_BOOK in evidence.state:
        fields |= _denoising(evidence)
    elif family == "co_dino":
        unusual.append("denoising=none")
    kind = (family, backbone[0].partition("=")[2], fields["encoder.num_layers"], fields["model.num_queries"])
    experiment = None if unusual or len(backbone) > 1 else _PUBLISHED.get((*kind, _images(evidence)))
    choices = (f"family={family}", *backbone, *unusual)
    return Variant(choices, experiment, fields, evidence.assumed, tuple(evidence.doubts))


def _refuse(evidence: Evidence) -> None:
    """Name what has no counterpart here."""
    start = f"{evidence.source} is a file of Co-DETR"
    if masks := [name for name in evidence.state if _MASKS.match(name)]:
        raise CheckpointError(
            f"{start} that learns masks, which have no counterpart here: {len(masks)} tensors ({listed(masks, 3)}). "
            "Take a checkpoint without them"
        )
    if not evidence.has("backbone.patch_embed.norm.") and not evidence.has("backbone.layer1."):
        found = [name for name in evidence.state if name.startswith("backbone.")]
        raise CheckpointError(
            f"{start} whose backbone is neither a ResNet nor a Swin; others, such as its Vision Transformer (ViT-L), "
            f"have no counterpart here: {listed(found, 3) or 'there is no tensor of one'}"
        )
    if evidence.has(f"{TRANSFORMER}reference_points."):
        raise CheckpointError(
            f"{start} of one stage ({TRANSFORMER}reference_points), which no published configuration has; expected "
            "queries that the encoder proposes"
        )


def _backbone(evidence: Evidence) -> list[str]:
    if evidence.has("backbone.layer1."):
        return resnet(evidence, "backbone.")
    name, fields = swin.recognise(evidence, "backbone.")
    return [f"backbone={name}", *(as_override(key, value) for key, value in fields.items())]


def _of_backbone(evidence: Evidence) -> dict[str, Any]:
    """How a Swin was trained, where that is stored."""
    known: dict[str, tuple[str, Any]] = {
        "backbone.drop_path": ("drop_path_rate", 0.2),
        "backbone.gradient_checkpointing": ("use_checkpoint", False),
    }
    return {
        key: evidence.told(key, official, default, "")
        for key, (official, default) in known.items()
        if official in evidence.args
    }


def _transformer(evidence: Evidence, family: str) -> dict[str, Any]:
    levels, width = evidence.shape(f"{TRANSFORMER}level_embeds", 2)
    heads = evidence.told("model.num_heads", "nheads", 8, "8 heads, as published")
    maps = evidence.count("neck.convs.")
    if not 1 <= maps <= 4:
        raise CheckpointError(f"{evidence.source}: it has {maps} maps of the backbone (neck.convs), expected 1 to 4")
    content = "transformer.query_embed" if family == "co_dino" else "query_embedding"
    counts = {part: evidence.count(f"{TRANSFORMER}{part}.layers.") for part in ("encoder", "decoder")}
    points = {}
    for part, attention in (("encoder", 0), ("decoder", 1)):
        check_count(evidence, f"{TRANSFORMER}{part}.layers.", counts[part])
        name = f"{TRANSFORMER}{part}.layers.0.attentions.{attention}.attention_weights.weight"
        points[part], left = divmod(evidence.shape(name, 2)[0], heads * levels)
        if left:
            raise CheckpointError(
                f"{evidence.source}: the rows of {name} are not a multiple of {heads * levels} (heads times levels): "
                "say how many heads the model has, model.num_heads=..."
            )
    return {
        "model.embed_dim": width,
        "model.num_heads": heads,
        "model.ffn_dim": evidence.shape(f"{TRANSFORMER}encoder.layers.0.ffns.0.layers.0.0.weight", 2)[0],
        "model.num_queries": evidence.shape(f"query_head.{content}.weight", 2)[0],
        "model.num_levels": levels,
        "model.stages": list(range(6 - maps, 6)),
        "model.num_points": points["encoder"],
        "cross_attention.num_points": points["decoder"],
        "encoder.num_layers": counts["encoder"],
        "decoder.num_layers": counts["decoder"],
    }


def _positions(evidence: Evidence) -> dict[str, Any]:
    """What differs from the family's own, where it is stored."""
    known = {
        "position.temperature": ("temperature", 20.0),
        "position.offset": ("offset", 0.0),
        "decoder.look_forward": ("look_forward_twice", True),
    }
    found = {}
    for key, (official, default) in known.items():
        if official in evidence.args:
            value = evidence.args[official]
            found[key] = float(value) if isinstance(default, float) and type(value) in (int, float) else value
    return found


def _answers(evidence: Evidence, family: str, queries: int) -> dict[str, Any]:
    """How many detections an image has, and what suppresses others."""
    if family == "co_dino":
        if (kind := evidence.args.get("nms_type", "soft_nms")) != "soft_nms":
            evidence.doubts.append(
                f"its stored setting nms is of the type {kind!r}: here boxes are suppressed by soft-NMS, unless "
                "postprocess.nms_iou=... postprocess.soft_nms_iou=null say otherwise"
            )
        return {
            "postprocess.max_detections": evidence.told(
                "postprocess.max_detections", "max_per_img", 300, "300, as published"
            ),
            "postprocess.soft_nms_iou": evidence.told(
                "postprocess.soft_nms_iou", "nms_iou", 0.8, "soft-NMS at 0.8, as published"
            ),
        }
    published = 300 if queries == 900 else 100
    key = "postprocess.num_select"
    return {key: evidence.told(key, "max_per_img", published, f"{published}, as published")}


def _heads(evidence: Evidence) -> list[str]:
    """Auxiliary heads, in the order in which the official code counts them."""
    there = {FasterRCNN.name: ("rpn_head.", "roi_head."), ATSS.name: ("bbox_head.",)}
    return [name for name, prefixes in there.items() if any(map(evidence.has, prefixes))]


def _auxiliary(evidence: Evidence, heads: list[str]) -> dict[str, Any]:
    """What tensors tell of the heads and of how their positives become queries."""
    place = {name: f"auxiliary.{index}" if len(heads) > 1 else "auxiliary" for index, name in enumerate(heads)}
    become_queries = evidence.has(f"{TRANSFORMER}aux_pos_trans.")
    fields: dict[str, Any] = {"collaboration.positive_queries": become_queries}
    if become_queries:
        fields["collaboration.features"] = evidence.has(f"{TRANSFORMER}pos_feats_trans.")
    if evidence.has(f"{TRANSFORMER}head_pos_embed."):
        numbers = evidence.shape(f"{TRANSFORMER}head_pos_embed.weight", 2)[1]
        fields["collaboration.head_code"] = "scalar" if numbers == 1 else "vector"
    if FasterRCNN.name in place:
        rows, inputs = evidence.shape("roi_head.0.bbox_head.shared_fcs.0.weight", 2)
        fields["model.region_dim"] = rows
        width = evidence.shape("rpn_head.rpn_conv.weight", 4)[1]
        fields[f"{place[FasterRCNN.name]}.roi.resolution"] = isqrt(inputs // width)
        if "finest_scale" in evidence.args:
            fields["model.region_scale"] = float(evidence.told("", "finest_scale", 56.0, ""))
    if ATSS.name in place:
        fields[f"{place[ATSS.name]}.depth"] = evidence.count("bbox_head.0.cls_convs.")
    return fields


def _denoising(evidence: Evidence) -> dict[str, Any]:
    """How copies were noised, where that is stored."""
    known = {
        "denoising.label_noise": ("label_noise", 0.5, 0.5),
        "denoising.corner_noise": ("box_noise", 1.0, 1.0),
        "denoising.num_queries": ("num_dn_queries", 100, 2),
    }
    return {
        key: factor * evidence.told(key, official, default, "")
        for key, (official, default, factor) in known.items()
        if official in evidence.args
    }


def _images(evidence: Evidence) -> str:
    """How images were made ready: "" as DETR's, "lsj", "o365"; by the stored config, or else by the file's name."""
    name = Path(evidence.source).name.lower()
    if "o365tococo" in name:
        return "o365"
    # without the mask, padding counts as image: so in the squares of large-scale jitter alone
    return "lsj" if not evidence.args.get("with_attn_mask", "lsj" not in name) else ""


def settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The official settings of a model of ours; those that decide what it is."""
    postprocess, denoising, position = config["postprocess"], config["denoising"], config["position"]
    dino = not detector.decoder.query_position.reads_pos
    found = {
        "nheads": config["model"]["num_heads"],
        "temperature": position.get("temperature"),
        "offset": position.get("offset"),
        "look_forward_twice": None if dino else bool(detector.decoder.look_forward),
        "max_per_img": postprocess.get("max_detections") if dino else postprocess.get("num_select"),
        "nms_type": None if postprocess.get("soft_nms_iou") is None else "soft_nms",
        "nms_iou": postprocess.get("soft_nms_iou"),
        "finest_scale": config["model"]["region_scale"] if detector.auxiliary is not None else None,
    }
    if denoising is not None:
        found |= {
            "label_noise": 2.0 * denoising.get("label_noise", 0.25),
            "box_noise": float(denoising.get("corner_noise", 1.0)),
            "num_dn_queries": denoising.get("num_queries", 200) // 2,
        }
    if isinstance(detector.backbone, Swin):
        found["drop_path_rate"] = config["backbone"]["drop_path"]
        found["use_checkpoint"] = config["backbone"]["gradient_checkpointing"]
    return {key: value for key, value in found.items() if value is not None}
