"""IDEA-Research/DAB-DETR, ``dab_detr``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detfamily.blocks.boxes import inverse_sigmoid
from detfamily.checkpoints.dab_detr import SCALES
from detfamily.parity import detection
from detfamily.parity.case import Case
from detfamily.parity.families import detr
from detfamily.parity.families.conditional_detr import dense_overrides


def results(case: Case, chosen: list[str] | None = None) -> dict[str, Tensor]:
    """A detector, and small functions on their own."""
    ours = detection.results(case, chosen or overrides(case)) | detr.units(case, eps=1e-6)
    if "unit.inverse_sigmoid.x" in case.io:
        ours["unit.inverse_sigmoid.y"] = inverse_sigmoid(case.io["unit.inverse_sigmoid.x"], eps=1e-3)
    return ours


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    args, loss = case.info["args"], case.loss_settings
    chosen = ["family=dab_detr", *dense_overrides(case, args.get("transformer_activation", "prelu"))]
    if args["position_embedding"] not in ("learned", "v3"):
        chosen.append(f"position.temperature={args.get('pe_temperatureH', 20)}")
        chosen.append(f"position.temperature_x={args.get('pe_temperatureW', 20)}")
    if not args.get("iter_update", True):
        chosen.append("decoder=plain")
    if args.get("bbox_embed_diff_each_layer"):
        chosen.append("heads.shared_boxes=false")
    if args.get("keep_query_pos"):
        chosen.append("cross_attention.add_query_pos=true")
    return [
        *chosen,
        *norm_after_encoder(args),
        *anchor_overrides(case),
        f"model.anchor_dim={args.get('query_dim', 4)}",
        f"query_position.modulate_wh={str(args.get('modulate_hw_attn', True)).lower()}",
        f"classification.cost.alpha={loss.get('matcher_alpha', loss['focal_alpha'])}",
        f"query_scale={SCALES[args.get('query_scale_type', 'cond_elewise')]}",
        f"postprocess.num_select={args.get('num_select', 300)}",
    ]


def norm_after_encoder(args: Mapping[str, Any]) -> list[str]:
    """Officially that is all there is to ``pre_norm``: the layers are post-norm all the same."""
    if not args.get("pre_norm"):
        return []
    width = f"+residual.encoder_norm.normalized_shape={args['hidden_dim']}"
    return ["residual.encoder_norm._target_=torch.nn.LayerNorm", width]


def anchor_overrides(case: Case) -> list[str]:
    """Patterns, and anchors with random centres: drawn, and trained all the same, as the official code does."""
    args = case.info["args"]
    return [
        f"model.num_patterns={args.get('num_patterns', 0)}",
        f"query_source.reference.random_centers={str(args.get('random_refpoints_xy', False)).lower()}",
        "query_source.reference.freeze_centers=false",
    ]


def denoising_overrides(case: Case) -> list[str]:
    """The settings of denoising, after its choice."""
    args = case.info["args"]
    return [
        f"denoising.num_groups={args['scalar']}",
        f"denoising.label_noise={args['label_noise_scale']}",
        f"denoising.center_noise={args['box_noise_scale']}",
    ]
