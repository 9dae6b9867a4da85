"""Names and settings of H-Deformable-DETR (HDETR/H-Deformable-DETR), which adds to Deformable DETR's.

Its files have no name of their own: learned queries beside two stages tell them, else their settings.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from detfamily.backbones.swin import Swin
from detfamily.blocks.proposals import ProposalQueries
from detfamily.checkpoints import deformable_detr, swin
from detfamily.checkpoints.adapter import Adapter, Rename
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.variant import IN_TRAINING, Variant, backbone, position
from detfamily.detector import Detector
from detfamily.errors import CheckpointError

_CONTENT = "query_embed.weight"


def adapter(detector: Detector) -> Adapter:
    """Deformable DETR's names; with two stages the learned queries are content alone."""
    learned = [Rename("query_source.content", (_CONTENT,))]
    return Adapter(
        [
            *(learned if isinstance(detector.query_source, ProposalQueries) else []),
            *(swin.rules(official=swin.PREFIXES[1]) if isinstance(detector.backbone, Swin) else []),
            *deformable_detr.adapter(detector).rules,
        ]
    )


MARKS = deformable_detr.MARKS

PUBLISHED = {
    ("backbone=resnet50", 300): "h_deformable_detr_r50_12ep",
    ("backbone=swin_t", 300): "h_deformable_detr_swin_t_12ep",
    ("backbone=swin_l", 300): "h_deformable_detr_swin_l_12ep",
    ("backbone=swin_l", 900): "h_deformable_detr_swin_l_900q_12ep",
}
"""Backbone and queries -> the first recipe of the model; those that train longer have the same."""


def tells(names: Collection[str], args: Mapping[str, Any]) -> bool:
    """Whether a file that might be of Deformable DETR is of this project."""
    return "num_queries_one2one" in args or {_CONTENT, "transformer.enc_output.weight"} <= set(names)


def is_needed(detector: Detector) -> bool:
    """Whether a Deformable DETR has something that only this project's code has."""
    source = detector.query_source
    learned = isinstance(source, ProposalQueries) and source.content is not None
    return bool(source.num_one_to_many or learned or (detector.decoder.refine and detector.decoder.look_forward))


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors and settings belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, a setting is of no known kind, or a variant that has no
            counterpart here.
    """
    scale = evidence.args.get("position_embedding_scale", 2 * math.pi)
    if not isinstance(scale, float) or not math.isclose(scale, 2 * math.pi, rel_tol=1e-6):
        raise CheckpointError(f"{evidence.source}: position_embedding_scale={scale!r}, where only 2 pi is known here")
    chosen, dilated = backbone(evidence)
    refine, two_stage = deformable_detr.stages(evidence)
    mixed = two_stage and _CONTENT in evidence.state
    if two_stage:
        evidence.doubt("mixed_selection", mixed)
    levels, width = evidence.shape("transformer.level_embed", 2)
    queries, more = _queries(evidence, two_stage and not mixed)
    fields = deformable_detr.sampling_transformer(evidence, levels, width, queries, dropout=0.0) | {
        "backbone.dilation": dilated,
        "decoder.look_forward": refine
        and evidence.told("decoder.look_forward", "look_forward_twice", mixed, IN_TRAINING),
        "postprocess.num_select": evidence.told("postprocess.num_select", "topk", 100, "100, as published"),
        **(_branch(evidence, more) if more else {}),
    }
    if chosen[0].startswith("backbone=swin") and "drop_path_rate" in evidence.args:
        fields["backbone.drop_path"] = evidence.told("backbone.drop_path", "drop_path_rate", 0.2, IN_TRAINING)
    unusual = position(evidence)
    if not mixed:
        unusual.append(f"query_source={'proposals' if two_stage else 'learned_points'}")
    unusual += [*["decoder=plain"] * (not refine), *["one_to_many=none"] * (not more)]
    choices = ("family=h_deformable_detr", *chosen, *unusual)
    published = not unusual and not dilated and levels == 4
    experiment = PUBLISHED.get((" ".join(chosen), queries)) if published else None
    return Variant(choices, experiment, fields, evidence.assumed, tuple(evidence.doubts))


def _branch(evidence: Evidence, count: int) -> dict[str, Any]:
    """The queries for training alone; without copies of the objects the official code leaves them untrained."""
    copies = evidence.told("one_to_many.repeats", "k_one2many", 6, IN_TRAINING)
    weight = evidence.told("one_to_many.weight", "lambda_one2many", 1.0, IN_TRAINING)
    return {
        "model.num_one_to_many": count,
        "one_to_many.repeats": max(1, copies),
        "one_to_many.weight": weight if copies else 0.0,
    }


def _queries(evidence: Evidence, unseen: bool) -> tuple[int, int]:
    """How many there always are, and in training besides; proposals without learned content leave no trace of it."""
    key = "model.num_queries"
    if unseen:
        first = evidence.told(key, "num_queries_one2one", 300, "300 queries, as published")
        return first, evidence.told("model.num_one_to_many", "num_queries_one2many", 0, IN_TRAINING)
    total = evidence.shape(_CONTENT, 2)[0]
    published = next((one for one in (300, 900) if one in (total, total - 1500)), total)
    first = evidence.told(key, "num_queries_one2one", published, f"{published} queries, as published")
    if first > total:
        raise CheckpointError(
            f"{evidence.source}: its stored setting num_queries_one2one is {first}, and {_CONTENT} has {total} rows"
        )
    evidence.doubt("num_queries_one2many", total - first)
    return first, total - first


def settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The official settings of a model of ours; those that decide what it is."""
    common, branch = deformable_detr.settings(config, detector), config["criterion"]["groups"]["one_to_many"]
    source = detector.query_source
    network = {}
    if isinstance(detector.backbone, Swin):
        network["backbone"] = swin.name_for(config["backbone"], of_dino=False)
        network["drop_path_rate"] = config["backbone"]["drop_path"]
    return {key: value for key, value in common.items() if key != "num_queries"} | {
        **network,
        "num_queries_one2one": source.num_queries,
        "num_queries_one2many": source.num_one_to_many,
        "mixed_selection": isinstance(source, ProposalQueries) and source.content is not None,
        "look_forward_twice": bool(detector.decoder.look_forward),
        "k_one2many": branch["repeats"],
        "lambda_one2many": float(branch["weight"]),
        "topk": config["postprocess"].get("num_select", 100),
        "position_embedding_scale": 2 * math.pi,
    }
