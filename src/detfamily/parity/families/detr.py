"""facebookresearch/detr."""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.blocks.boxes import iou_and_giou
from detfamily.checkpoints.dab_detr import ACTIVATIONS
from detfamily.parity import data_transforms, detection
from detfamily.parity.case import Case


def expected(case: Case) -> dict[str, tuple[Tensor, str]]:
    """Data cases keep the table of sizes in their json."""
    sizes = data_transforms.expected(case.info) if "data" in case.info else {}
    return {key: (value, "output") for key, value in sizes.items()}


def results(case: Case) -> dict[str, Tensor]:
    """A detector, or the data pipeline."""
    if "data" in case.info:
        return data_transforms.results(case.info, case.io)
    return detection.results(case, overrides(case)) | units(case)


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    args = case.info["args"]
    return [
        "family=detr",
        *backbone_overrides(case),
        f"position={args['position_embedding'].replace('v2', 'sine').replace('v3', 'learned')}",
        f"residual={'pre_norm' if args.get('pre_norm') else 'post_norm'}",
        *common_overrides(case, args.get("activation", "relu")),
        f"classification.loss.no_object_weight={case.loss_settings['eos_coef']}",
    ]


def backbone_overrides(case: Case) -> list[str]:
    """The real backbone, unless the case stores the maps that replace one."""
    args = case.info["args"]
    if "backbone" not in args or any(key.startswith("features.") for key in case.io):
        return ["backbone=small"]
    dilated = ["backbone.dilation=true"] if args.get("dilation") else []
    return [f"backbone={args['backbone']}", "backbone.weights=null", *dilated]


def common_overrides(case: Case, activation: str) -> list[str]:
    """What DETR and its descendants of one level have in common."""
    args, loss = case.info["args"], case.loss_settings
    return [
        f"ffn.activation._target_=torch.nn.{ACTIVATIONS[activation]}",
        f"model.embed_dim={args['hidden_dim']}",
        f"model.num_heads={args['nheads']}",
        f"model.ffn_dim={args['dim_feedforward']}",
        f"model.dropout={args['dropout']}",
        f"model.num_queries={args['num_queries']}",
        f"encoder.num_layers={args['enc_layers']}",
        f"decoder.num_layers={args['dec_layers']}",
        f"criterion.aux_loss={str(args.get('aux_loss', True)).lower()}",
        f"criterion.matcher.weights.class={loss['set_cost_class']}",
        f"criterion.matcher.weights.l1={loss['set_cost_bbox']}",
        f"criterion.matcher.weights.giou={loss['set_cost_giou']}",
        f"criterion.weights.class={loss.get('loss_ce_coef', loss['weight_dict']['loss_ce'])}",
        f"criterion.weights.l1={loss['bbox_loss_coef']}",
        f"criterion.weights.giou={loss['giou_loss_coef']}",
    ]


def units(case: Case, eps: float = 0.0) -> dict[str, Tensor]:
    """Overlaps of boxes on their own."""
    if "unit.boxes1" not in case.io:
        return {}
    iou, giou = iou_and_giou(case.io["unit.boxes1"][:, None], case.io["unit.boxes2"], eps)
    return {"unit.iou": torch.as_tensor(iou), "unit.giou": giou}
