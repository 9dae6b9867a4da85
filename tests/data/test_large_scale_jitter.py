from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from detfamily.blocks.postprocess import SigmoidScores, TopK
from detfamily.config import build, compose
from detfamily.data.batches import collate
from detfamily.data.large_scale_jitter import LargeScaleJitter, PadToSquare, ResizeToFit, fitted_size, on_canvas
from detfamily.data.masks import boxes_around, rectangles
from detfamily.data.transforms import Sample
from detfamily.structures import Predictions


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(height: int = 60, width: int = 90, with_masks: bool = False) -> Sample:
    """Three boxes, the first of which is painted white on black."""
    boxes = torch.tensor([[10.0, 20, 40, 50], [0, 0, 90, 60], [70, 5, 80, 6]])
    image = torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    image[:, 20:50, 10:40] = 255
    labels, area = torch.arange(3), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    masks = rectangles(boxes, (height, width)) if with_masks else None
    return Sample(image, boxes, labels, area, torch.zeros_like(labels), 5, (height, width), masks)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((480, 640), 1024, (768, 1024)),
        ((427, 640), 1024, (683, 1024)),  # 683.2
        ((640, 426), 1280, (1280, 852)),
        ((427, 640), 102, (68, 102)),  # 68.05
        ((500, 375), 1001, (1001, 751)),  # 750.75
        ((1, 4000), 100, (1, 100)),
    ],
)
def test_sizes_are_those_of_mmcv(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    assert fitted_size(size, side) == expected


@pytest.mark.parametrize("with_masks", [False, True])
def test_jitter_covers_its_range_and_keeps_boxes_on_their_pixels(with_masks: bool) -> None:
    jitter, generator = LargeScaleJitter(100, (0.1, 2.0)), rng()
    heights, cut = [], 0
    for _ in range(200):
        after = jitter(sample(with_masks=with_masks), generator)
        height, width = after.size
        assert height <= 100 and width <= 100
        heights.append(height)
        cut += width == 100
        for label, box in zip(after.labels.tolist(), after.boxes.tolist(), strict=True):
            if label == 1:
                assert box == pytest.approx([0, 0, width, height])
            if label == 0 and min(box[2] - box[0], box[3] - box[1]) > 3:
                white = boxes_around((after.image[0] >= 128)[None])[0].tolist()
                assert white == pytest.approx(box, abs=1.01)
        if with_masks:
            assert after.masks is not None and torch.equal(boxes_around(after.masks), after.boxes)
    assert min(heights) < 12 and max(heights) == 100
    assert 70 < cut < 140  # a scale above 1, of 0.1 to 2: 105 of 200


def test_jitter_cuts_at_every_place() -> None:
    jitter, generator = LargeScaleJitter(30, (2.0, 2.0)), rng()
    image = torch.arange(60)[None, None].expand(3, 40, 60).to(torch.uint8)
    wide = replace(sample(), image=image, boxes=torch.zeros(3, 4))
    lefts = {int(jitter(wide, generator).image[0, 0, 0]) for _ in range(400)}
    assert lefts == set(range(31))


def test_objects_below_the_least_side_are_dropped() -> None:
    tiny = replace(sample(), boxes=torch.tensor([[10.0, 20, 40, 50], [0, 0, 0.9, 60], [0, 0, 90, 0.91]]))
    assert LargeScaleJitter(90, (0.1, 0.1), min_side=0.0905)(tiny, rng()).labels.tolist() == [0, 2]


def test_padding_is_grey_and_counts_as_image() -> None:
    after = PadToSquare(100)(sample(with_masks=True), rng())
    assert after.size == (100, 100) and after.original_size == (60, 90)
    assert torch.equal(after.image[:, :60, :90], sample().image)
    assert (after.image[:, 60:] == 114).all() and (after.image[:, :, 90:] == 114).all()
    assert after.image.permute(1, 2, 0).is_contiguous()
    assert torch.equal(after.boxes, sample().boxes)
    assert after.masks is not None and torch.equal(boxes_around(after.masks), after.boxes)
    batch = collate([after])
    assert batch.images.sizes == ((100, 100),) and not batch.images.padded and not batch.images.padding_mask.any()
    assert torch.allclose(batch.targets.boxes[0, 0], torch.tensor([0.25, 0.35, 0.3, 0.3]))


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (333, 1000), (64, 64)])
def test_detections_come_back_in_pixels_of_the_image_on_disk(size: tuple[int, int]) -> None:
    """Ground truth, made to targets by the recipe's test transform and given back as predictions."""
    test = build(compose("train", ["augmentation=lsj", "augmentation.image_size=256"]).augmentation.test)
    boxes = torch.tensor([[0.0, 0, size[1], size[0]], [10.25, 20.5, 50, 60], [40, 5, size[1] - 1, size[0] - 3]])
    image = torch.zeros(3, *size, dtype=torch.uint8)
    batch = collate([test(Sample(image, boxes, torch.arange(3), boxes[:, 0], torch.zeros(3), 1, size), rng())])
    logits = torch.full((1, 1, 3, 3), -9.0)
    logits[0, 0].fill_diagonal_(3.0)
    logits[0, 0] += torch.tensor([0.2, 0.1, 0])[:, None]
    said = {"match": Predictions(logits, batch.targets.boxes[None])}
    for clip in (False, True):
        (found,) = TopK(SigmoidScores(), num_select=3, clip=clip)(said, batch.images)
        assert found.labels.tolist() == [0, 1, 2]
        torch.testing.assert_close(found.boxes_xyxy, boxes, rtol=0, atol=2e-3)
    everything = {"match": Predictions(logits[..., :1, :], torch.tensor([0.5, 0.5, 1, 1]).expand(1, 1, 1, 4))}
    (canvas,) = TopK(SigmoidScores(), num_select=1)(everything, batch.images)
    assert float(canvas.boxes_xyxy[0, 2 + (size[0] > size[1])]) == pytest.approx(max(size))
    assert canvas.boxes_xyxy[0, 2:].tolist() == pytest.approx([max(size)] * 2, rel=0.005)
    (clipped,) = TopK(SigmoidScores(), num_select=1, clip=True)(everything, batch.images)
    assert clipped.boxes_xyxy[0].tolist() == pytest.approx([0, 0, size[1], size[0]])


def test_the_canvas_shows_what_boxes_span() -> None:
    image = sample().image
    after = PadToSquare(300)(ResizeToFit(180)(sample(), rng()), rng())
    assert after.canvas_size == (150, 150)
    canvas = on_canvas(image, after.canvas_size)
    assert canvas.shape == (3, 150, 150)
    assert torch.equal(canvas[:, :60, :90], image) and (canvas[:, 60:] == 114).all()
    assert torch.equal(on_canvas(image, (60, 90)), image)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LargeScaleJitter(0), "side must be a length"),
        (lambda: LargeScaleJitter(9, (2.0, 1.0)), "0 < least <= largest"),
        (lambda: LargeScaleJitter(9, (0.0, 1.0)), "0 < least <= largest"),
        (lambda: LargeScaleJitter(9, [1.0]), "0 < least <= largest"),
        (lambda: ResizeToFit(-1), "side must be a length"),
        (lambda: PadToSquare(9, 256), "between 0 and 255"),
        (lambda: PadToSquare(80)(sample(), rng()), "90x60 pixels does not fit a square of 80"),
    ],
)
def test_bad_arguments_are_named(make: Callable[..., Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()
