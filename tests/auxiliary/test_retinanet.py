"""RetinaNet's losses against a loop over anchors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from detfamily.auxiliary import RetinaNet
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.structures import IGNORED, OUTSIDE
from detfamily.blocks.denoising import Draws

from . import naive
from .checks import check_against_naive, scatter_weights
from .conftest import Batch


def small(negative_iou: float = 0.3) -> RetinaNet:
    head = RetinaNet(
        [8, 16],
        embed_dim=8,
        num_classes=5,
        depth=1,
        num_groups=4,
        anchors=partial(Anchors, size=2, scales=1, ratios=(0.5, 1.0)),
        coder=DeltaCoder(),
        assigner=MaxIoUAssigner(0.5, negative_iou, 1e-6),
        weights={"class": 1.0, "giou": 1.0},
        selection=BestBoxes(0.5),
        alpha=0.3,
        gamma=1.5,
    )
    return scatter_weights(head)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_losses(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    head, (maps, images, objects) = small(), batch(counts)
    shapes = [(6, 8), (3, 4)]
    anchors = head.anchors(shapes, objects.boxes_xyxy)
    assigned = head.assign(anchors, shapes, images, objects)
    predictions = head.predict(maps)
    wrong = apart = torch.zeros((), dtype=torch.float64)
    for image in range(2):
        for index, number in enumerate(assigned[image].tolist()):
            if number in (IGNORED, OUTSIDE):
                continue
            label = int(objects.labels[image, number]) if number >= 0 else None
            wrong = wrong + naive.focal(predictions.logits[image, index], label, 0.3, 1.5)
            if number >= 0:
                box = naive.step(anchors[index], predictions.steps[image, index], (1, 1, 1, 1))
                apart = apart + 1 - naive.iou_and_giou(box, objects.boxes_xyxy[image, number])[1]
    divisor = sum(max(1, int((one >= 0).sum())) for one in assigned)
    found = head(maps, images, objects, Draws()).losses
    check_against_naive(found, {"class": wrong / divisor, "giou": apart / divisor}, maps, head)
    assert bool(apart > 0) == (sum(counts) > 0)


def test_anchors_that_are_neither_positive_nor_negative_become_no_queries(batch: Callable[..., Batch]) -> None:
    head, (maps, images, objects) = small(0.1), batch()
    assigned = (found := head(maps, images, objects, Draws()).candidates).assigned
    assert torch.equal(found.usable, assigned != IGNORED) and (assigned == IGNORED).any()
    # those in the padding do, as boxes without a size, and the anchors of a cell have the feature of the cell
    assert (found.boxes_xyxy[assigned == OUTSIDE] == 0).all() and (assigned[1] == OUTSIDE).any()
    assert found.boxes_xyxy.shape[1] == 2 * found.features.shape[1] == 2 * (6 * 8 + 3 * 4)
    assert torch.equal(found.features[1, 6 * 8 + 4 + 2], maps[1][1, :, 1, 2])
