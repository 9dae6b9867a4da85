"""Golden cases of Co-DETR: the whole step, with what the auxiliary heads say, sample and hand on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.auxiliary import ATSS, FasterRCNN
from detfamily.auxiliary.collaboration import Collaboration, PositiveEmbedding
from detfamily.auxiliary.quality import centerness_of
from detfamily.auxiliary.samplers import RandomSampler, Sample
from detfamily.auxiliary.structures import BACKGROUND, OUTSIDE, Objects, Positives, shapes_of
from detfamily.blocks.denoising import Denoising, Draws
from detfamily.build import build_criterion, build_detector, build_postprocess
from detfamily.checkpoints.co_detr import adapter
from detfamily.config import compose
from detfamily.criterion import Criterion
from detfamily.criterion.criterion import Losses
from detfamily.criterion.matcher import pairs
from detfamily.criterion.rules import Known
from detfamily.parity import contrastive
from detfamily.parity.case import Case
from detfamily.parity.denoising import StoredDraws
from detfamily.parity.detection import Setup, StoredFeatures, detections
from detfamily.structures import Images, Predictions, Targets, Tokens


class OfficialDraws(Draws):
    """Stored random permutations, used where the official code draws one, in its order.

    Samplers draw among the positives of an image, and among its negatives, where there are more than they take; then,
    head by head, positives are drawn where there are more than become queries, and negatives where there are fewer.

    Args:
        permutations: in their order; of long ones the beginning.
        samplers: in their order, each of which samples all images.
        batch: images.
        least: bounds of the queries of a head in an image.
        most: bounds of the queries of a head in an image.
    """

    def __init__(
        self, permutations: Sequence[Tensor], samplers: Sequence[RandomSampler], batch: int, least: int, most: int
    ) -> None:
        super().__init__()
        self.batch = batch
        self.permutations = list(permutations)
        self.samplers = list(samplers)
        self.least, self.most = least, most
        self.calls = 0
        self.taken = 0
        self.kept: list[Tensor | None] = []

    def uniform(self, wanted: Tensor, *more: int) -> Tensor:
        """Numbers whose order is that of the permutation, or of the candidates where none is drawn."""
        if wanted.ndim == 1:
            return self._of_sampler(wanted)
        if not self.kept:
            return self._of_positives(wanted)
        kept, self.kept = self.kept, []
        return torch.stack([_ranks(row, order) for row, order in zip(wanted, kept, strict=True)])

    def _of_sampler(self, wanted: Tensor) -> Tensor:
        sampler, negatives = self.samplers[self.calls // (2 * self.batch)], self.calls % 2
        self.calls += 1
        count = int(wanted.sum())
        most = sampler.count - self.taken if negatives else int(sampler.count * sampler.positive_share)
        self.taken = min(count, most)
        return _ranks(wanted, self._next() if count > most else None)

    def _of_positives(self, wanted: Tensor) -> Tensor:
        """Those of negatives, which belong to the next call, are drawn in between, image by image."""
        counts = wanted.sum(1).tolist()
        size = max(self.least, min(self.most, max(counts)))
        drawn = []
        for count in counts:
            drawn.append(self._next() if count > size else None)
            self.kept.append(self._next() if count < size else None)
        return torch.stack([_ranks(row, order) for row, order in zip(wanted, drawn, strict=True)])

    def _next(self) -> Tensor:
        return self.permutations.pop(0).long()


def _ranks(candidates: Tensor, order: Tensor | None) -> Tensor:
    """(N,) below 1: small for the first ones of the order."""
    place = candidates.nonzero()[:, 0]
    drawn = torch.full(candidates.shape, 0.99, dtype=torch.float64)
    chosen = place if order is None else place[order]
    drawn[chosen] = torch.arange(len(chosen), dtype=torch.float64) * 1e-6
    return drawn


def results(case: Case, overrides: Sequence[str]) -> dict[str, Tensor]:
    """All that the case stores, computed by our code, under the case's keys.

    Args:
        case: with inputs and weights; with objects for a step of training.
        overrides: what makes ``train.yaml`` the detector of the case.
    """
    torch.manual_seed(0)
    setup = _set_up(case, overrides)
    if "rng.00.rand_like" in case.io or "loss.total" in case.io:
        return _training(case, setup)
    with torch.no_grad():
        predictions = setup.detector.eval()(setup.images)
    ours = _outputs(case, predictions) | detections(setup.postprocess, predictions, setup.images)
    synthetic = Predictions(case.io["synth.pred_logits"][None], case.io["synth.pred_boxes"][None])
    ours |= detections(setup.postprocess, {"match": synthetic}, setup.images, "post_synth")
    plain = build_postprocess(compose("train", ["data=coco", "data.root=.", *overrides, "postprocess=top_k_clipped"]))
    plain.num_select = case.info["args"]["max_per_img"]
    as_shown = replace(setup.images, original_sizes=setup.images.sizes)
    return ours | detections(plain, predictions, as_shown, "post_no_nms")


def _set_up(case: Case, overrides: Sequence[str]) -> Setup:
    cfg = compose("train", ["data=coco", "data.root=.", *overrides])
    images, maps = _inputs(case)
    backbone = StoredFeatures(maps, case.info["args"]["backbone_strides"])
    detector = build_detector(cfg, case.info["num_classes"], pretrained=False, backbone=backbone).to(case.dtype)
    if detector.denoising is not None:  # the official book has no row for "unknown"
        rows, width = case.weights["query_head.label_embedding.weight"].shape
        detector.denoising.label_embed = nn.Embedding(rows, width, dtype=case.dtype)
    found = adapter(detector)
    heads = 0 if detector.auxiliary is None else len(detector.auxiliary.heads)
    detector.load_state_dict(found.to_ours(_of_these_heads(case.weights, heads)), strict=True)
    return Setup(detector, build_criterion(cfg), build_postprocess(cfg), found, images, maps)


_HEAD_CODES = "query_head.transformer.head_pos_embed.weight"
_OF_HEAD = re.compile(
    r"query_head\.transformer\.(?:aux_pos_trans|aux_pos_trans_norm|pos_feats_trans|pos_feats_norm)\.(\d+)\."
)


def _of_these_heads(weights: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """What makes queries of positives is officially counted apart from the heads, so there may be more of it."""
    own = {
        name: one for name, one in weights.items() if not ((found := _OF_HEAD.match(name)) and int(found[1]) >= heads)
    }
    return own | ({_HEAD_CODES: own[_HEAD_CODES][:heads]} if _HEAD_CODES in own and heads else {})


def _inputs(case: Case) -> tuple[Images, list[Tensor]]:
    maps = [
        case.io[f"features.{n}"].clone().requires_grad_() for n in range(len(case.info["args"]["backbone_strides"]))
    ]
    mask = case.io["mask"]
    sizes = tuple(tuple(case.io[f"targets.{image}.size"].tolist()) for image in range(len(mask)))
    original = [tuple(one) for one in case.io["target_sizes"].tolist()] if "target_sizes" in case.io else sizes
    pixels = torch.zeros(len(mask), 3, *mask.shape[1:], dtype=case.dtype)
    return Images(pixels, mask, sizes, tuple(original), tuple(range(len(mask)))), maps


def _training(case: Case, setup: Setup) -> dict[str, Tensor]:
    detector, batch = setup.detector.train(), range(len(setup.images))
    labels, boxes = ([case.io[f"targets.{image}.{what}"] for image in batch] for what in ("labels", "boxes"))
    targets = Targets.from_lists(labels, boxes)
    ours: dict[str, Tensor] = {}
    if detector.denoising is not None:
        detector.denoising.draws = _noise(case)
        ours = _of_denoising(detector.denoising, targets, detector.query_source.num_queries)
    auxiliary = cast("Collaboration", detector.auxiliary)
    auxiliary.draws = _draws(case, auxiliary)
    predictions = detector(setup.images, targets)
    losses = setup.criterion(predictions, targets)
    ours |= _outputs(case, predictions) | _losses(setup.criterion, predictions, losses)
    ours |= _matches(losses, targets) | _of_queries(predictions, auxiliary)
    losses.total.backward()
    named = {name: one.grad for name, one in detector.named_parameters() if one.grad is not None}
    ours |= {f"grad.{name}": one for name, one in setup.adapter.to_official(named).items()}
    every = setup.adapter.to_official(dict(detector.named_parameters()))
    ours |= {f"grad.{name}": torch.zeros_like(one) for name, one in every.items() if f"grad.{name}" not in ours}
    if (codes := f"grad.{_HEAD_CODES}") in ours:
        spare = len(case.weights[_HEAD_CODES]) - len(ours[codes])
        ours[codes] = F.pad(ours[codes], (0, 0, 0, spare))
    with torch.no_grad():
        return ours | _of_heads(case, setup, auxiliary, targets)


def _noise(case: Case) -> Draws:
    """None are stored where there was nothing to copy."""
    names = ("00.rand_like", "01.randint_like", "03.rand_like", "02.randint_like")
    return cast("Draws", StoredDraws(*(case.io.get(f"rng.{name}") for name in names)))


def _of_denoising(denoising: Denoising, targets: Targets, num_queries: int) -> dict[str, Tensor]:
    names = {
        "label_query": "input_query_label",
        "bbox_query": "input_query_bbox",
        "attn_mask": "attn_mask",
        "pad_size": "pad_size",
        "num_groups": "num_dn_group",
    }
    made = contrastive.results(denoising, "", targets, num_queries)
    return {f"dn.{name}": made[f"cdn.{theirs}"] for name, theirs in names.items()}


def _draws(case: Case, auxiliary: Collaboration) -> OfficialDraws:
    keys = sorted(key for key in case.io if key.startswith("rng.") and key.endswith(".randperm"))
    faster = [head for head in auxiliary.heads.values() if isinstance(head, FasterRCNN)]
    samplers = [sampler for head in faster for sampler in (head.rpn.sampler, head.roi.sampler)]
    batch, bounds = len(case.io["mask"]), auxiliary.choose
    return OfficialDraws([case.io[key] for key in keys], samplers, batch, bounds.least, bounds.most)


def _outputs(case: Case, predictions: dict[str, Predictions]) -> dict[str, Tensor]:
    places = {"match": "out.", "denoise": "out.dn.", "proposals": "out.enc."}
    ours: dict[str, Tensor] = {}
    for group, place in places.items():
        if group not in predictions:
            continue
        said = predictions[group]
        for layer in range(len(said.logits)):
            where = place if layer == len(said.logits) - 1 else f"{place}aux.{layer}."
            ours[f"{where}pred_logits"] = said.logits[layer].detach()
            ours[f"{where}pred_boxes"] = said.boxes[layer].detach()
    return ours | _chosen(case, ours)


def _chosen(case: Case, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is said of proposals, where all tokens are trained and the case stores those that become queries."""
    names = ("out.enc.pred_logits", "out.enc.pred_boxes")
    if not all(name in case.io and name in ours for name in names):
        return {}
    count = case.io[names[0]].shape[1]
    if count >= ours[names[0]].shape[1]:
        return {}
    best = ours[names[0]][..., 0].topk(count, 1).indices[..., None]
    return {name: ours[name].take_along_dim(best, 1) for name in names}


