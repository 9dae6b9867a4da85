"""Golden cases of detectors: our model, built from the case's arguments, run through all that the case stores."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detfamily.build import build_criterion, build_detector, build_postprocess
from detfamily.checkpoints import Adapter, adapter_for
from detfamily.config import compose
from detfamily.criterion import Criterion, Losses
from detfamily.criterion.matcher import pairs
from detfamily.data.batches import pad
from detfamily.detector import Detector
from detfamily.engine.optim import clip_gradients
from detfamily.parity import denoising
from detfamily.parity.case import Case
from detfamily.parity.compare import TIE
from detfamily.structures import Images, Predictions, Size, Targets

PROPOSALS = ("enc", "interm")
"""What the official codes call the group "proposals": Deformable DETR, and DINO."""

OFFICIAL_LOSS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
"""Our names of losses -> the official ones, before the suffix that tells the layer."""


class StoredFeatures(nn.Module):
    """In the place of a backbone: the maps that the case stores.

    Args:
        maps: (B, c, h, w), finest first.
        strides: pixels between their cells; only auxiliary heads need them.
    """

    def __init__(self, maps: Sequence[Tensor], strides: Sequence[int] = ()) -> None:
        super().__init__()
        self.maps = list(maps)
        self.channels = [one.shape[1] for one in maps]
        self.strides = list(strides)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.maps


@dataclass
class Setup:
    """Our side of a case."""

    detector: Detector
    criterion: Criterion
    postprocess: nn.Module
    adapter: Adapter
    images: Images
    maps: list[Tensor]


def results(case: Case, overrides: Sequence[str]) -> dict[str, Tensor]:
    """All that the case stores, computed by our code, under the case's keys.

    Args:
        case: with inputs, weights and targets.
        overrides: what makes ``train.yaml`` the detector of the case.
    """
    torch.manual_seed(0)
    setup = _set_up(case, overrides)
    initial = copy.deepcopy(setup.detector.state_dict())
    ours: dict[str, Tensor] = {}
    predictions: dict[str, Predictions] = {}
    for prefix in sorted({"", *case.sub_cases()} - {"eval."}):
        setup.detector.train(case.info.get("mode") != "eval" and denoising.can_train(case, prefix, setup.detector))
        targets = _targets(case, prefix, len(setup.images))
        if setup.detector.denoising is None or not setup.detector.training:
            predictions = predictions or setup.detector(setup.images)
        elif targets is not None:
            setup.detector.denoising.draws = denoising.stored_draws(case, prefix)
            predictions = setup.detector(setup.images, targets)
            ours |= denoising.results(case, prefix, setup.detector, predictions, targets)
        ours |= _of_targets(case, setup, predictions, targets, prefix)
        ours |= _outputs(predictions, f"{prefix}out.")
    with torch.no_grad():
        evaluated = setup.detector.eval()(setup.images)
    ours |= _outputs(evaluated, "eval.out.")
    ours |= _of_targets(case, setup, evaluated, _targets(case, "", len(setup.images)), "eval.")
    answers_seen = setup.detector.denoising is not None and not setup.detector.denoising.own_group
    ours |= detections(setup.postprocess, predictions if answers_seen else evaluated, setup.images)
    for prefix in sorted({key[: key.index("train.")] for key in case.io if re.search(r"(^|\.)train\.", key)}):
        setup.detector.load_state_dict(initial)
        ours |= _training(case, setup, prefix)
    return ours


def _set_up(case: Case, overrides: Sequence[str]) -> Setup:
    cfg = compose("train", ["data=coco", "data.root=.", *overrides])
    images, maps = _inputs(case)
    width = case.weights[_class_key(case)].shape[0]
    softmax = cfg.classification.head._target_.endswith("SoftmaxClassHead")
    backbone = StoredFeatures(maps) if maps else None
    detector = build_detector(cfg, width - 1 if softmax else width, pretrained=False, backbone=backbone).to(case.dtype)
    adapter = adapter_for(cfg.family_name, detector)
    if detector.denoising is not None and "label_enc.weight" in case.weights:  # official books may be longer
        rows, width = case.weights["label_enc.weight"].shape
        detector.denoising.label_embed = nn.Embedding(rows, width, dtype=case.dtype)
    detector.load_state_dict(_as_loaded(adapter, case), strict=True)
    return Setup(detector, build_criterion(cfg), build_postprocess(cfg), adapter, images, maps)


def _as_loaded(adapter: Adapter, case: Case) -> dict[str, Tensor]:
    """The weights under our names; a formula gives copies of a tensor different values, of which the last one stays."""
    if not case.by_formula:
        return adapter.to_ours(case.weights)
    return {ours: one for name, tensor in case.weights.items() for ours, one in adapter.to_ours({name: tensor}).items()}


def _class_key(case: Case) -> str:
    return "class_embed.weight" if "class_embed.weight" in case.weights else "class_embed.0.weight"


def _inputs(case: Case) -> tuple[Images, list[Tensor]]:
    """Images to give to the detector, and the maps that replace its backbone, if the case stores any."""
    maps = [case.io[key].clone().requires_grad_() for key in _numbered(case.io, "features")]
    stored = [case.io[key] for key in _numbered(case.io, "images")]
    if maps:
        mask = case.io["mask"]
        pixels = torch.zeros(len(mask), 3, *mask.shape[1:], dtype=case.dtype)
    else:
        pixels, mask = (stored[0], case.io["mask"]) if stored[0].ndim == 4 else pad(stored)
        if "mask" in case.io and not torch.equal(mask, case.io["mask"]):
            raise ValueError(f"{case.name}: padding the images gives another mask than the stored one")
    targets = case.io.get("target_sizes")
    sizes = tuple(_size(one) for one in mask)
    original = sizes if targets is None else tuple((int(h), int(w)) for h, w in targets.tolist())
    return Images(pixels, mask, sizes, original, tuple(range(len(mask)))), maps


def _size(mask: Tensor) -> Size:
    return int((~mask[:, 0]).sum()), int((~mask[0]).sum())


def _numbered(io: Mapping[str, Tensor], name: str) -> list[str]:
    keys = [key for key in io if re.fullmatch(rf"{name}\.\d+", key)]
    return sorted(keys, key=lambda key: int(key.rsplit(".", 1)[1]))


def _targets(case: Case, prefix: str, batch: int) -> Targets | None:
    """The targets of a sub-case; without any stored, a name that says so stands for empty images."""
    keys = [f"{prefix}targets.{image}." for image in range(batch)]
    if not all(key + "boxes" in case.io for key in keys):
        if "empty" not in prefix:
            return None
        nothing = torch.zeros(0, 4, dtype=case.dtype)
        return Targets.from_lists([torch.zeros(0, dtype=torch.int64)] * batch, [nothing] * batch)
    return Targets.from_lists([case.io[k + "labels"] for k in keys], [case.io[k + "boxes"] for k in keys])


def _of_targets(
    case: Case, setup: Setup, predictions: dict[str, Predictions], targets: Targets | None, prefix: str
) -> dict[str, Tensor]:
    """Losses, matches and gradients of one set of targets."""
    if targets is None:
        return {}
    losses = setup.criterion(predictions, targets)
    depth = len(predictions["match"].logits)
    ours = {f"{prefix}loss.total": losses.total.detach()}
    for name, value in _all_parts(setup.criterion, predictions, targets, losses).items():
        group, layer, loss = name.split("/")
        for official in _loss_names(group, OFFICIAL_LOSS[loss], "" if int(layer) == depth - 1 else f"_{layer}"):
            ours[f"{prefix}loss.{official}"] = value * setup.criterion.groups[group].weight ** (group == "one_to_many")
    for group in (name for name in losses.assignments if name != "denoise"):
        ours |= _matches(case, setup, predictions, targets, losses, group, prefix)
    if any(key.startswith(f"{prefix}grad") for key in case.io):
        ours |= _gradients(setup, losses, prefix)
    return ours


def _all_parts(
    criterion: Criterion, predictions: dict[str, Predictions], targets: Targets, losses: Losses
) -> dict[str, Tensor]:
    """All losses of all layers, also those that have no weight here: official code may compute them all the same."""
    if criterion.aux_loss and not any(rule.left_out for rule in criterion.groups.values()):
        return losses.parts
    everything = copy.copy(criterion)
    everything.aux_loss = True
    everything.groups = {name: copy.copy(rule) for name, rule in criterion.groups.items()}
    for rule in everything.groups.values():
        rule.left_out = ()
    parts: dict[str, Tensor] = everything(predictions, targets).parts
    return parts | losses.parts


def _loss_names(group: str, loss: str, layer: str) -> list[str]:
    """What the official codes call a loss; each of them knows one name of these."""
    if group == "proposals":
        return [f"{loss}_{name}" for name in PROPOSALS]
    if group == "denoise":
        return [f"tgt_{loss}{layer}", f"{loss}_dn{layer}"]
    return [f"{loss}{layer}{'_one2many' if group == 'one_to_many' else ''}"]


def _matches(
    case: Case,
    setup: Setup,
    predictions: dict[str, Predictions],
    targets: Targets,
    losses: Losses,
    group: str,
    prefix: str,
) -> dict[str, Tensor]:
    """Matched pairs of all layers; where ours cost the same as the stored ones, the stored ones count as ours."""
    ours: dict[str, Tensor] = {}
    assignment = losses.assignments[group]
    depth = len(predictions[group].logits)
    first = depth - len(assignment.query)
    wanted = setup.criterion.groups[group].targets(targets, predictions[group])
    costs = setup.criterion.matcher.cost(predictions[group], wanted)
    repeats = getattr(setup.criterion.groups[group], "repeats", 1)
    for layer in range(first, depth):
        for image, (query, target) in enumerate(pairs(assignment, wanted.counts, layer - first)):
            target = target % max(1, targets.counts[image])  # copies of an object are alike
            for key in (f"{prefix}match.{place}{image}" for place in _places(group, layer, depth)):
                src, tgt = case.io.get(f"{key}.src"), case.io.get(f"{key}.tgt")
                matched = (query, target)
                if src is not None and tgt is not None:
                    cost = costs[layer, image, :, : targets.counts[image]]
                    if _cost_the_same(cost, (src, tgt), matched, repeats):
                        matched = (src, tgt)
                ours[f"{key}.src"], ours[f"{key}.tgt"] = matched
    return ours


def _places(group: str, layer: int, depth: int) -> list[str]:
    """Where the results of a group and layer lie, under each name that some official code has for the group."""
    place = "" if layer == depth - 1 else f"aux.{layer}."
    if group == "proposals":
        return [f"{name}." for name in PROPOSALS]
    if group == "denoise":
        return [f"dn.{place}"]
    return [f"one2many.{place}", f"{place}one2many."] if group == "one_to_many" else [place]


def _cost_the_same(cost: Tensor, stored: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], repeats: int = 1) -> bool:
    """Ties within 1e-5 are decided by rounding; tokens in the padding all say the same, so they tie as well."""
    for indices, end, most in zip(stored, cost.shape, (1, repeats), strict=True):
        inside = all(0 <= index < end for index in indices.tolist())
        if len(indices) != len(ours[0]) or not inside or max(Counter(indices.tolist()).values(), default=0) > most:
            return False
    return bool((cost[stored].sum() - cost[ours].sum()).abs() <= TIE * max(1, len(ours[0])))


def _gradients(setup: Setup, losses: Losses, prefix: str) -> dict[str, Tensor]:
    """grad.NAME, gradstat.NAME = [sum, absolute sum, l2], and grad_norm.NAME = l2, under the official names."""
    setup.detector.zero_grad()
    for one in setup.maps:
        one.grad = None
    losses.total.backward(retain_graph=True)
    ours: dict[str, Tensor] = {}
    for name, gradient in _official_gradients(setup).items():
        stat = torch.stack([gradient.sum(), gradient.abs().sum(), gradient.norm()])
        ours[f"{prefix}grad.{name}"] = gradient
        ours[f"{prefix}gradstat.{name}"] = stat
        ours[f"{prefix}grad_norm.{name}"] = ours[f"{prefix}gradnorm.{name}"] = stat[2]
    for name, parameter in setup.adapter.to_official(dict(setup.detector.named_parameters())).items():
        if f"{prefix}grad.{name}" not in ours:  # no gradient: zeros, or the NaN that stands for none in statistics
            ours[f"{prefix}grad.{name}"] = torch.zeros_like(parameter)
            ours[f"{prefix}gradstat.{name}"] = torch.full((3,), torch.nan)
            ours[f"{prefix}grad_norm.{name}"] = ours[f"{prefix}gradnorm.{name}"] = torch.zeros(())
    for index, one in enumerate(setup.maps):
        if one.grad is not None:
            ours[f"{prefix}grad.features.{index}"] = ours[f"{prefix}grad_input.features.{index}"] = one.grad.clone()
    return ours


def _official_gradients(setup: Setup) -> dict[str, Tensor]:
    gradients = {name: p.grad.clone() for name, p in setup.detector.named_parameters() if p.grad is not None}
    return setup.adapter.to_official(gradients)


def _outputs(predictions: dict[str, Predictions], prefix: str) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for group, said in predictions.items():
        suffix = "_one2many" if group == "one_to_many" else ""
        for layer in range(len(said.logits)):
            for place in _places("match" if suffix else group, layer, len(said.logits)):
                ours[f"{prefix}{place}pred_logits{suffix}"] = said.logits[layer].detach()
                ours[f"{prefix}{place}pred_boxes{suffix}"] = said.boxes[layer].detach()
    return ours


def detections(
    postprocess: nn.Module, predictions: dict[str, Predictions], images: Images, place: str = "post"
) -> dict[str, Tensor]:
    """What is found, under the keys of the official results."""
    ours: dict[str, Tensor] = {}
    for image, found in enumerate(postprocess(predictions, images)):
        ours |= {
            f"{place}.{image}.scores": found.scores.detach(),
            f"{place}.{image}.labels": found.labels,
            f"{place}.{image}.boxes": found.boxes_xyxy.detach(),
        }
    return ours


def _training(case: Case, setup: Setup, prefix: str) -> dict[str, Tensor]:
    """A few optimiser steps on the same batch, with the settings of the case."""
    targets = _targets(case, "", len(setup.images))
    assert targets is not None
    optimizer, clip_norm = _optimizer(case, setup, prefix)
    ours: dict[str, Tensor] = {}
    setup.detector.train()
    steps = len([key for key in case.io if re.fullmatch(rf"{re.escape(prefix)}train\.loss\.\d+", key)])
    for step in range(steps):
        optimizer.zero_grad()
        total = setup.criterion(setup.detector(setup.images, targets), targets).total
        total.backward()
        norm = clip_gradients(setup.detector.parameters(), clip_norm)
        ours[f"{prefix}train.loss.{step}"], ours[f"{prefix}train.grad_norm.{step}"] = total.detach(), norm.detach()
        optimizer.step()
    for name, parameter in setup.adapter.to_official(dict(setup.detector.named_parameters())).items():
        ours[f"{prefix}train.param.{name}"] = parameter.detach().clone()
    return ours


def _optimizer(case: Case, setup: Setup, prefix: str) -> tuple[torch.optim.Optimizer, float]:
    """The case's own settings where it states them; else the official learning rate on all, as its note says."""
    stated = case.info.get("training", {}).get(prefix.rstrip(".") or "main", {})
    decay, clip_norm = stated.get("weight_decay", 1e-4), stated.get("clip_max_norm", 0.1)
    rules = stated.get("groups", [{"names_contain": [], "lr": stated.get("lr", 1e-4)}])
    groups: dict[float, list[Tensor]] = {}
    for ours, parameter in setup.detector.named_parameters():
        names = setup.adapter.to_official(_with_partners(setup, ours, parameter))
        for rule in rules:
            wanted = rule["names_contain"]
            if not wanted or any(word in name for name in names for word in wanted):
                groups.setdefault(rule["lr"], []).append(parameter)
                break
    parameters = [{"params": members, "lr": lr} for lr, members in groups.items()]
    return torch.optim.AdamW(parameters, weight_decay=decay), clip_norm


def _with_partners(setup: Setup, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter with the others that share its official tensor, so that it can be renamed alone."""
    everything = dict(setup.detector.named_parameters())
    for rule in setup.adapter.rules:
        if isinstance(rule.ours, tuple) and name in rule.ours:
            return {part: everything[part] for part in rule.ours}
    return {name: parameter}
