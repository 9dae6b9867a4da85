"""Atten4Vis/ConditionalDETR."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detfamily.blocks.boxes import inverse_sigmoid
from detfamily.parity import detection
from detfamily.parity.case import Case
from detfamily.parity.families import detr


def results(case: Case) -> dict[str, Tensor]:
    """A detector, and small functions on their own."""
    ours = detection.results(case, overrides(case)) | detr.units(case)
    if "unit.inverse_sigmoid.x" in case.io:
        ours["unit.inverse_sigmoid.y"] = inverse_sigmoid(case.io["unit.inverse_sigmoid.x"], eps=1e-5)
    return ours


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    args = case.info["args"]
    return ["family=conditional_detr", *dense_overrides(case, args.get("activation", "relu"))]


def dense_overrides(case: Case, activation: str) -> list[str]:
    """What Conditional DETR and its descendants of one level have in common, after the choice of the family."""
    args: dict[str, Any] = case.info["args"]
    loss = case.loss_settings
    return [
        *detr.backbone_overrides(case),
        f"position={'learned' if args['position_embedding'] in ('learned', 'v3') else 'sine'}",
        *detr.common_overrides(case, activation),
        f"classification.loss.alpha={loss['focal_alpha']}",
        f"classification.loss.gamma={loss.get('focal_gamma', loss.get('gamma', 2.0))}",
    ]