_PARTS = {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}
_OWN = {
    "rpn/class": "loss_rpn_cls",
    "rpn/l1": "loss_rpn_bbox",
    "roi/class": "loss_cls{}",
    "roi/giou": "loss_bbox{}",
    "head/class": "loss_cls{}",
    "head/giou": "loss_bbox{}",
    "head/centerness": "loss_centerness{}",
}


def _losses(criterion: Criterion, predictions: dict[str, Predictions], losses: Losses) -> dict[str, Tensor]:
    """Weighted, as the official ones are."""
    ours = {"loss.total": losses.total.detach()}
    depth = len(predictions["match"].logits)
    heads = [name for name in predictions if name.startswith("auxiliary.")]
    for name, value in losses.parts.items():
        group, layer, loss = name.split("/")
        kind = group.partition(".")[0]
        rule = criterion.groups[kind]
        if f"{layer}/{loss}" in _OWN:
            weight = _own_weight(criterion) * predictions[group].losses[f"{layer}/{loss}"].weight
            ours[f"loss.{_OWN[f'{layer}/{loss}'].format(heads.index(group))}"] = value * weight
            continue
        prefix = {"proposals": "enc_", "denoise": "dn_"}.get(kind, "")
        suffix = f"_aux{heads.index(group)}" if group in heads else ""
        place = "" if kind == "proposals" or int(layer) == depth - 1 else f"d{layer}."
        ours[f"loss.{place}{prefix}{_PARTS[loss]}{suffix}"] = value * rule.weight * criterion.weights[loss]
    return ours


