"""Names and settings of DAB-Deformable-DETR (IDEA-Research/DAB-DETR) and of denoising on it (IDEA-Research/DN-DETR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detfamily.checkpoints import deformable_detr
from detfamily.checkpoints.adapter import Adapter, Rename
from detfamily.checkpoints.dab_detr import anchor_fields, anchor_settings, anchors
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.variant import Variant, backbone, position
from detfamily.detector import Detector
from detfamily.errors import CheckpointError


def adapter(detector: Detector) -> Adapter:
    """Deformable DETR's names, and those of anchors, patterns and labels."""
    return Adapter(
        [
            Rename("query_source.content", ("tgt_embed.weight",)),
            Rename("patterns.weight", ("patterns_embed.weight",)),
            Rename("decoder.query_position.scale.mlp.{rest}", ("transformer.decoder.query_scale.{rest}",)),
            *anchors(detector),
            *deformable_detr.adapter(detector).rules,
        ]
    )


MARKS = (
    *deformable_detr.MARKS,
    "transformer.decoder.ref_point_head.layers.0.weight",
    "transformer.decoder.query_scale.layers.0.weight",
    "tgt_embed.weight",
    "refpoint_embed.weight",
)
"""The last two are not in files of two stages."""

_EXPERIMENTS = ("dab_deformable_detr_r50_v2", "dn_deformable_detr_r50")
"""The recipes of the released checkpoints, without and with denoising."""


def variant(evidence: Evidence) -> Variant:
    """The model that official tensors and settings belong to.

    Raises:
        CheckpointError: a tensor is missing that tells, a setting is of no known kind, or a variant that has no
            counterpart here.
    """
    _refuse_dino(evidence)
    chosen, dilated = backbone(evidence)
    refine, two_stage = deformable_detr.stages(evidence)
    denoise, learned = evidence.has("label_enc."), position(evidence)
    levels, width = evidence.shape("transformer.level_embed", 2)
    if two_stage:
        queries = deformable_detr.num_proposals(evidence)
        evidence.doubts.append(
            "it has two stages with anchors, at which the official code stops at the first image: nobody trained it"
        )
    else:
        queries = evidence.shape("refpoint_embed.weight", 2)[0]
    fields = deformable_detr.sampling_transformer(evidence, levels, width, queries, dropout=0.0)
    fields |= {"backbone.dilation": dilated, **anchor_fields(evidence, "patterns_embed.weight")}
    evidence.doubt("modelname", f"{'dn_' if denoise else ''}dab_deformable_detr")
    unusual = [*["decoder=plain"] * (not refine), *["query_source=proposals"] * two_stage, *learned]
    published = (chosen, levels, dilated, fields["model.num_patterns"], unusual) == (
        ["backbone=resnet50"],
        4,
        False,
        0,
        [],
    )
    return Variant(
        (f"family={'dn' if denoise else 'dab'}_deformable_detr", *chosen, *unusual),
        _EXPERIMENTS[denoise] if published else None,
        fields,
        evidence.assumed,
        tuple(evidence.doubts),
    )


def _refuse_dino(evidence: Evidence) -> None:
    """DINO's beginnings in DN-DETR's repository are another model than DINO, under the same names as this one."""
    learned = evidence.has("transformer.tgt_embed.")
    if learned or evidence.args.get("modelname") == "dn_dab_dino_deformable_detr":
        raise CheckpointError(
            f"{evidence.source} is a file of dn_dab_dino_deformable_detr in DN-DETR's repository, a model between this "
            f"one and DINO ({'it has transformer.tgt_embed' if learned else 'its stored setting modelname says so'}), "
            "for which there is no adapter; files of DINO itself can be read"
        )


def settings(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
    """The official settings of a model of ours; those that decide what it computes."""
    common = deformable_detr.settings(config, detector)
    return common | anchor_settings(config, detector, "dab_deformable_detr")
