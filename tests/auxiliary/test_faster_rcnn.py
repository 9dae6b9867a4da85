"""Faster R-CNN as a head, against a step of the official code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from detfamily.auxiliary import FasterRCNN, PositiveQueries
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.samplers import RandomSampler
from detfamily.blocks.boxes import to_cxcywh
from detfamily.blocks.denoising import Draws

from .checks import check_detections, check_gradient, check_loss, check_output, detections
from .conftest import Batch, Golden

OFFICIAL = {
    "rpn/class": "loss_rpn_cls",
    "rpn/l1": "loss_rpn_bbox",
    "roi/class": "loss_cls0",
    "roi/giou": "loss_bbox0",
}


def test_the_official_losses_gradients_and_queries(golden: Golden) -> None:
    head = golden.heads["faster_rcnn"]
    losses, queries = golden.step("faster_rcnn")
    weighted = {name: loss * golden.weight(OFFICIAL[name]) for name, loss in losses.items()}
    assert set(weighted) == set(OFFICIAL)
    for name, loss in weighted.items():
        check_loss(loss, golden[f"loss.{OFFICIAL[name]}"])
    sum(weighted.values()).backward()
    own = {f"faster_rcnn.{name}": one.grad for name, one in head.named_parameters()}
    stored = golden.gradients(("rpn_head.", "roi_head."))
    assert set(own) == set(stored)
    for name, gradient in stored.items():
        check_gradient(own[name], gradient, name)
    for image in range(2):
        # the official ones come in their own order
        stored_index, order = golden[f"auxq.0.src_index.{image}"].sort()
        index, own_order = queries.index[image].sort()
        assert torch.equal(index, stored_index)
        check_output(queries.boxes[image][own_order], golden["auxq.0.coords"][image][order])
        matched = queries.matched[image][own_order]
        assert torch.equal(matched, golden["auxq.0.bbox_weights"][image][order].bool().all(-1))
        assert queries.counted.all() and golden["auxq.0.label_weights"].all()
        labels = golden["auxq.0.labels"][image][order]
        assert torch.equal(queries.labels[image][own_order][matched], labels[matched])
        check_output(queries.target_boxes[image][own_order][matched], golden["auxq.0.targets"][image][order][matched])
        pooled = golden["roi.bbox_feats_mean"].view(2, -1, 32)[image][stored_index]
        check_output(queries.features[image][own_order], pooled)


WEIGHTS = {"rpn/class": 1.0, "rpn/l1": 1.0, "roi/class": 1.0, "roi/giou": 10.0}


def small(*strides: int) -> FasterRCNN:
    torch.manual_seed(1)
    rpn = partial(
        RPN,
        embed_dim=8,
        anchors=partial(Anchors, size=2, scales=1, ratios=(1.0,)),
        coder=DeltaCoder(),
        assigner=MaxIoUAssigner(0.5, 0.3, 0.2),
        sampler=RandomSampler(24, 0.5),
        test_per_level=20,
    )
    roi = partial(
        RoIHead,
        embed_dim=8,
        num_classes=5,
        finest_scale=12.0,
        resolution=3,
        hidden_dim=6,
        coder=DeltaCoder(),
        assigner=MaxIoUAssigner(0.5, 0.5),
        sampler=RandomSampler(12, 0.25),
        selection=BestBoxes(0.5, None, num_select=9),
    )
    return FasterRCNN(strides, rpn, roi, WEIGHTS).double()


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_images_with_and_without_objects(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    maps, images, objects = batch(counts)
    draws = Draws()
    found = small(8, 16)(maps, images, objects, draws)
    queries = PositiveQueries(6, 2)(found.candidates, objects, images, draws)
    assert set(found.losses) == set(WEIGHTS)
    sum(found.losses.values(), queries.features.sum()).backward()
    # the coarsest map is for proposals alone
    assert all(one.grad is not None and one.grad.isfinite().all() and one.grad.any() for one in maps)
    assert queries.matched.any(1).tolist() == [count > 0 for count in counts]
    assert queries.counted.all() and queries.boxes.isfinite().all()
    for image, (count, (height, width)) in enumerate(zip(counts, images.sizes, strict=True)):
        answered = queries.target_boxes[image][queries.matched[image]]
        extent = torch.tensor([width, height, width, height])
        away = (answered[:, None] * extent - to_cxcywh(objects.boxes_xyxy[image, :count])).abs().amax(-1)
        assert (away < 1e-6).sum(1).tolist() == [1] * len(answered)


def test_what_it_detects_alone(batch: Callable[..., Batch]) -> None:
    head, (maps, images, _) = small(8, 16), batch()
    with torch.no_grad():
        logits, deltas = head.rpn.predict(maps)
        anchors = head.rpn.anchors([(6, 8), (3, 4)], logits)
        proposals = [one[:, :4] for one in head.rpn.propose(logits, deltas, anchors, [(6, 8), (3, 4)], images, 20)]
        assert len(proposals[0]) != len(proposals[1])
        found = head.detect(maps, images)
        for image, own in enumerate(proposals):
            alone = [one[image : image + 1] for one in maps]
            logits, deltas = head.roi.predict(head.roi.pool(alone, own[None]))
            boxes = head.roi.coder.decode(own[:, None], deltas[0])
            level = (logits[0].softmax(-1)[:, :-1], boxes, torch.ones(len(own)))
            check_detections(found[image], detections([level], images, image, 0.5, len(own) * 5, 9))


def test_maps_that_do_not_fit(batch: Callable[..., Batch]) -> None:
    with pytest.raises(ValueError, match=r"faster_rcnn.strides=\[8\]: expected those of 2 maps or more"):
        small(8)
    maps, images, objects = batch()
    head, maps = small(8, 16), [*maps, maps[1]]
    for wrong in (lambda: head(maps, images, objects, Draws()), lambda: head.detect(maps, images)):
        with pytest.raises(ValueError, match="got 3 maps"):
            wrong()