def _own_weight(criterion: Criterion) -> float:
    """Of the heads' own losses."""
    return cast("Known", criterion.groups["auxiliary"]).own_weight


def _matches(losses: Losses, targets: Targets) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for group in ("match", "proposals"):
        assignment = losses.assignments[group]
        depth = len(assignment.query)
        for layer in range(depth):
            place = "enc." if group == "proposals" else f"layer{layer}."
            for image, (query, target) in enumerate(pairs(assignment, targets.counts, layer)):
                for name in (place, *([""] if group == "match" and layer == depth - 1 else [])):
                    ours[f"match.{name}{image}.src"], ours[f"match.{name}{image}.tgt"] = query, target
    return ours


def _of_queries(predictions: dict[str, Predictions], auxiliary: Collaboration) -> dict[str, Tensor]:
    """What the decoder says of the heads' positives."""
    ours: dict[str, Tensor] = {}
    for index, name in enumerate(auxiliary.heads):
        said = predictions[f"auxiliary.{name}"]
        for layer in range(len(said.logits)):
            ours[f"auxq.{index}.{layer}.pred_logits"] = said.logits[layer].detach()
            ours[f"auxq.{index}.{layer}.pred_boxes"] = said.boxes[layer].detach()
    return ours


def _of_heads(case: Case, setup: Setup, auxiliary: Collaboration, targets: Targets) -> dict[str, Tensor]:
    """What the heads say and sample, step by step, and the queries that come of it."""
    detector, images = setup.detector, setup.images
    memory: Tokens = detector.encode(images)
    maps, objects = auxiliary.maps(memory), Objects.of(images, targets)
    auxiliary.draws = draws = _draws(case, auxiliary)
    own_weight = _own_weight(setup.criterion)
    ours: dict[str, Tensor] = {}
    for index, head in enumerate(auxiliary.heads.values()):
        if isinstance(head, FasterRCNN):
            ours |= _of_rpn(head, maps, images, objects, draws, own_weight)
            proposals = [ours[f"rpn.{image}.proposals"][:, :4] for image in range(len(images))]
            ours |= _of_roi(head, maps, proposals, objects, draws)
        elif isinstance(head, ATSS):
            ours |= _of_atss(head, maps, images, objects, own_weight, index)
    auxiliary.draws = _draws(case, auxiliary)
    found = {name: head(maps, images, objects, auxiliary.draws) for name, head in auxiliary.heads.items()}
    for index, (name, one) in enumerate(found.items()):
        positives = auxiliary.choose(one.candidates, objects, images, auxiliary.draws)
        ours |= _of_positives(f"auxq.{index}.", positives, case.info["num_classes"])
        for image in range(len(images)) if name == "atss" else ():
            own = ours[f"auxq.{index}.src_index.{image}"]
            ours[f"auxq.{index}.src_index.{image}"] = _as_told(own, ours[f"atss.{image}.valid"])
        assert auxiliary.queries is not None
        queries = cast("PositiveEmbedding", auxiliary.queries[name])(positives, auxiliary.reference_dim)
        ours[f"auxq.{index}.query"] = queries.content
        ours |= {} if queries.pos is None else {f"auxq.{index}.query_pos": queries.pos}
        hidden, _ = detector.decoder(queries, memory, detector.heads)
        ours |= {f"auxq.{index}.decoder.{layer}": one for layer, one in enumerate(hidden)}
    return ours


