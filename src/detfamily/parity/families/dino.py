"""IDEA-Research/DINO."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from detfamily.blocks.denoising import Denoising
from detfamily.build import with_num_classes
from detfamily.checkpoints.dab_detr import ACTIVATIONS
from detfamily.config import build, compose
from detfamily.parity import contrastive, denoising, detection, dino_functions
from detfamily.parity.case import Case
from detfamily.parity.families import deformable_detr
from detfamily.parity.families.dab_detr import norm_after_encoder
from detfamily.structures import Targets

expected = denoising.expected


def results(case: Case) -> dict[str, Tensor]:
    """A detector in training or evaluation, its functions on their own, or its noise alone."""
    if any(key.startswith("in.") for key in case.io):
        return dino_functions.results(case)
    if "label_enc.weight" in case.weights and not any(key.startswith(("features.", "images.")) for key in case.io):
        return _noise_alone(case)
    ours = _without_denoising(case) | detection.results(case, overrides(case))
    if case.info["args"]["two_stage_keep_all_tokens"] and "out.interm.pred_boxes" in ours:
        # the official code forgets the sigmoid there, and so cannot be trained with that option
        ours["out.interm.pred_boxes"] = ours["out.interm.pred_boxes"].logit()
    return ours


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    args, loss = case.info["args"], case.loss_settings
    levels, maps = args["num_feature_levels"], len(args["return_interm_indices"])
    common = deformable_detr.overrides(case)[1:]
    return [
        "family=dino",
        *(one for one in common if not one.startswith(("position=", "query_source=", "decoder=", "model.stages="))),
        f"model.stages={list(range(6 - maps, 6))}".replace(" ", ""),
        f"model.num_levels={levels}",
        *([] if levels > 1 else ["level_embed=none"]),
        *_position(args),
        *norm_after_encoder(args),
        f"ffn.activation._target_=torch.nn.{ACTIVATIONS[args.get('transformer_activation', 'relu')]}",
        *_selection(args),
        *_heads(args),
        *contrastive.overrides(args),
        *([] if args["use_dn"] and args["dn_number"] else ["denoising.num_groups=1", "denoising.own_group=false"]),
        f"decoder.look_forward={str(not args.get('use_detached_boxes_dec_out', False)).lower()}",
        f"criterion.groups.proposals.weight={args['interm_loss_coef']}",
        *(["criterion.groups.proposals.left_out=[l1,giou]"] if args.get("no_interm_box_loss") else []),
        f"classification.cost.alpha={loss['focal_alpha']}",
        f"postprocess.num_select={args['num_select']}",
    ]


def _position(args: dict[str, object]) -> list[str]:
    if args["position_embedding"] in ("learned", "v3"):
        return ["position=learned"]
    return [f"position.temperature={args['pe_temperatureH']}", f"position.temperature_x={args['pe_temperatureW']}"]


def _selection(args: dict[str, object]) -> list[str]:
    if args["two_stage_type"] == "no":
        return [
            "query_source=content_anchors",
            f"query_source.reference.random_centers={str(args['random_refpoints_xy']).lower()}",
        ]
    return [
        "query_source=selected",
        f"query_source.content={'learned' if args['embed_init_tgt'] else 'memory'}",
        f"query_source.learn_size={str(args['two_stage_learn_wh']).lower()}",
        f"query_source.answer_all={str(args['two_stage_keep_all_tokens']).lower()}",
        *["query_source.class_head=null"] * bool(args["two_stage_class_embed_share"]),
        *["query_source.box_head=null"] * bool(args["two_stage_bbox_embed_share"]),
    ]


def _heads(args: dict[str, object]) -> list[str]:
    classes, boxes = (bool(args.get(f"dec_pred_{name}_embed_share", True)) for name in ("class", "bbox"))
    return [f"heads.shared={str(classes).lower()}", f"heads.shared_boxes={str(boxes).lower()}"]


def _noise_alone(case: Case) -> dict[str, Tensor]:
    """``prepare_for_cdn`` of the official code, for each sub-case."""
    ours: dict[str, Tensor] = {}
    for name, stated in case.info["subcases"].items():
        settings = {
            "dn_number": stated["dn_number"],
            "dn_label_noise_ratio": stated["label_noise_ratio"],
            "dn_box_noise_scale": stated["box_noise_scale"],
        }
        width = f"model.embed_dim={case.info['args']['hidden_dim']}"
        cfg = compose("train", ["family=dino", "data.root=.", width, *contrastive.overrides(settings)])
        module: Denoising = build(with_num_classes(cfg, case.info["num_classes"]).denoising)(
            fills_content=False, needs_pos=False, reference_dim=4
        )
        module.load_state_dict({"label_embed.weight": case.weights["label_enc.weight"]})
        module.draws = denoising.stored_draws(case, f"{name}.")
        keys = [f"{name}.targets.{image}." for image in range(len(stated["counts"]))]
        targets = Targets.from_lists([case.io[k + "labels"] for k in keys], [case.io[k + "boxes"] for k in keys])
        ours |= contrastive.results(module, f"{name}.", targets, stated["num_queries"])
    return ours


def _without_denoising(case: Case) -> dict[str, Tensor]:
    """In evaluation, and where there is no object, the official losses of denoising are there and are nothing."""
    return {key: torch.zeros(()) for key in case.io if re.search(r"(^|\.)loss\.loss_\w+_dn(_\d+)?$", key)}
