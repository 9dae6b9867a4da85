"""The proposal network against the official step, and its losses against a loop over the sampled anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.samplers import RandomSampler
from detfamily.blocks.denoising import Draws

from .checks import check_output, overlap
from .conftest import SHAPES, Batch, Golden


def small(**settings: Any) -> RPN:
    torch.manual_seed(1)
    anchors = partial(Anchors, size=2, scales=2, ratios=(0.5, 1.0))
    assigner, sampler = MaxIoUAssigner(0.5, 0.3, 0.2), RandomSampler(24, 0.5)
    rpn = RPN([8, 16], 8, anchors, DeltaCoder(), assigner, sampler, **settings).double()
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return rpn


def test_what_it_says_of_the_anchors(golden: Golden) -> None:
    logits, deltas = golden.heads["faster_rcnn"].rpn.predict(golden.maps)
    start = sum(9 * h * w for h, w in SHAPES[:2])  # the finest two are not stored
    for level, (height, width) in list(enumerate(SHAPES))[2:]:
        own = slice(start, start + 9 * height * width)
        stored = golden[f"rpn.cls.{level}"].permute(0, 2, 3, 1).flatten(1)
        check_output(logits[:, own], stored)
        check_output(deltas[:, own], golden[f"rpn.reg.{level}"].permute(0, 2, 3, 1).reshape(2, -1, 4))
        start = own.stop


def test_the_official_sample_and_proposals(golden: Golden) -> None:
    rpn, objects = golden.heads["faster_rcnn"].rpn, golden.objects
    anchors = rpn.anchors(SHAPES, objects.boxes_xyxy)
    sample = rpn.sample(anchors, SHAPES, golden.images, objects, golden.draws("faster_rcnn"))
    with torch.no_grad():
        logits, deltas = rpn.predict(golden.maps)
    proposals = rpn.propose(logits, deltas, anchors, SHAPES, golden.images, rpn.per_level)
    for image in range(2):
        positive = sample.positive[image]
        assert sample.valid[image].all()
        assert torch.equal(sample.index[image][positive], golden[f"rpn.{image}.pos_inds"])
        assert torch.equal(sample.index[image][~positive], golden[f"rpn.{image}.neg_inds"])
        assert torch.equal(sample.assigned[image][positive], golden[f"rpn.{image}.pos_gt"])
        check_output(proposals[image], golden[f"rpn.{image}.proposals"])


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_losses(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    rpn = small()
    maps, images, objects = batch(counts)
    losses, _ = rpn(maps, images, objects, Draws(torch.Generator().manual_seed(3)))
    shapes = [(6, 8), (3, 4)]
    anchors = rpn.anchors(shapes, objects.boxes_xyxy)
    sample = rpn.sample(anchors, shapes, images, objects, Draws(torch.Generator().manual_seed(3)))
    logits, deltas = rpn.predict(maps)
    wrong, far, total = 0.0, 0.0, 0
    for image, number in enumerate(counts):
        kinds = [0, 0]
        for index, assigned in zip(sample.index[image].tolist(), sample.assigned[image].tolist(), strict=True):
            logit = logits[image, index].item()
            kinds[assigned >= 0] += 1
            assert assigned < number
            if assigned < 0:
                wrong += math.log1p(math.exp(logit))
                continue
            wrong += math.log1p(math.exp(-logit))
            left, top, right, bottom = objects.boxes_xyxy[image, assigned].tolist()
            x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            x0, y0, x1, y1 = anchors[index].tolist()
            step = [(x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0)]
            step += [math.log(w / (x1 - x0)), math.log(h / (y1 - y0))]
            far += sum(abs(a - b) for a, b in zip(deltas[image, index].tolist(), step, strict=True))
        total += max(1, kinds[0]) + max(1, kinds[1])
    assert losses["class"].item() == pytest.approx(wrong / total)
    assert losses["l1"].item() == pytest.approx(far / total)
    sum(losses.values(), torch.zeros(())).backward()
    gradients = [one.grad for one in rpn.parameters()]
    assert all(one is not None and one.isfinite().all() for one in gradients)
    assert counts[0] == 0 or far > 0


@pytest.mark.parametrize("per_level", [60, 40])
def test_proposals(batch: Callable[..., Batch], per_level: int) -> None:
    rpn = small(per_level=60, proposals=15, nms_iou=0.4, test_per_level=40)
    maps, images, objects = batch()
    logits, deltas = rpn.predict(maps)
    shapes, counts = [(6, 8), (3, 4)], [6 * 8 * 4, 3 * 4 * 4]
    anchors = rpn.anchors(shapes, logits)
    found = rpn(maps, images, objects, Draws())[1] if per_level == 60 else rpn.detect(maps, images)
    for image, (height, width) in enumerate(images.sizes):
        boxes = rpn.coder.decode(anchors, deltas[image])
        boxes = torch.stack([b.clamp(0, end) for b, end in zip(boxes.unbind(1), (width, height) * 2, strict=True)], 1)
        wanted: list[tuple[float, Tensor]] = []
        for scores, of_level in zip(logits[image].split(counts), boxes.split(counts), strict=True):
            kept: list[tuple[float, Tensor]] = []
            for index in scores.argsort(descending=True)[:per_level]:
                box = of_level[index]
                if (box[2:] > box[:2]).all() and all(overlap(box.tolist(), other.tolist()) <= 0.4 for _, other in kept):
                    kept.append((scores[index].item(), box))
            wanted += kept
        wanted.sort(key=lambda one: -one[0])
        torch.testing.assert_close(found[image], torch.stack([box for _, box in wanted[:15]]))
        assert not found[image].requires_grad


def test_bfloat16(batch: Callable[..., Batch]) -> None:
    rpn = small().float()
    maps, _, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits, deltas = rpn.predict([one.float() for one in maps])
    assert logits.dtype == deltas.dtype == torch.float32
    wanted, _ = rpn.double().predict(maps)
    assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_errors(batch: Callable[..., Batch]) -> None:
    maps, images, objects = batch()
    for wrong in (lambda: small()(maps[:1], images, objects, Draws()), lambda: small().detect(maps[:1], images)):
        with pytest.raises(ValueError, match="rpn got 1 maps and has 2 strides"):
            wrong()
    for settings, named in (
        ({"per_level": 0}, "per_level"),
        ({"test_per_level": 0}, "per_level=4000, rpn.test_per_level"),
        ({"proposals": 0}, "proposals"),
        ({"nms_iou": 0.0}, "nms"),
    ):
        with pytest.raises(ValueError, match=f"rpn.{named}"):
            small(**settings)
