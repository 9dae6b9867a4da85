from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detfamily.build import build_detector
from detfamily.config import build, compose
from detfamily.detector import Detector
from detfamily.parity.case import Case
from detfamily.parity.families import (
    conditional_detr,
    dab_deformable_detr,
    dab_detr,
    deformable_detr,
    detr,
    dino,
    dn_dab_deformable_detr,
    dn_dab_detr,
)

FAMILIES = {
    "detr": detr,
    "deformable_detr": deformable_detr,
    "conditional_detr": conditional_detr,
    "dab_detr": dab_detr,
    "dab_deformable_detr": dab_deformable_detr,
    "dn_detr": dn_dab_detr,
    "dn_deformable_detr": dn_dab_deformable_detr,
    "dino": dino,
}
LOSS = {"loss_ce_coef": 1, "bbox_loss_coef": 5, "giou_loss_coef": 2, "cls_loss_coef": 2, "focal_alpha": 0.25}
COST = {"set_cost_class": 1, "set_cost_bbox": 5, "set_cost_giou": 2, "eos_coef": 0.1, "dropout": 0.1}
NOISE = {"scalar": 5, "label_noise_scale": 0.2, "box_noise_scale": 0.4}
SWINS = {"swin_L_384_22k": "swin_l_384_22k"}
"""Official name of a backbone -> ours, where they differ."""


@pytest.fixture(scope="session")
def official_detector() -> Callable[..., Detector]:
    """Build our detector from official arguments, as the golden cases do, with random weights.

    A backbone on the meta device has names, shapes and freezing, and costs no time.
    """

    def make(family: str, args: dict[str, Any], columns: int, meta_backbone: bool = False) -> Detector:
        everything = {**COST, **LOSS, **NOISE, **args}
        everything["backbone"] = SWINS.get(everything["backbone"], everything["backbone"])
        info = {"args": everything, "matcher_and_loss": {**everything, "weight_dict": {"loss_ce": 1, "loss_ce_enc": 1}}}
        cfg = compose("train", FAMILIES[family].overrides(Case(Path(), info, {}, {})))
        with torch.device("meta"):
            backbone = build(cfg.backbone) if meta_backbone else None
        return build_detector(cfg, columns - (family == "detr"), pretrained=False, backbone=backbone)

    return make


@pytest.fixture(scope="session")
def stored_json(goldens: Path) -> Callable[[str], dict[str, Any]]:
    """Read a json file of the golden cases."""

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((goldens / name).read_text(encoding="utf-8"))
        return content

    return read
