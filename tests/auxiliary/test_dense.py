"""What dense heads have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detfamily.auxiliary import ATSS, FCOS, GFL, PAA, PositiveQueries, RetinaNet
from detfamily.auxiliary.dense import DenseHead
from detfamily.blocks.denoising import Draws

from .checks import check_detections, detections, scatter_weights
from .conftest import Batch
from .test_configs import head_of

HEADS = [ATSS, FCOS, GFL, PAA, RetinaNet]


def small(kind: type[DenseHead], **settings: Any) -> DenseHead:
    """The published head, narrow, for the maps of ``batch``."""
    head = head_of(kind.name, {"num_groups": 4} | settings, {"embed_dim": 8, "anchor_scale": 0.25}, [8, 16])
    assert isinstance(head, kind)
    return scatter_weights(head)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_images_with_and_without_objects(
    batch: Callable[..., Batch], kind: type[DenseHead], counts: tuple[int, int]
) -> None:
    head, (maps, images, objects) = small(kind), batch(counts)
    draws = Draws()
    found = head(maps, images, objects, draws)
    assert tuple(found.losses) == head.losses == tuple(head.weights)
    queries = PositiveQueries(6, 2)(found.candidates, objects, images, draws)
    sum(found.losses.values(), queries.features.sum()).backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in (*maps, *head.parameters()))
    assert queries.matched.any(1).tolist() == [count > 0 for count in counts]
    assert queries.counted.all() and queries.boxes.isfinite().all()


@pytest.mark.parametrize("kind", HEADS)
def test_what_it_detects_alone(batch: Callable[..., Batch], kind: type[DenseHead]) -> None:
    settings = {"selection": {"per_level": 50, "num_select": 12, "voting": None}, "anchors": {"scales": 1}}
    head, (maps, images, _) = small(kind, **settings), batch()
    shapes, predictions = [(6, 8), (3, 4)], head.predict(maps)
    anchors = head.anchors(shapes, predictions.logits)
    found = head.detect(maps, images)
    for image, size in enumerate(images.sizes):
        inside, counts = head.anchors.inside(shapes, size, anchors.device)
        boxes = head.decode(anchors, predictions.steps[image])[inside]
        scores = predictions.logits[image, inside].sigmoid()
        factors = (
            torch.ones(len(inside)) if predictions.quality is None else predictions.quality[image, inside].sigmoid()
        )
        if kind is PAA:
            scores, factors = (scores * factors[:, None]).sqrt(), torch.ones(len(inside))
        levels = zip(*(one.split(counts) for one in (scores, boxes, factors)), strict=True)
        check_detections(found[image], detections(levels, images, image, head.selection.nms_iou, 50, 12))
        assert not found[image].scores.requires_grad


@pytest.mark.parametrize("kind", HEADS)
def test_bfloat16(batch: Callable[..., Batch], kind: type[DenseHead]) -> None:
    head, (maps, images, objects) = small(kind), batch()
    wanted = head(maps, images, objects, Draws()).losses
    with torch.autocast("cpu", torch.bfloat16):
        found = head.float()([one.float() for one in maps], images, objects, Draws()).losses
    for name, loss in found.items():
        assert loss.item() == pytest.approx(wanted[name].item(), rel=0.05)


@pytest.mark.parametrize("kind", [ATSS, FCOS, GFL])
def test_divisors_are_means_over_processes(
    batch: Callable[..., Batch], kind: type[DenseHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    (maps, images, objects), head, found = batch(), small(kind), []
    for factor in (100, 200):  # far from the least that they may be
        monkeypatch.setattr(
            f"{kind.losses_of.__module__}.mean_over_processes", lambda one, factor=factor: factor * one.detach()
        )
        found.append(head(maps, images, objects, Draws()).losses)
    for name, loss in found[0].items():
        assert loss.item() == pytest.approx(2 * found[1][name].item()) and loss > 0


@pytest.mark.parametrize("kind", HEADS)
def test_how_they_start(kind: type[DenseHead]) -> None:
    head = head_of(kind.name, model={"embed_dim": 64})
    assert isinstance(head, kind)
    assert head.class_head.bias.sigmoid().tolist() == pytest.approx([0.01] * len(head.class_head.bias))
    layers = [one for one in head.modules() if isinstance(one, torch.nn.Conv2d)]
    assert all(one.weight.std().item() == pytest.approx(0.01, rel=0.1) for one in layers)
    assert not any(one.bias.any() for one in layers if one is not head.class_head and one.bias is not None)
    assert len(head.scales) == 3 and all(one == 1.0 for one in head.scales)


@pytest.mark.parametrize("kind", HEADS)
def test_errors(batch: Callable[..., Batch], kind: type[DenseHead]) -> None:
    (maps, images, objects), head = batch(), small(kind)
    for wrong in (lambda: head(maps[:1], images, objects, Draws()), lambda: head.detect(maps[:1], images)):
        with pytest.raises(ValueError, match=f"{kind.name} got 1 maps and has 2 strides"):
            wrong()
    with pytest.raises(ValueError, match=f"{kind.name}.num_groups=3 does not divide embed_dim=8"):
        small(kind, num_groups=3)
    with pytest.raises(ValueError, match=rf"{kind.name}.depth=-1"):
        small(kind, depth=-1)
    if kind is RetinaNet:
        assert small(kind, anchors={"scales": 2}).anchors.per_cell == 6
        return
    with pytest.raises(ValueError, match=f"{kind.name}.anchors has 2 anchors at a cell"):
        small(kind, anchors={"scales": 2})
