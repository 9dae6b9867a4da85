"""FCOS's losses against a loop over cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from detfamily.auxiliary import FCOS
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import CenterAssigner
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.structures import OUTSIDE
from detfamily.blocks.denoising import Draws

from . import naive
from .checks import check_against_naive, scatter_weights
from .conftest import Batch


def small() -> FCOS:
    head = FCOS(
        [8, 16],
        embed_dim=8,
        num_classes=5,
        depth=1,
        num_groups=4,
        anchors=partial(Anchors, size=4, scales=1, ratios=(1.0,), scale=0.5, offset=0.5),
        assigner=partial(CenterAssigner, radius=1.0),
        weights={"class": 1.0, "giou": 1.0, "centerness": 1.0},
        selection=BestBoxes(0.5),
        alpha=0.3,
        gamma=1.5,
    )
    return scatter_weights(head)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_losses(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    head, (maps, images, objects) = small(), batch(counts)
    assert head.assigner.size == 2 and head.assigner.strides == (8, 16)
    shapes = [(6, 8), (3, 4)]
    squares = head.anchors(shapes, objects.boxes_xyxy)
    assigned = head.assign(squares, shapes, images, objects)
    predictions = head.predict(maps)
    assert predictions.quality is not None
    wrong = apart = unsure = torch.zeros((), dtype=torch.float64)
    positives, weights = 0, 0.0
    for image in range(2):
        for index, number in enumerate(assigned[image].tolist()):
            if number == OUTSIDE:
                continue
            label = int(objects.labels[image, number]) if number >= 0 else None
            wrong = wrong + naive.focal(predictions.logits[image, index], label, 0.3, 1.5)
            if number < 0:
                continue
            stride = 8 if index < 48 else 16
            row, column = divmod(index, 8) if index < 48 else divmod(index - 48, 4)
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            left, top, right, bottom = predictions.steps[image, index].clamp(min=0) * stride
            target = objects.boxes_xyxy[image, number]
            weight = naive.centerness(torch.tensor([x, y, x, y]), target)
            apart = apart + weight * (1 - naive.iou_and_giou([x - left, y - top, x + right, y + bottom], target)[1])
            unsure = unsure + naive.binary(predictions.quality[image, index], weight)
            positives, weights = positives + 1, weights + weight
    total = max(1, positives)
    wanted = {"class": wrong / total, "giou": apart / max(weights, 1e-6), "centerness": unsure / total}
    check_against_naive(head(maps, images, objects, Draws()).losses, wanted, maps, head)
    assert (positives > 0) == (sum(counts) > 0)


def test_squares_around_the_middle_of_cells_become_queries(batch: Callable[..., Batch]) -> None:
    head, (maps, images, objects) = small(), batch()
    found = head(maps, images, objects, Draws()).candidates
    assert found.boxes_xyxy[0, 8 + 2].tolist() == [20 - 8, 12 - 8, 20 + 8, 12 + 8]
    assert found.boxes_xyxy[0, 48 + 4 + 1].tolist() == [24 - 16, 24 - 16, 24 + 16, 24 + 16]
    assert found.usable.all() and (found.boxes_xyxy[found.assigned == OUTSIDE] == 0).all()
