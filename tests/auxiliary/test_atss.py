"""ATSS as a head, against a step of the official code and a loop over anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from detfamily.auxiliary import ATSS, PositiveQueries
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.structures import OUTSIDE
from detfamily.blocks.denoising import Draws

from .checks import check_gradient, check_loss, check_output
from .conftest import SHAPES, Batch, Golden

OFFICIAL = {"class": "loss_cls1", "giou": "loss_bbox1", "centerness": "loss_centerness1"}


def test_what_it_says_of_the_anchors(golden: Golden) -> None:
    logits, deltas, centerness = golden.heads["atss"].predict(golden.maps)
    check_output(logits, golden["atss.cls_score"])
    check_output(deltas, golden["atss.bbox_pred"])
    check_output(centerness, golden["atss.centerness"][..., 0])


def test_the_official_assignment(golden: Golden) -> None:
    head, objects = golden.heads["atss"], golden.objects
    anchors = head.anchors(SHAPES, objects.boxes_xyxy)
    assigned = head.assign(anchors, SHAPES, golden.images, objects)
    shown = torch.where(assigned[..., None] == OUTSIDE, 0.0, anchors)
    check_output(shown, golden["atss.anchors_valid_else_zero"])
    boxes, labels = objects.at(assigned)
    for image in range(2):
        matched = assigned[image] >= 0
        assert torch.equal(matched.nonzero()[:, 0], golden[f"atss.{image}.pos_inds"])
        assert torch.equal(assigned[image] != OUTSIDE, golden[f"atss.{image}.valid"])
        assert torch.equal(torch.where(matched, labels[image], 7), golden[f"atss.{image}.labels"])
        check_output(boxes[image][matched], golden[f"atss.{image}.pos_boxes"])


def test_the_official_losses_gradients_and_queries(golden: Golden) -> None:
    head = golden.heads["atss"]
    losses, queries = golden.step("atss")
    weighted = {name: loss * golden.weight(OFFICIAL[name]) for name, loss in losses.items()}
    assert set(weighted) == set(OFFICIAL)
    for name, loss in weighted.items():
        check_loss(loss, golden[f"loss.{OFFICIAL[name]}"])
    sum(weighted.values()).backward()
    own = {f"atss.{name}": one.grad for name, one in head.named_parameters()}
    stored = golden.gradients(("bbox_head.",))
    assert set(own) == set(stored)
    for name, gradient in stored.items():
        check_gradient(own[name], gradient, name)
    tokens = torch.cat([one.flatten(2).transpose(1, 2) for one in golden.maps], 1)
    for image in range(2):
        # the official ones come in their own order
        stored_index, order = golden[f"auxq.1.src_index.{image}"].sort()
        valid, index = golden[f"atss.{image}.valid"], queries.index[image]
        # the case tells anchors by their boxes, which are the same for all in the padding
        index, own_order = torch.where(valid[index], index, (~valid).nonzero()[0]).sort()
        assert torch.equal(index, stored_index)
        check_output(queries.boxes[image][own_order], golden["auxq.1.coords"][image][order])
        matched = queries.matched[image][own_order]
        assert torch.equal(matched, golden["auxq.1.bbox_weights"][image][order].bool().all(-1))
        labels = golden["auxq.1.labels"][image][order]
        assert torch.equal(queries.labels[image][own_order][matched], labels[matched])
        check_output(queries.target_boxes[image][own_order][matched], golden["auxq.1.targets"][image][order][matched])
        assert torch.equal(queries.features[image], tokens[image][queries.index[image]])


def small(depth: int) -> ATSS:
    torch.manual_seed(1)
    head = ATSS(
        [8, 16],
        embed_dim=8,
        num_classes=5,
        depth=depth,
        num_groups=4,
        anchors=partial(Anchors, size=2, scales=1, ratios=(1.0,)),
        coder=DeltaCoder(),
        assigner=ATSSAssigner(4),
        weights={"class": 1.0, "giou": 2.0, "centerness": 1.0},
        selection=BestBoxes(0.4),
        alpha=0.3,
        gamma=1.5,
    ).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("depth", [0, 2])
def test_losses(batch: Callable[..., Batch], counts: tuple[int, int], depth: int) -> None:
    head, (maps, images, objects) = small(depth), batch(counts)
    found, shapes = head(maps, images, objects, Draws()), [(6, 8), (3, 4)]
    anchors = head.anchors(shapes, objects.boxes_xyxy)
    assigned = head.assign(anchors, shapes, images, objects)
    logits, deltas, centerness = head.predict(maps)
    boxes = head.coder.decode(anchors, deltas)
    focal, apart, unsure, weights = 0.0, 0.0, 0.0, 0.0
    for image in range(2):
        for index, number in enumerate(assigned[image].tolist()):
            if number == OUTSIDE:
                continue
            for column, logit in enumerate(logits[image, index].tolist()):
                p = 1 / (1 + math.exp(-logit))
                if number >= 0 and objects.labels[image, number] == column:
                    focal -= 0.3 * (1 - p) ** 1.5 * math.log(p)
                else:
                    focal -= 0.7 * p**1.5 * math.log(1 - p)
            if number < 0:
                continue
            (x0, y0, x1, y1), target = anchors[index].tolist(), objects.boxes_xyxy[image, number].tolist()
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            left, top, right, bottom = x - target[0], y - target[1], target[2] - x, target[3] - y
            across, down = min(left, right) / max(left, right), min(top, bottom) / max(top, bottom)
            weight = math.sqrt(across * down)
            a = boxes[image, index].tolist()
            sides = [max(0.0, min(a[i + 2], target[i + 2]) - max(a[i], target[i])) for i in (0, 1)]
            hull = math.prod(max(a[i + 2], target[i + 2]) - min(a[i], target[i]) for i in (0, 1))
            union = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (a, target)) - math.prod(sides)
            apart += weight * (1 - math.prod(sides) / union + (hull - union) / hull)
            p = 1 / (1 + math.exp(-centerness[image, index].item()))
            unsure -= weight * math.log(p) + (1 - weight) * math.log(1 - p)
            weights += weight
    divisor = sum(max(1, int((one >= 0).sum())) for one in assigned)
    assert found.losses["class"].item() == pytest.approx(focal / divisor)
    assert found.losses["giou"].item() == pytest.approx(apart / max(1.0, weights), rel=1e-5)
    assert found.losses["centerness"].item() == pytest.approx(unsure / divisor)
    assert (weights > 0) == (sum(counts) > 0)
    queries = PositiveQueries(6, 2)(found.candidates, objects, images, Draws())
    sum(found.losses.values(), queries.features.sum()).backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in (*maps, *head.parameters()))
    assert queries.matched.any(1).tolist() == [count > 0 for count in counts]
