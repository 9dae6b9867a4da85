"""Faster R-CNN as a head, against a step of the official code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from detfamily.auxiliary import FasterRCNN
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.positives import PositiveQueries
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.samplers import RandomSampler
from detfamily.blocks.denoising import Draws

from .checks import check_gradient, check_loss, check_output
from .conftest import Batch, Golden

OFFICIAL = {
    "rpn/class": "loss_rpn_cls",
    "rpn/l1": "loss_rpn_bbox",
    "roi/class": "loss_cls0",
    "roi/giou": "loss_bbox0",
}


def test_the_official_losses_gradients_and_queries(golden: Golden) -> None:
    head = golden.heads["faster_rcnn"]
    found = head(golden.maps, golden.images, golden.targets, golden.draws("faster_rcnn"))
    weighted = {name: loss * golden.weight(OFFICIAL[name]) for name, loss in found.losses.items()}
    assert set(weighted) == set(OFFICIAL)
    for name, loss in weighted.items():
        check_loss(loss, golden[f"loss.{OFFICIAL[name]}"])
    sum(weighted.values()).backward()
    own = {f"faster_rcnn.{name}": one.grad for name, one in head.named_parameters()}
    stored = golden.gradients(("rpn_head.", "roi_head."))
    assert set(own) == set(stored)
    for name, gradient in stored.items():
        check_gradient(own[name], gradient, name)
    queries = found.positives
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


def small(*strides: int) -> FasterRCNN:
    rpn = RPN(8, Anchors([8, 16], 2, 1, (1.0,)), DeltaCoder(), MaxIoUAssigner(0.5, 0.3, 0.2), RandomSampler(24, 0.5))
    sampler = RandomSampler(12, 0.25)
    roi = RoIHead(8, 5, strides, 12.0, 3, 6, DeltaCoder(), MaxIoUAssigner(0.5, 0.5), sampler)
    return FasterRCNN(rpn, roi, PositiveQueries(6, 2)).double()


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_images_with_and_without_objects(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    maps, images, targets = batch(counts)
    found = small(8)(maps, images, targets, Draws())
    sum(found.losses.values(), found.positives.features.sum()).backward()
    # the coarsest map is for proposals alone
    assert all(one.grad is not None and one.grad.isfinite().all() and one.grad.any() for one in maps)
    assert found.positives.matched.any(1).tolist() == [count > 0 for count in counts]
    assert found.positives.counted.all() and found.positives.boxes.isfinite().all()
    for image, count in enumerate(counts):
        answered = found.positives.target_boxes[image][found.positives.matched[image]]
        away = (answered[:, None] - targets.boxes[image, :count]).abs().amax(-1)
        assert (away < 1e-9).sum(1).tolist() == [1] * len(answered)


def test_levels_that_do_not_fit(batch: Callable[..., Batch]) -> None:
    with pytest.raises(ValueError, match=r"roi.strides=\[4, 8\]: expected the first ones"):
        small(4, 8)
    maps, images, targets = batch()
    with pytest.raises(ValueError, match="got 3 maps"):
        small(8)([*maps, maps[1]], images, targets, Draws())
