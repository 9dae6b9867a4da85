"""Names and settings of DINO (IDEA-Research/DINO).

Heads are listed once per decoder layer, also where all layers share one, and again in the decoder; those of the
proposals have names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detfamily.backbones.swin import Swin
from detfamily.blocks.proposals import ProposalQueries
from detfamily.checkpoints import deformable_detr, swin
from detfamily.checkpoints.adapter import Adapter, Rename, Rule
from detfamily.checkpoints.dab_detr import SLOPES, activation, anchors, encoder_norm, layer_settings, temperatures
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.variant import IN_TRAINING, Variant, backbone, position
from detfamily.detector import Detector
from detfamily.errors import CheckpointError


def adapter(detector: Detector) -> Adapter:
    """Deformable DETR's names, and those of heads, proposals and noised copies."""
    source = detector.query_source
    anchored = [_in_transformer(rule) for rule in anchors(detector)]
    return Adapter(
        [
            *_heads(detector, "class"),
            *_heads(detector, "box"),
            *([] if isinstance(source, ProposalQueries) else anchored[:1]),
            *anchored[1:],
            Rename("query_source.content", ("transformer.tgt_embed.weight",)),
            Rename("query_source.size_logit", ("transformer.two_stage_wh_embedding.weight",)),
            Rename("decoder.norm.{rest}", ("transformer.decoder.norm.{rest}",)),
            Rename("encoder.norm.{rest}", ("transformer.encoder.norm.{rest}",)),
            *SLOPES,
            *(swin.rules() if isinstance(detector.backbone, Swin) else []),
            *deformable_detr.adapter(detector).rules,
        ]
    )


def _heads(detector: Detector, kind: str) -> list[Rule]:
    """The class or box heads of layers and proposals."""
    official = {"class": "class_embed", "box": "bbox_embed"}[kind]
    shared = detector.heads.shared if kind == "class" else detector.heads.shared_boxes
    count = len(detector.decoder.layers)
    proposals = (f"transformer.enc_out_{official}.{{rest}}",)
    own = getattr(detector.query_source, f"{kind}_head", None) is not None
    rules: list[Rule] = [Rename(f"query_source.{kind}_head.{{rest}}", proposals)] if own else []
    borrowed = isinstance(detector.query_source, ProposalQueries) and not own
    for index in range(1 if shared else count):
        layers = range(count) if shared else [index]
        places = [f"{place}{official}.{n}.{{rest}}" for place in ("", "transformer.decoder.") for n in layers]
        rules.append(Rename(f"heads.{kind}_heads.{index}.{{rest}}", (*places, *(proposals if borrowed else ()))))
    return rules


def _in_transformer(rule: Rule) -> Rule:
    """DAB-DETR's anchors, which are the transformer's in this code."""
    if isinstance(rule, Rename):
        places = tuple(name.replace("refpoint_embed", "transformer.refpoint_embed") for name in rule.official)
        return Rename(rule.ours, places)
    return type(rule)(rule.ours, rule.official.replace("refpoint_embed", "transformer.refpoint_embed"), rule.dim)


MARKS = (
    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
    "transformer.decoder.ref_point_head.layers.0.weight",
    "transformer.decoder.norm.weight",
    "transformer.decoder.class_embed.0.weight",
    "class_embed.0.weight",
    "label_enc.weight",
)
"""Names that every file has, of one and of two stages, with any number of levels."""

LABEL_BOOK = "label_enc.weight"
"""Embedded labels: as many rows as the largest label that anyone thought of, and one more, which nobody reads."""

PUBLISHED = {
    ("backbone=resnet50", (3, 4, 5), 4): "dino_r50_4scale_12ep",
    ("backbone=resnet50", (2, 3, 4, 5), 5): "dino_r50_5scale_12ep",
    ("backbone=swin_l_384_22k", (3, 4, 5), 4): "dino_swin_l_4scale_12ep",
    ("backbone=swin_l_384_22k", (2, 3, 4, 5), 5): "dino_swin_l_5scale_12ep",
}
"""Backbone, its maps, and levels -> the first recipe of the model; those that train longer have the same."""

