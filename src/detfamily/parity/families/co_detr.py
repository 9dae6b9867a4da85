"""Sense-X/Co-DETR."""

from __future__ import annotations

import re

from torch import Tensor

from detfamily.parity import co_detr
from detfamily.parity.case import Case, role_of


def results(case: Case) -> dict[str, Tensor]:
    """Co-DINO or Co-Deformable-DETR in evaluation, and in a step of training where the case has objects."""
    return co_detr.results(case, overrides(case))


def expected(case: Case) -> dict[str, tuple[Tensor, str]]:
    """Samples and noised copies are made of the stored draws, so they are to be compared, too."""
    given = {key: value for key, value in case.io.items() if role_of(key, case.folder) == "given"}
    return {key: (value, "output" if value.is_floating_point() else "match") for key, value in given.items()}


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    args, loss = case.info["args"], case.info["matcher_and_loss"]
    dino = args["variant"] == "co_dino"
    maps = len(args["backbone_strides"])
    weights = loss["matcher"]
    return [
        f"family={args['variant'].removesuffix('_detr') if dino else 'co_deformable_detr'}",
        "backbone=small",
        f"model.stages={list(range(6 - maps, 6))}".replace(" ", ""),
        f"model.num_levels={args['num_feature_levels']}",
        f"model.embed_dim={args['embed_dims']}",
        f"model.num_heads={args['num_heads']}",
        f"model.num_points={args['num_points']}",
        f"model.ffn_dim={args['feedforward_channels']}",
        f"model.num_queries={args['num_query']}",
        f"model.region_scale={args['roi_finest_scale']}",
        f"encoder.num_layers={args['num_enc_layer']}",
        f"decoder.num_layers={args['num_dec_layer']}",
        f"collaboration.most={args['max_pos_coords']}",
        f"criterion.groups.auxiliary.lambda_1={args['lambda_1']}",
        f"criterion.groups.auxiliary.lambda_2={args['lambda_2']}",
        f"criterion.matcher.weights.class={weights['cls_cost']['weight']}",
        f"criterion.matcher.weights.l1={weights['reg_cost']['weight']}",
        f"criterion.matcher.weights.giou={weights['iou_cost']['weight']}",
        f"criterion.weights.class={loss['query_head']['loss_cls']['loss_weight']}",
        f"criterion.weights.l1={loss['query_head']['loss_bbox']['loss_weight']}",
        f"criterion.weights.giou={loss['query_head']['loss_iou']['loss_weight']}",
        *_heads(case),
        *_head_code(case),
        *(_of_dino(args) if dino else _of_deformable(case)),
    ]


def _heads(case: Case) -> list[str]:
    """Auxiliary heads whose weights are stored, in the order in which the official code counts them."""
    args, prefixes = case.info["args"], {"faster_rcnn": "rpn_head.", "atss": "bbox_head."}
    found = [name for name, prefix in prefixes.items() if any(key.startswith(prefix) for key in case.weights)]
    chosen = [] if len(found) == len(prefixes) else [f"auxiliary={found[0] if found else 'none'}"]
    place = {name: f"auxiliary.{index}" if len(found) > 1 else "auxiliary" for index, name in enumerate(found)}
    if "faster_rcnn" in place:
        own = place["faster_rcnn"]
        chosen += [
            f"{own}.rpn.sampler.count={args['rpn_sampler_num']}",
            f"{own}.rpn.per_level={args['rpn_nms_pre']}",
            f"{own}.rpn.proposals={args['rpn_max_per_img']}",
            f"{own}.roi.sampler.count={args['rcnn_sampler_num']}",
            f"{own}.roi.hidden_dim={args['roi_fc_out_channels']}",
        ]
    if "atss" in place:
        tower = re.compile(r"bbox_head\.0\.cls_convs\.\d+\.conv\.weight")
        chosen.append(f"{place['atss']}.depth={sum(map(bool, map(tower.fullmatch, case.weights)))}")
    return chosen


def _head_code(case: Case) -> list[str]:
    codes = case.weights.get("query_head.transformer.head_pos_embed.weight")
    return [] if codes is None else [f"collaboration.head_code={'scalar' if codes.shape[1] == 1 else 'vector'}"]


def _of_deformable(case: Case) -> list[str]:
    chosen = [f"postprocess.num_select={case.info['args']['max_per_img']}"]
    if "official_model_dict" in case.info:
        decoder = case.info["official_model_dict"]["query_head"]["transformer"]["decoder"]
        chosen.append(f"decoder.look_forward={decoder.get('look_forward_twice', False)}")
    return chosen


def _of_dino(args: dict[str, object]) -> list[str]:
    copies, noise = args.get("num_dn_queries", 100), args.get("dn_label_noise", 0.5)
    assert isinstance(copies, int) and isinstance(noise, float)
    return [
        f"denoising.num_queries={2 * copies}",
        f"denoising.label_noise={0.5 * noise}",
        f"denoising.corner_noise={args.get('dn_box_noise', 1.0)}",
        "denoising.max_queries=1000000",
        f"postprocess.max_detections={args['max_per_img']}",
        f"postprocess.soft_nms_iou={args['test_nms_iou_threshold']}",
    ]
