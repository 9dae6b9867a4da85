"""IDEA-Research/DAB-DETR, ``dab_deformable_detr``."""

from __future__ import annotations

from torch import Tensor

from detfamily.blocks.boxes import iou_and_giou, to_cxcywh
from detfamily.blocks.query_position import anchor_code
from detfamily.parity import detection
from detfamily.parity.case import Case
from detfamily.parity.families import deformable_detr
from detfamily.parity.families.dab_detr import anchor_overrides


def results(case: Case, chosen: list[str] | None = None) -> dict[str, Tensor]:
    """A detector, and small functions on their own."""
    return detection.results(case, chosen or overrides(case)) | units(case)


def units(case: Case) -> dict[str, Tensor]:
    """Small functions on their own."""
    ours = deformable_detr.units(case, eps=1e-3)
    if (boxes := case.io.get("unit.generalized_box_iou.boxes1")) is not None:
        others = case.io["unit.generalized_box_iou.boxes2"]
        _, ours["unit.generalized_box_iou.out"] = iou_and_giou(to_cxcywh(boxes)[:, None], to_cxcywh(others), eps=1e-6)
    if (anchors := case.io.get("unit.gen_sineembed_for_position.in")) is not None:
        ours["unit.gen_sineembed_for_position.out"] = anchor_code(anchors, 256)
    return ours


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    chosen = ["family=dab_deformable_detr", *deformable_detr.overrides(case)[1:]]
    if not case.info["args"].get("with_box_refine", True):
        chosen.append("decoder=plain")
    return [*chosen, *([] if case.info["args"].get("two_stage") else anchor_overrides(case))]