_FOREIGN = {
    "label_embedding.": "decoder layers that look at class embeddings (decoder_sa_type 'ca_label')",
    "transformer.decoder.layers.0.self_attn.sampling_offsets.": "decoder layers that sample twice (decoder_sa_type "
    "'ca_content')",
    "transformer.pat_embed_for_2stage": "patterns of proposals (two_stage_pat_embed)",
    "refpoint_embed.": "learned anchors beside proposals (two_stage_add_query_num)",
    "transformer.encoder.layers.0.norm_channel.": "attention between channels (add_channel_attention)",
}
"""Beginnings of names that the official code knows and nothing here does, with what they are of."""

_FEW = 50
"""Below it, the official ``dn_number`` is half the number of groups, and no longer that of near copies."""

_EXPECTED = {
    "decoder_sa_type": "sa",
    "decoder_module_seq": ["sa", "ca", "ffn"],
    "two_stage_pat_embed": 0,
    "two_stage_add_query_num": 0,
    "add_channel_attention": False,
    "use_deformable_box_attn": False,
}
"""Settings that have one value here."""


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors and settings belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, a setting is of no known kind, or a variant that has no
            counterpart here.
    """
    _refuse(evidence)
    chosen, dilated = backbone(evidence)
    stages, levels = _levels(evidence)
    width = evidence.shape("class_embed.0.weight", 2)[1]
    two_stage = evidence.has("transformer.enc_output.")
    fields = deformable_detr.sampling_transformer(evidence, levels, width, _queries(evidence, two_stage), dropout=0.0)
    learned = position(evidence)
    fields |= {
        "model.stages": stages,
        "backbone.dilation": dilated,
        "ffn.activation._target_": f"torch.nn.{activation(evidence)}",
        "postprocess.num_select": evidence.told("postprocess.num_select", "num_select", 300, "300, as published"),
        "decoder.look_forward": not evidence.told(
            "decoder.look_forward", "use_detached_boxes_dec_out", False, IN_TRAINING
        ),
        **({} if learned else temperatures(evidence)),
        **_swin_fields(evidence, chosen),
        **_denoising(evidence),
    }
    shared = _shared_heads(evidence, fields["decoder.num_layers"])
    fields |= shared | (_selection(evidence, shared, levels) if two_stage else _anchors(evidence))
    evidence.doubt("two_stage_type", "standard" if two_stage else "no")
    unusual = [*learned, *encoder_norm(evidence, width), *["level_embed=none"] * (levels == 1)]
    choices = ("family=dino", *chosen, *["query_source=content_anchors"] * (not two_stage), *unusual)
    common = two_stage and not unusual and not dilated and _as_published(fields)
    experiment = PUBLISHED.get((" ".join(chosen), tuple(stages), levels)) if common else None
    return Variant(choices, experiment, fields, evidence.assumed, tuple(evidence.doubts))


def _refuse(evidence: Evidence) -> None:
    """Name what has no counterpart here; warn where that mattered in training alone."""
    found = [words for name, words in _FOREIGN.items() if evidence.has(name)]
    found += [
        f"{name}={evidence.args[name]!r}, expected {value!r},"
        for name, value in _EXPECTED.items()
        if evidence.args.get(name, value) != value and not any(name in words for words in found)
    ]
    numbers = evidence.args.get("dec_layer_number")
    if isinstance(numbers, list) and set(numbers) != {evidence.args.get("num_queries")}:
        found.append("fewer queries in later decoder layers (dec_layer_number)")
    if evidence.args.get("two_stage_type") == "no" and evidence.args.get("num_patterns"):
        found.append("patterns of learned anchors (num_patterns), at which the official code stops, too,")
    if found:
        raise CheckpointError(f"{evidence.source} is a file of DINO with {found[0]} for which there is nothing here")
    evidence.doubt("modelname", "dino")
    evidence.doubt("dn_labelbook_size", evidence.shape(LABEL_BOOK, 2)[0] - 1)
    if evidence.args.get("decoder_layer_noise"):
        evidence.doubts.append("it was trained with noise between decoder layers (decoder_layer_noise), unknown here")
    suppression = evidence.args.get("nms_iou_threshold", -1)
    if isinstance(suppression, (int, float)) and suppression > 0:
        evidence.doubts.append(
            f"its stored setting nms_iou_threshold is {suppression}: boxes were suppressed whatever their class; here "
            "nothing is, unless postprocess.nms_iou says so, and then class by class"
        )


def _levels(evidence: Evidence) -> tuple[list[int], int]:
    """Maps of the backbone, and levels in all: those that no map gives are made of the last one by strides of 2."""
    levels = max(1, evidence.count("input_proj."))
    kernels = [evidence.shape(f"input_proj.{level}.0.weight", 4)[-1] for level in range(levels)]
    maps = kernels.index(3) if 3 in kernels else levels
    if not 1 <= maps <= 4 or kernels != [1] * maps + [3] * (levels - maps):
        raise CheckpointError(
            f"{evidence.source}: input_proj has kernels of {kernels}, expected 1 for each map of the backbone (4 at "
            "most), then 3 for each further level"
        )
    evidence.doubt("return_interm_indices", list(range(4 - maps, 4)))
    return list(range(6 - maps, 6)), levels


def _swin_fields(evidence: Evidence, chosen: list[str]) -> dict[str, Any]:
    if not chosen[0].startswith("backbone=swin") or "use_checkpoint" not in evidence.args:
        return {}
    key = "backbone.gradient_checkpointing"
    return {key: evidence.told(key, "use_checkpoint", False, IN_TRAINING)}


def _queries(evidence: Evidence, two_stage: bool) -> int:
    """How many, by the first tensor that has a row for each; proposals whose content is their own have none."""
    for name in ("transformer.tgt_embed.weight", *([] if two_stage else ["transformer.refpoint_embed.weight"])):
        if name in evidence.state or not two_stage:
            return evidence.shape(name, 2)[0]
    number: int = evidence.told("model.num_queries", "num_queries", 900, "900 proposals, as published")
    return number


def _shared_heads(evidence: Evidence, layers: int) -> dict[str, Any]:
    """Whether decoder layers share heads; where copies are equal, as at the start of a training, settings tell."""
    shared = {}
    for kind in ("class", "bbox"):
        same = all(evidence.same(f"{kind}_embed.{layer}.", f"{kind}_embed.0.") for layer in range(1, layers))
        shared[kind] = _told_sharing(evidence, f"dec_pred_{kind}_embed_share", same)
    boxes = None if shared["class"] == shared["bbox"] else shared["bbox"]
    return {"heads.shared": shared["class"], "heads.shared_boxes": boxes}


def _told_sharing(evidence: Evidence, official: str, same: bool) -> bool:
    if not same:
        evidence.doubt(official, False)
    return same and evidence.args.get(official) is not False


def _selection(evidence: Evidence, heads: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """How the encoder's tokens become queries.

    Raises:
        CheckpointError: what the official code refuses to build.
    """
    if levels == 1:
        raise CheckpointError(f"{evidence.source} has two stages with one level, which DINO's code does not have")
    learned = "transformer.tgt_embed.weight" in evidence.state
    evidence.doubt("embed_init_tgt", learned)
    size = "transformer.two_stage_wh_embedding.weight" in evidence.state
    evidence.doubt("two_stage_learn_wh", size)
    fields = {
        "query_source.content": "learned" if learned else "memory",
        "query_source.learn_size": size,
        "query_source.answer_all": evidence.told(
            "query_source.answer_all", "two_stage_keep_all_tokens", False, IN_TRAINING
        ),
    }
    everything_shared = heads["heads.shared"] and heads["heads.shared_boxes"] is None
    for kind, ours in (("class", "class_head"), ("bbox", "box_head")):
        same = evidence.same(f"transformer.enc_out_{kind}_embed.", f"{kind}_embed.0.")
        if not evidence.has(f"transformer.enc_out_{kind}_embed.") and not everything_shared:
            raise CheckpointError(
                f"{evidence.source} is incomplete: it has no transformer.enc_out_{kind}_embed, a copy of the decoder's "
                "head only where all layers share their heads"
            )
        if everything_shared and _told_sharing(evidence, f"two_stage_{kind}_embed_share", same):
            fields[f"query_source.{ours}"] = None
    return fields


def _anchors(evidence: Evidence) -> dict[str, Any]:
    """Anchors that should stay where they were drawn were trained all the same: the official code freezes a copy."""
    key = "query_source.reference.random_centers"
    return {
        key: evidence.told(key, "random_refpoints_xy", False, IN_TRAINING),
        "query_source.reference.freeze_centers": False,
    }


def _denoising(evidence: Evidence) -> dict[str, Any]:
    """The noised copies; what the official code makes of unusual numbers has names of its own here."""
    number = evidence.told("denoising.num_queries", "dn_number", 100, IN_TRAINING)
    used = evidence.told("denoising.own_group", "use_dn", True, IN_TRAINING) and number > 0
    if not used:
        evidence.doubts.append(
            "it was trained with use_dn=False (or dn_number=0), by which the official code lets one group of copies "
            "through to the matching, answers in hand; denoising.own_group=false stands for that, and a further "
            "training with it is spoilt, too: for a cure add denoising.own_group=true denoising.num_groups=null"
        )
    few = 2 * number if number < _FEW else None
    return {
        "denoising.num_queries": max(1, 2 * number),
        "denoising.num_groups": few if used else 1,
        "denoising.own_group": used,
        "denoising.label_noise": 0.5 * evidence.told("denoising.label_noise", "dn_label_noise_ratio", 0.5, IN_TRAINING),
        "denoising.corner_noise": evidence.told("denoising.corner_noise", "dn_box_noise_scale", 1.0, IN_TRAINING),
    }


def _as_published(fields: Mapping[str, Any]) -> bool:
    unusual = ("query_source.class_head", "query_source.box_head")
    mixed = fields["query_source.content"] == "learned" and not fields["query_source.learn_size"]
    shared = fields["heads.shared"] and fields["heads.shared_boxes"] is None
    return shared and mixed and fields["denoising.own_group"] and not any(name in fields for name in unusual)


def settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The official settings of a model of ours; those that decide what it is."""
    source, two_stage = config["query_source"], isinstance(detector.query_source, ProposalQueries)
    heads = detector.heads
    common = deformable_detr.settings(config, detector)
    return {
        **{key: value for key, value in common.items() if key not in ("with_box_refine", "two_stage")},
        **layer_settings(config, detector),
        **_EXPECTED,
        "modelname": "dino",
        "return_interm_indices": [stage - 2 for stage in config["model"]["stages"]],
        **_backbone_settings(config, detector),
        "query_dim": 4,
        "num_patterns": 0,
        "random_refpoints_xy": bool((source.get("reference") or {}).get("random_centers", False)),
        "two_stage_type": "standard" if two_stage else "no",
        "embed_init_tgt": source.get("content", "learned") == "learned",
        "two_stage_learn_wh": bool(source.get("learn_size", False)),
        "two_stage_keep_all_tokens": bool(source.get("answer_all", False)),
        "two_stage_class_embed_share": two_stage and source.get("class_head") is None,
        "two_stage_bbox_embed_share": two_stage and source.get("box_head") is None,
        "dec_pred_class_embed_share": heads.shared,
        "dec_pred_bbox_embed_share": heads.shared_boxes,
        "dec_layer_number": None,
        "use_detached_boxes_dec_out": not detector.decoder.look_forward,
        "num_select": config["postprocess"].get("num_select", 300),
        "nms_iou_threshold": -1,
        **_denoising_settings(config["denoising"] or {}),
    }


def _backbone_settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    if not isinstance(detector.backbone, Swin):
        return {}
    return {
        "backbone": swin.name_for(config["backbone"], of_dino=True),
        "use_checkpoint": config["backbone"]["gradient_checkpointing"],
    }


def _denoising_settings(denoising: Mapping[str, Any]) -> dict[str, Any]:
    """The nearest official ones: more groups than objects ask for exist only up to 98, and copies only from 100."""
    copies, groups = denoising.get("num_queries", 200), denoising.get("num_groups")
    used = bool(denoising.get("own_group", True))
    number = max(_FEW, -(-copies // 2))
    if used and groups is not None:
        number = min(_FEW - 1, -(-groups // 2))
    return {
        "use_dn": used,
        "dn_number": number,
        "dn_label_noise_ratio": 2.0 * denoising.get("label_noise", 0.25),
        "dn_box_noise_scale": float(denoising.get("corner_noise", 1.0)),
    }