def _as_told(index: Tensor, valid: Tensor) -> Tensor:
    """The cases tell anchors by their boxes, of which those in the padding have none, so all are the first one."""
    return torch.where(valid[index], index, (~valid).int().argmax())


def _of_rpn(
    faster: FasterRCNN,
    maps: list[Tensor],
    images: Images,
    objects: Objects,
    draws: Draws,
    own_weight: float,
) -> dict[str, Tensor]:
    rpn, shapes = faster.rpn, shapes_of(maps)
    anchors = rpn.anchors(shapes, objects.boxes_xyxy)
    logits, deltas = rpn.predict(maps)
    sample = rpn.sample(anchors, shapes, images, objects, draws)
    scored = rpn.propose(logits, deltas, anchors, shapes, images, rpn.per_level)
    wanted, _ = objects.at(sample.assigned)
    steps = rpn.coder.encode(anchors[sample.index], wanted)
    ours: dict[str, Tensor] = {}
    for image, boxes in enumerate(scored):
        positive = sample.positive[image]
        ours |= {
            f"rpn.{image}.proposals": boxes,
            f"rpn.{image}.pos_inds": sample.index[image][positive],
            f"rpn.{image}.neg_inds": sample.index[image][sample.valid[image] & ~positive],
            f"rpn.{image}.pos_gt": sample.assigned[image][positive],
            f"rpn.{image}.pos_deltas": steps[image][positive],
        }
    divisor = _sampled(sample)
    start = 0
    for level, (height, width) in enumerate(shapes):
        count = height * width * rpn.anchors.per_cell
        own, here = slice(start, start + count), (sample.index >= start) & (sample.index < start + count)
        ours[f"rpn.cls.{level}"] = logits[:, own].unflatten(1, (height, width, -1)).permute(0, 3, 1, 2)
        ours[f"rpn.reg.{level}"] = deltas[:, own].reshape(len(images), height, width, -1).permute(0, 3, 1, 2)
        part = Sample(sample.index, torch.where(here, sample.assigned, BACKGROUND), sample.valid & here)
        losses = rpn._losses(logits, deltas, anchors, part, objects)
        for name, official in (("class", "cls"), ("l1", "bbox")):
            value = losses[name] * _sampled(part) / divisor * faster.weights[f"rpn/{name}"] * own_weight
            ours[f"loss.loss_rpn_{official}.level{level}"] = value
        start += count
    return ours


