"""Golden cases of DINO's functions, one by one, at edge values."""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.attention.ms_deform import MSDeformAttention
from detfamily.blocks.boxes import inverse_sigmoid, iou_and_giou, to_cxcywh
from detfamily.blocks.position import SinePosition
from detfamily.blocks.postprocess import SigmoidScores, TopK
from detfamily.blocks.proposals import proposal_boxes
from detfamily.blocks.query_position import anchor_code
from detfamily.blocks.tokens import flatten_maps, resize_mask
from detfamily.criterion.losses import FocalClassLoss, Normalizer
from detfamily.criterion.matcher import Assignment, FocalClassCost, Matcher, assign, pairs
from detfamily.parity.case import Case
from detfamily.structures import Images, Predictions, Targets, Tokens

_OFFICIAL_WIDTH = 256


def results(case: Case) -> dict[str, Tensor]:
    """``out.FUNCTION.NAME`` from ``in.FUNCTION.NAME``."""
    io = {key.removeprefix("in."): value for key, value in case.io.items() if key.startswith("in.")}
    memory = _memory(io)
    ours = _codes(io) | _boxes(io) | _proposals(io, memory) | _match(case, io) | _attention(case, io, memory)
    return {f"out.{key}": value.detach() for key, value in ours.items()}


def _memory(io: dict[str, Tensor]) -> Tokens:
    mask = io["mask_resize.image_mask"]
    masks = [resize_mask(mask, (-(-mask.shape[1] // s), -(-mask.shape[2] // s))) for s in (8, 16, 32, 64)]
    content = io["proposals.memory"]
    maps, start = [], 0
    for one in masks:
        h, w = one.shape[1:]
        level = content[:, start : start + h * w]
        maps.append(level.transpose(1, 2).unflatten(2, (h, w)))
        start += h * w
    return flatten_maps(maps, masks, padded=True)


def _codes(io: dict[str, Tensor]) -> dict[str, Tensor]:
    anchors, mask = io["sine.pos4"], io["mask_resize.image_mask"]
    ours = {
        "sine.out4": anchor_code(anchors, _OFFICIAL_WIDTH),
        "sine.out2": anchor_code(anchors[..., :2], _OFFICIAL_WIDTH),
        "pe.out_t20": SinePosition(64, 20.0)([io["pe.mask"]])[0],
        "pe.out_h10000_w40": SinePosition(64, 10000.0, temperature_x=40.0)([io["pe.mask"]])[0],
    }
    for stride in (8, 16, 32, 64):
        size = (-(-mask.shape[1] // stride), -(-mask.shape[2] // stride))
        ours[f"mask_resize.s{stride}"] = resize_mask(mask, size)
    return ours


def _boxes(io: dict[str, Tensor]) -> dict[str, Tensor]:
    x = io["inverse_sigmoid.x"].clone().requires_grad_()
    y = inverse_sigmoid(x, eps=1e-3)
    one, other = io["giou.boxes1"][:, None], io["giou.boxes2"][None]
    iou, giou = iou_and_giou(to_cxcywh(one), to_cxcywh(other), eps=1e-6)
    hull = (torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])).clamp(min=0)
    hull_area = hull.prod(-1)
    logits = io["focal.logits"].clone().requires_grad_()
    loss = _focal(logits, io["focal.targets"])
    return {
        "inverse_sigmoid.y": y,
        "inverse_sigmoid.dx": torch.autograd.grad(y.sum(), x)[0],
        "giou.iou": iou,
        "giou.giou": giou,
        "giou.union": hull_area - (iou - giou) * (hull_area + 1e-6),
        "focal.loss": loss,
        "focal.dlogits": torch.autograd.grad(loss, logits)[0],
    }


def _focal(logits: Tensor, targets: Tensor, num_boxes: int = 7) -> Tensor:
    """The official mean over queries, from our sum; a target for each query, those of empty ones unmatched."""
    batch, count = targets.shape[:2]
    labels = targets.argmax(-1)
    assignment = Assignment(torch.arange(count).expand(1, batch, count), targets.any(-1)[None])
    wanted = Targets(labels, torch.zeros(batch, count, 4), (count,) * batch, tuple(range(batch)))
    said = Predictions(logits[None], torch.zeros(1, batch, count, 4))
    loss: Tensor = FocalClassLoss()(said, wanted, assignment, Normalizer(torch.tensor([float(num_boxes)])))
    return loss[0] / count


def _proposals(io: dict[str, Tensor], memory: Tokens) -> dict[str, Tensor]:
    assert memory.grid is not None and memory.reference_points is not None
    ratios = memory.grid.valid_ratios
    logits, usable = proposal_boxes(memory)
    return {
        "geometry.valid_ratios": ratios,
        "geometry.encoder_reference_points": memory.reference_points[:, :, None] * ratios[:, None],
        "proposals.output_memory": memory.content.masked_fill(~usable[..., None], 0.0),
        "proposals.output_proposals": logits,
        "proposals.output_proposals_learnedwh": proposal_boxes(memory, io["proposals.learnedwh"].sigmoid()[None])[0],
    }


def _match(case: Case, io: dict[str, Tensor]) -> dict[str, Tensor]:
    said = Predictions(io["match.pred_logits"][None], io["match.pred_boxes"][None])
    names = [f"match.targets.{image}." for image in range(said.logits.shape[1])]
    targets = Targets.from_lists([io[n + "labels"] for n in names], [io[n + "boxes"] for n in names])
    costs = case.loss_settings
    weights = {"class": costs["set_cost_class"], "l1": costs["set_cost_bbox"], "giou": costs["set_cost_giou"]}
    matcher = Matcher(FocalClassCost(costs["focal_alpha"]), weights, eps=1e-6)
    assignment = assign({"match": matcher.cost(said, targets)}, {"match": targets})[0]["match"]
    ours: dict[str, Tensor] = {}
    for image, (query, target) in enumerate(pairs(assignment, targets.counts, 0)):
        ours |= {f"match.{image}.src": query, f"match.{image}.tgt": target}
    count = len(case.io["out.post.0.scores"])
    sizes = tuple((int(h), int(w)) for h, w in io["post.target_sizes"].tolist())
    images = Images(torch.zeros(len(sizes), 3, 1, 1), torch.zeros(len(sizes), 1, 1), sizes, sizes, tuple(range(2)))
    for image, found in enumerate(TopK(SigmoidScores(), count)({"match": said}, images)):
        place = f"post.{image}."
        ours |= {f"{place}scores": found.scores, f"{place}labels": found.labels, f"{place}boxes": found.boxes_xyxy}
    return ours


def _attention(case: Case, io: dict[str, Tensor], memory: Tokens) -> dict[str, Tensor]:
    args = case.info["args"]["msda"]
    module = MSDeformAttention(args["d_model"], args["n_heads"], args["n_levels"], args["n_points"])
    module.load_state_dict({key.removeprefix("msda."): value for key, value in case.weights.items()})
    assert memory.grid is not None
    ours: dict[str, Tensor] = {}
    for numbers in (2, 4):
        leaves = [io[f"msda.{name}"].clone().requires_grad_() for name in ("query", "value", f"ref{numbers}")]
        query, value, points = leaves
        output = module.sample(query, points, value, memory.grid)
        weight = module.sampling_offsets.weight
        gradients = torch.autograd.grad((output * io["msda.probe"]).sum(), [*leaves, weight])
        names = ("dquery", "dvalue", "dref", "dsampling_offsets_weight")
        ours |= {f"msda.{name}{numbers}": one for name, one in zip(names, gradients, strict=True)}
        ours[f"msda.out{numbers}"] = output
    return ours
