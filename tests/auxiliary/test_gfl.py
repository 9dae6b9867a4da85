"""GFL's losses against a loop over anchors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from detfamily.auxiliary import GFL
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.structures import OUTSIDE
from detfamily.blocks.denoising import Draws

from . import naive
from .checks import check_against_naive, scatter_weights
from .conftest import Batch


def small(reg_max: int = 3) -> GFL:
    head = GFL(
        [8, 16],
        embed_dim=8,
        num_classes=5,
        depth=1,
        num_groups=4,
        anchors=partial(Anchors, size=4, scales=1, ratios=(1.0,), scale=0.5),
        assigner=ATSSAssigner(4),
        weights={"class": 1.0, "giou": 2.0, "distribution": 0.25},
        selection=BestBoxes(0.5),
        reg_max=reg_max,
        beta=1.5,
    )
    return scatter_weights(head)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_losses(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    head, (maps, images, objects) = small(), batch(counts)
    shapes = [(6, 8), (3, 4)]
    anchors = head.anchors(shapes, objects.boxes_xyxy)
    assigned = head.assign(anchors, shapes, images, objects)
    predictions = head.predict(maps)
    wrong = apart = blurred = torch.zeros((), dtype=torch.float64)
    weights, clamped = 0.0, 0
    for image in range(2):
        for index, number in enumerate(assigned[image].tolist()):
            if number == OUTSIDE:
                continue
            logits = predictions.logits[image, index]
            if number < 0:
                wrong = wrong + naive.quality_focal(logits, None, 0.0, 1.5)
                continue
            stride = 8 if index < 48 else 16
            row, column = divmod(index, 8) if index < 48 else divmod(index - 48, 4)
            x, y, target = column * stride, row * stride, objects.boxes_xyxy[image, number]
            shares = predictions.steps[image, index].view(4, 4).softmax(-1)
            left, top, right, bottom = (sum(whole * row[whole] for whole in range(4)) * stride for row in shares)
            iou, giou = naive.iou_and_giou([x - left, y - top, x + right, y + bottom], target)
            wrong = wrong + naive.quality_focal(logits, int(objects.labels[image, number]), iou.item(), 1.5)
            weight = max(1 / (1 + torch.exp(-logit)).item() for logit in logits)
            apart = apart + weight * (1 - giou)
            edges = (x - target[0], y - target[1], target[2] - x, target[3] - y)
            for edge, share in zip(edges, shares, strict=True):
                distance = min(max(edge.item() / stride, 0.0), 2.9)
                clamped += edge.item() / stride != distance
                below = int(distance)
                near = distance - below
                blurred = blurred - weight / 4 * ((1 - near) * share[below].log() + near * share[below + 1].log())
            weights += weight
    divisor = sum(max(1, int((one >= 0).sum())) for one in assigned)
    sure = max(1.0, weights)
    wanted = {"class": wrong / divisor, "giou": apart / sure, "distribution": blurred / sure}
    check_against_naive(head(maps, images, objects, Draws()).losses, wanted, maps, head)
    assert bool(apart > 0) == (sum(counts) > 0)


def test_edges_farther_away_than_the_reg_max_distance(batch: Callable[..., Batch]) -> None:
    head, (maps, images, objects) = small(1), batch((3, 3))
    assert all(loss.isfinite() for loss in head(maps, images, objects, Draws()).losses.values())
    far = head._distances(torch.tensor([[-8.0, -8.0, 8.0, 8.0]]), torch.tensor([[-800.0, 1.0, 800.0, 4.0]]))
    torch.testing.assert_close(far, torch.tensor([[0.9, 0.0, 0.9, 0.5]]))
    with pytest.raises(ValueError, match="gfl.reg_max=0"):
        small(0)