def _sampled(sample: Sample) -> Tensor:
    """What the losses of the RPN are divided by."""
    of_kind = torch.stack([sample.positive, sample.valid & ~sample.positive]).sum(-1)
    return of_kind.clamp(min=1).sum()


def _of_roi(
    faster: FasterRCNN, maps: list[Tensor], proposals: list[Tensor], objects: Objects, draws: Draws
) -> dict[str, Tensor]:
    roi = faster.roi
    sample, regions = roi.sample(proposals, objects, draws)
    logits, deltas = roi.predict(roi.pool(maps, regions))
    boxes, labels = objects.at(sample.assigned)
    positive = sample.positive
    # the official lists are without unused slots
    ours = {
        "roi.cls_score": logits[sample.valid],
        "roi.bbox_pred": deltas.flatten(2)[sample.valid],
        "roi.labels": torch.where(positive, labels, roi.num_classes)[sample.valid],
        "roi.label_weights": torch.ones_like(logits[sample.valid][:, 0]),
        "roi.bbox_targets": torch.where(positive[..., None], boxes, 0.0)[sample.valid],
    }
    for image, own in enumerate(positive):
        ours |= {
            f"roi.{image}.bboxes": regions[image][sample.valid[image]],
            f"roi.{image}.num_pos": own.sum(),
            f"roi.{image}.pos_inds": sample.index[image][own],
            f"roi.{image}.neg_inds": sample.index[image][sample.valid[image] & ~own],
            f"roi.{image}.pos_gt": sample.assigned[image][own],
        }
    return ours


def _of_atss(
    atss: ATSS, maps: list[Tensor], images: Images, objects: Objects, own_weight: float, place: int
) -> dict[str, Tensor]:
    shapes = shapes_of(maps)
    anchors = atss.anchors(shapes, objects.boxes_xyxy)
    assigned = atss.assign(anchors, shapes, images, objects)
    said = atss.predict(maps)
    assert said.quality is not None
    boxes, labels = objects.at(assigned)
    ours = {
        "atss.cls_score": said.logits,
        "atss.bbox_pred": said.steps,
        "atss.centerness": said.quality[..., None],
        "atss.anchors_valid_else_zero": torch.where(assigned[..., None] == OUTSIDE, 0.0, anchors),
    }
    for image, own in enumerate(assigned):
        ours |= {
            f"atss.{image}.labels": torch.where(own >= 0, labels[image], atss.num_classes),
            f"atss.{image}.pos_inds": (own >= 0).nonzero()[:, 0],
            f"atss.{image}.pos_boxes": boxes[image][own >= 0],
            f"atss.{image}.valid": own != OUTSIDE,
        }
    divisors = _atss_divisors(anchors, assigned, boxes)
    start = 0
    for level, (height, width) in enumerate(shapes):
        here = torch.zeros_like(assigned, dtype=torch.bool)
        here[:, start : start + height * width] = True
        part = torch.where(here, assigned, OUTSIDE)
        losses = atss.losses_of(said, anchors, part, objects)
        own_divisors = _atss_divisors(anchors, part, boxes)
        for name, official in (("class", "cls"), ("giou", "bbox"), ("centerness", "centerness")):
            value = losses[name] * own_divisors[name] / divisors[name] * atss.weights[name] * own_weight
            ours[f"loss.loss_{official}{place}.level{level}"] = value
        start += height * width
    return ours


def _atss_divisors(anchors: Tensor, assigned: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """What its losses are divided by."""
    matched = assigned >= 0
    count = matched.sum(1).clamp(min=1).sum()
    near = centerness_of(anchors.expand_as(boxes)[matched], boxes[matched]).sum().clamp(min=1)
    return {"class": count, "giou": near, "centerness": count}


def _of_positives(place: str, positives: Positives, classes: int) -> dict[str, Tensor]:
    matched = positives.matched
    ours = {
        "coords": positives.boxes,
        "labels": torch.where(matched, positives.labels, classes),
        "targets": torch.where(matched[..., None], positives.target_boxes, 0.0),
        "label_weights": positives.counted.to(positives.boxes.dtype),
        "feats": positives.features,
        "bbox_weights": matched[..., None].expand(-1, -1, 4).to(positives.boxes.dtype),
        **{f"src_index.{image}": one for image, one in enumerate(positives.index)},
    }
    return {f"{place}{name}": value for name, value in ours.items()}
