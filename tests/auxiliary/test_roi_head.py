"""The RoI head against the official step, and against loops over regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from detfamily.auxiliary.assigners import MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.samplers import RandomSampler
from detfamily.auxiliary.structures import BACKGROUND
from detfamily.blocks.denoising import Draws

from .checks import check_output
from .conftest import Batch, Golden, Stored

STDS = (0.1, 0.1, 0.2, 0.2)


def make(strides: Sequence[int] = (8, 16), finest: float = 12.0, scale: float = 1.0, count: int = 12) -> RoIHead:
    assigner, sampler = MaxIoUAssigner(0.5, 0.5), RandomSampler(count, 0.25)
    return RoIHead(strides, 8, 5, finest, 3, 6, DeltaCoder(STDS), assigner, sampler, BestBoxes(0.3, None), scale)


def small(count: int = 12) -> RoIHead:
    torch.manual_seed(1)
    head = make(count=count).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def regions_of(count: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    low = torch.rand(count, 2, dtype=torch.float64) * torch.tensor([30.0, 20.0])
    return torch.cat([low, low + 2 + 10 * torch.rand(count, 2, dtype=torch.float64)], 1)


def test_the_official_regions(golden: Golden) -> None:
    head, objects = golden.heads["faster_rcnn"].roi, golden.objects
    proposals = [golden[f"rpn.{image}.proposals"][:, :4] for image in range(2)]
    draws = Stored([None, golden.order(6), None, golden.order(7)])
    sample, regions = head.sample(proposals, objects, draws)
    pooled = head.pool(golden.maps, regions)
    check_output(pooled.flatten(0, 1).mean((-2, -1)), golden["roi.bbox_feats_mean"])
    check_output(pooled[0, :3], golden["roi.bbox_feats_first3"])
    logits, deltas = head.predict(pooled)
    check_output(logits.flatten(0, 1), golden["roi.cls_score"])
    check_output(deltas.flatten(0, 1).flatten(1), golden["roi.bbox_pred"])
    boxes, labels = objects.at(sample.assigned)
    positive = sample.positive
    assert torch.equal(torch.where(positive, labels, 7).flatten(), golden["roi.labels"])
    assert torch.equal(sample.valid.flatten(), golden["roi.label_weights"] == 1)
    check_output(torch.where(positive[..., None], boxes, 0.0).flatten(0, 1), golden["roi.bbox_targets"])
    for image in range(2):
        own = positive[image]
        check_output(regions[image], golden[f"roi.{image}.bboxes"])
        assert own.sum() == golden[f"roi.{image}.num_pos"]
        assert torch.equal(sample.index[image][own], golden[f"roi.{image}.pos_inds"])
        assert torch.equal(sample.index[image][~own], golden[f"roi.{image}.neg_inds"])
        assert torch.equal(sample.assigned[image][own], golden[f"roi.{image}.pos_gt"])


@pytest.mark.parametrize(
    ("width", "height", "level"), [(4, 4, 0), (23, 23, 0), (24, 24, 1), (12, 48, 1), (200, 200, 1), (0, 5, 0)]
)
def test_the_level_of_a_region(width: float, height: float, level: int) -> None:
    assert small().level_of(torch.tensor([[3.0, 5.0, 3 + width, 5 + height]])).tolist() == [level]


def bilinear(one: Tensor, y: float, x: float) -> Tensor:
    """(C,) between the centres of cells."""
    height, width = one.shape[1:]
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    b, r = y - top, x - left
    upper = (1 - r) * one[:, top, left] + r * one[:, top, right]
    lower = (1 - r) * one[:, bottom, left] + r * one[:, bottom, right]
    return (1 - b) * upper + b * lower


def test_features_of_regions(batch: Callable[..., Batch]) -> None:
    head, (maps, _, _) = small(), batch()
    regions = torch.tensor([[2.0, 3.0, 12.0, 9.0], [4.0, 1.0, 40.0, 33.0]], dtype=torch.float64)
    found = head.pool(maps, torch.stack([regions, regions.flip(0)]))
    for image in range(2):
        for slot, level in enumerate([0, 1] if image == 0 else [1, 0]):
            stride = head.strides[level]
            x0, y0, x1, y1 = (regions[level] / stride - 0.5).tolist()
            cell = ((y1 - y0) / 3, (x1 - x0) / 3)
            points = [math.ceil(side) for side in cell]
            for row in range(3):
                for column in range(3):
                    sampled = [
                        bilinear(
                            maps[level][image],
                            y0 + cell[0] * (row + (i + 0.5) / points[0]),
                            x0 + cell[1] * (column + (j + 0.5) / points[1]),
                        )
                        for i in range(points[0])
                        for j in range(points[1])
                    ]
                    wanted = torch.stack(sampled).mean(0)
                    torch.testing.assert_close(found[image, slot, :, row, column], wanted)


def giou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    hull = math.prod(max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
    union = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (a, b)) - width * height
    return width * height / union - (hull - union) / hull


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_losses(batch: Callable[..., Batch], counts: tuple[int, int]) -> None:
    head, (maps, _, objects) = small(), batch(counts)
    # fewer regions than slots in the second image
    proposals = [torch.cat([objects.boxes_of(i) + 0.5, regions_of(count, i)]) for i, count in enumerate((20, 4))]
    losses, candidates = head(maps, proposals, objects, Draws(torch.Generator().manual_seed(2)))
    sample, regions = head.sample(proposals, objects, Draws(torch.Generator().manual_seed(2)))
    logits, deltas = head.predict(head.pool(maps, regions))
    wrong, apart = 0.0, 0.0
    for image in range(2):
        for slot in sample.valid[image].nonzero()[:, 0].tolist():
            number = int(sample.assigned[image, slot])
            label = int(objects.labels[image, number]) if number >= 0 else 5
            row = logits[image, slot].tolist()
            wrong += math.log(sum(math.exp(one) for one in row)) - row[label]
            if number < 0:
                continue
            dx, dy, dw, dh = (d * s for d, s in zip(deltas[image, slot, label].tolist(), STDS, strict=True))
            x0, y0, x1, y1 = regions[image, slot].tolist()
            x, y = (x0 + x1) / 2 + dx * (x1 - x0), (y0 + y1) / 2 + dy * (y1 - y0)
            w, h = (x1 - x0) * math.exp(dw), (y1 - y0) * math.exp(dh)
            found = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            apart += 1 - giou(found, objects.boxes_xyxy[image, number].tolist())
    total = int(sample.valid.sum())
    assert losses["class"].item() == pytest.approx(wrong / total)
    assert losses["giou"].item() == pytest.approx(apart / total, rel=1e-5)
    sum(losses.values(), torch.zeros(())).backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in head.parameters())
    assert (apart > 0) == (counts[0] > 0)
    # as many as the image with the fewest has
    assert candidates.usable.sum(1).tolist() == [int(sample.valid.sum(1).min())] * 2
    assert candidates.features.shape == (2, 12, 8)


def test_no_regions_at_all(batch: Callable[..., Batch]) -> None:
    head, (maps, images, objects) = small(), batch((0, 0))
    none = torch.zeros(0, 4, dtype=torch.float64)
    losses, candidates = head(maps, [none, none], objects, Draws())
    assert losses["class"].item() == losses["giou"].item() == 0
    assert not candidates.usable.any() and (candidates.assigned == BACKGROUND).all()
    assert [len(one.scores) for one in head.detect(maps, [none, none], images)] == [0, 0]


def test_bfloat16(batch: Callable[..., Batch]) -> None:
    head, (maps, _, _) = small(), batch()
    regions = torch.stack([regions_of(6, 0), regions_of(6, 1)])
    wanted, _ = head.predict(head.pool(maps, regions))
    with torch.autocast("cpu", torch.bfloat16):
        pooled = head.float().pool([one.bfloat16() for one in maps], regions.float())
        logits, deltas = head.predict(pooled)
    assert pooled.dtype == logits.dtype == deltas.dtype == torch.float32
    assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_the_scale_of_small_images() -> None:
    whole, half = make(finest=10.0), make(finest=20.0, scale=0.5)
    boxes = torch.cat([regions_of(20, 3), 3 * regions_of(20, 4)])
    levels = whole.level_of(boxes)
    assert torch.equal(half.level_of(boxes), levels) and levels.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("strides", "finest", "scale", "named"),
    [([], 56.0, 1.0, "strides"), ([4], 0.0, 1.0, "finest_scale"), ([4], 56.0, 0.0, "finest_scale=56.0, roi.scale")],
)
def test_numbers_out_of_range(strides: list[int], finest: float, scale: float, named: str) -> None:
    with pytest.raises(ValueError, match=f"roi.{named}"):
        make(strides, finest, scale)
