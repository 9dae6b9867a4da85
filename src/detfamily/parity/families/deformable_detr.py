"""fundamentalvision/Deformable-DETR."""

from __future__ import annotations

import math

from torch import Tensor

from detfamily.blocks.boxes import inverse_sigmoid
from detfamily.blocks.position import sine_code
from detfamily.parity import detection
from detfamily.parity.case import Case
from detfamily.parity.families import detr


def results(case: Case) -> dict[str, Tensor]:
    """A detector, and small functions on their own."""
    return detection.results(case, overrides(case)) | units(case)


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    args, loss = case.info["args"], case.loss_settings
    levels = args["num_feature_levels"]
    chosen = detr.backbone_overrides(case)
    chosen.append(f"model.stages={[3, 4, 5] if levels > 1 else [5]}".replace(" ", ""))
    if chosen[0] == "backbone=small":
        chosen[-1] = "model.stages=[3]"
    if args.get("with_box_refine"):
        chosen.append("decoder=refine")
    if args.get("two_stage"):
        chosen.append("query_source=proposals")
    # without auxiliary losses the official weights have no entry for the proposals, so they are not trained
    proposals = 1.0 if "loss_ce_enc" in loss["weight_dict"] else 0.0
    return [
        "family=deformable_detr",
        *chosen,
        f"position={'learned' if args['position_embedding'] in ('learned', 'v3') else 'sine_centered'}",
        f"model.embed_dim={args['hidden_dim']}",
        f"model.num_heads={args['nheads']}",
        f"model.ffn_dim={args['dim_feedforward']}",
        f"model.dropout={args['dropout']}",
        f"model.num_queries={args['num_queries']}",
        f"model.num_levels={levels}",
        f"encoder_attention.num_points={args['enc_n_points']}",
        f"cross_attention.num_points={args['dec_n_points']}",
        f"encoder.num_layers={args['enc_layers']}",
        f"decoder.num_layers={args['dec_layers']}",
        f"criterion.aux_loss={str(args.get('aux_loss', True)).lower()}",
        f"criterion.groups.proposals.weight={proposals}",
        f"criterion.matcher.weights.class={loss['set_cost_class']}",
        f"criterion.matcher.weights.l1={loss['set_cost_bbox']}",
        f"criterion.matcher.weights.giou={loss['set_cost_giou']}",
        f"criterion.weights.class={loss['cls_loss_coef']}",
        f"criterion.weights.l1={loss['bbox_loss_coef']}",
        f"criterion.weights.giou={loss['giou_loss_coef']}",
        f"classification.loss.alpha={loss['focal_alpha']}",
        f"classification.cost.alpha={loss.get('matcher_alpha', 0.25)}",
    ]


def units(case: Case, eps: float = 1e-5) -> dict[str, Tensor]:
    """Small functions on their own."""
    ours: dict[str, Tensor] = {}
    if "unit.inverse_sigmoid.in" in case.io:
        ours["unit.inverse_sigmoid.out"] = inverse_sigmoid(case.io["unit.inverse_sigmoid.in"], eps)
    if "unit.proposal_pos_embed.in" in case.io:
        boxes = case.io["unit.proposal_pos_embed.in"].sigmoid()
        features = case.io["unit.proposal_pos_embed.out"].shape[-1] // 4
        ours["unit.proposal_pos_embed.out"] = sine_code(boxes * (2 * math.pi), features, 10000.0).flatten(-2)
    return ours
