from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detfamily.data.masks import boxes_around
from detfamily.data.transforms import (
    Compose,
    RandomChannelPermutation,
    RandomChoice,
    RandomHorizontalFlip,
    RandomResize,
    RandomSizeCrop,
    RandomTranspose,
    RandomVerticalFlip,
    Resize,
    Sample,
    crop,
    flip_horizontally,
    flip_vertically,
    resize,
    resized_size,
    transpose,
)
from detfamily.parity.case import MUST_COMPARE, Case, role_of
from detfamily.parity.compare import error_ratio
from detfamily.parity.data_transforms import expected, results

HEIGHT, WIDTH = 37, 53


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """(3, H, W) laid out as decoders do: the colours of a pixel side by side."""
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=rng(5)).permute(2, 0, 1)


def sample_with(boxes: list[list[float]], image: Tensor | None = None) -> Sample:
    image = noise() if image is None else image
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    labels = torch.arange(len(corners))
    return Sample(image, corners, labels, area, torch.zeros_like(labels), 1, (image.shape[1], image.shape[2]))


def painted(boxes: list[list[int]], height: int = HEIGHT, width: int = WIDTH) -> Sample:
    """An image in which every box is filled with its own grey, its label + 1."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for label, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = label + 1
    return sample_with([[float(v) for v in box] for box in boxes], image)


def box_of(image: Tensor, label: int) -> list[float]:
    """Where a grey is found in an image: an independent way to the box."""
    rows, columns = np.nonzero(image[0].numpy() == label + 1)
    return [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def golden_cases(goldens: Path) -> list[Case]:
    return [Case.load(path.parent) for path in sorted(goldens.glob("detr/data_transforms*/case.json"))]


def test_official_results(goldens: Path) -> None:
    cases = golden_cases(goldens)
    assert cases
    for case in cases:
        ours = results(case.info, case.io)
        wanted = {key: value for key, value in case.io.items() if role_of(key, case.folder) in MUST_COMPARE}
        assert len(wanted) > 50
        for key, value in wanted.items():
            assert ours[key].dtype == value.dtype, key
            assert error_ratio(role_of(key, case.folder), value, ours[key], key) <= 1, key
        sizes = expected(case.info)
        assert len(sizes) > 200
        assert all(torch.equal(ours[key], value) for key, value in sizes.items())


def test_an_altered_golden_is_noticed(goldens: Path) -> None:
    case = golden_cases(goldens)[0]
    ours = results(case.info, case.io)
    altered = case.io["convert.0.boxes"].clone()
    altered[0, 0] += 0.1
    assert error_ratio("output", altered, ours["convert.0.boxes"], "convert.0.boxes") > 1
    case.info["data"]["resize_sizes"][3]["result_hw"][1] += 1
    assert not torch.equal(expected(case.info)["resize_sizes.3"], ours["resize_sizes.3"])


@pytest.mark.parametrize("size", [(24, 34), (56, 80), (37, 20), (100, 53)])
def test_resized_pixels_are_those_of_pil(size: tuple[int, int]) -> None:
    image = noise()
    ours = resize(sample_with([], image), size).image.permute(1, 2, 0).numpy()
    pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    difference = np.abs(ours.astype(int) - np.asarray(pil).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


def test_resizing_a_cropped_view_gives_the_pixels_of_its_copy() -> None:
    view = crop(sample_with([]), 3, 7, 30, 41)
    copy = replace(view, image=view.image.contiguous())
    assert torch.equal(resize(view, (48, 70)).image, resize(copy, (48, 70)).image)


def test_resize_keeps_boxes_on_their_pixels() -> None:
    doubled = resize(painted([[5, 4, 20, 30], [30, 10, 53, 37]]), (HEIGHT * 2, WIDTH * 3))
    assert doubled.boxes.tolist() == [[15, 8, 60, 60], [90, 20, 159, 74]]
    assert doubled.area.tolist() == [15 * 26 * 6, 23 * 27 * 6]
    assert doubled.original_size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("move", [flip_horizontally, flip_vertically, transpose])
def test_flips_move_boxes_with_their_pixels(move: Callable[..., Any]) -> None:
    before = painted([[5, 4, 20, 30], [30, 10, 53, 37], [0, 0, 3, 2]])
    after = move(before)
    assert [box_of(after.image, label) for label in range(3)] == after.boxes.tolist()
    assert not torch.equal(after.boxes, before.boxes)
    assert torch.equal(after.area, before.area)
    again = move(after)
    assert torch.equal(again.boxes, before.boxes)
    assert torch.equal(again.image, before.image)


@pytest.mark.parametrize(
    "change",
    [
        flip_horizontally,
        flip_vertically,
        transpose,
        lambda sample: crop(sample, 6, 10, 20, 30),
        lambda sample: resize(sample, (80, 160)),
        lambda sample: resize(sample, (12, 18)),
        lambda sample: RandomChannelPermutation()(sample, rng()),
    ],
)
def test_masks_stay_on_their_pixels(change: Callable[[Sample], Sample]) -> None:
    before = painted([[5, 4, 20, 30], [30, 10, 53, 37], [0, 0, 3, 2]])
    painted_masks = torch.stack([before.image[0] == label + 1 for label in range(3)])
    after = change(replace(before, image=(before.image > 0).byte() * 255, masks=painted_masks))
    assert after.masks is not None and after.masks.shape[1:] == after.size
    assert int((after.masks.any(0) ^ (after.image[0] >= 128)).sum()) <= 0.02 * after.image[0].numel()
    assert torch.allclose(boxes_around(after.masks), after.boxes, rtol=0, atol=0.51)


def test_crop_draws_boxes_around_what_is_left_of_masks() -> None:
    before = painted([[5, 4, 20, 30], [30, 10, 53, 37]])
    masks = torch.stack([before.image[0] == label + 1 for label in range(2)])
    masks[0, :, 8:] = False  # its box reaches into the region, its mask does not
    masks[1, 30:] = masks[1, :15] = False
    after = crop(replace(before, masks=masks), 6, 10, 31, 40)
    assert after.labels.tolist() == [1]
    assert after.boxes.tolist() == [[20, 9, 40, 24]]
    assert after.area.tolist() == [20 * 15]
    assert after.masks is not None and after.masks.shape == (1, 31, 40)


def test_crop_clamps_and_drops_boxes() -> None:
    before = painted([[5, 4, 20, 30], [30, 10, 53, 37], [0, 0, 3, 2], [40, 0, 53, 6]])
    after = crop(before, 6, 10, 20, 30)
    assert after.size == (20, 30)
    assert after.labels.tolist() == [0, 1]
    assert after.boxes.tolist() == [[0, 0, 10, 20], [20, 4, 30, 20]] == [box_of(after.image, i) for i in (0, 1)]
    assert after.area.tolist() == [200, 160]
    assert after.iscrowd.shape == (2,)


def test_every_transform_takes_images_without_objects() -> None:
    everything = Compose(
        [
            RandomHorizontalFlip(1),
            RandomVerticalFlip(1),
            RandomTranspose(1),
            RandomChannelPermutation(),
            RandomResize([40, 60], 90),
            RandomSizeCrop(20, 30),
            Resize(24, 100),
        ]
    )
    after = everything(sample_with([]), rng())
    assert after.boxes.shape == (0, 4)
    assert after.labels.shape == after.area.shape == after.iscrowd.shape == (0,)
    assert min(after.size) == 24


def test_extreme_sizes_of_the_rule() -> None:
    assert resized_size((183, 1228), 800, 1333) == (199, 1335)
    assert resized_size((10, 10_000), 800, 1333) == (1, 1000)
    assert resized_size((1, 10_000), 800, 1333) == (1, 10_000)
    assert resized_size((480, 640), 480, None) == (480, 640)


def test_resize_without_a_short_side_only_shrinks() -> None:
    assert Resize()(sample_with([]), rng()).size == (HEIGHT, WIDTH)
    assert Resize(max_size=1000)(sample_with([]), rng()).size == (HEIGHT, WIDTH)
    assert Resize(max_size=26)(sample_with([]), rng()).size == (18, 25)


def test_random_resize_takes_every_length_equally_often() -> None:
    draw, generator = RandomResize([10, 20, 30]), rng()
    counts = Counter(min(draw(sample_with([]), generator).size) for _ in range(600))
    assert sorted(counts) == [10, 20, 30]
    assert min(counts.values()) > 150


def test_random_crop_covers_its_range_and_leaves_small_sides_whole() -> None:
    draw, generator = RandomSizeCrop(30, 45), rng()
    sizes = [draw(sample_with([]), generator).size for _ in range(500)]
    assert {height for height, _ in sizes} == set(range(30, HEIGHT + 1))
    assert {width for _, width in sizes} == set(range(30, 46))
    small = RandomSizeCrop(384, 600)(sample_with([]), rng())
    assert small.size == (HEIGHT, WIDTH)


def test_crops_reach_every_edge() -> None:
    image = torch.zeros(3, 6, 6, dtype=torch.uint8)
    image[0] = torch.arange(36, dtype=torch.uint8).reshape(6, 6)
    draw, generator = RandomSizeCrop(2, 3), rng()
    corners = [draw(sample_with([], image), generator).image[0] for _ in range(300)]
    assert {int(one[0, 0]) for one in corners} >= {0, 4, 24, 28}
    assert {int(one[-1, -1]) for one in corners} >= {7, 35}


@pytest.mark.parametrize("transform", [RandomHorizontalFlip, RandomVerticalFlip, RandomTranspose])
def test_probabilities(transform: type) -> None:
    before = sample_with([])
    for probability, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130)):
        draw, generator = transform(probability), rng()
        changed = sum(draw(before, generator).image is not before.image for _ in range(400))
        assert low <= changed <= high


def test_channel_permutation_gives_all_six_orders() -> None:
    image = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 4, 5)
    draw, generator = RandomChannelPermutation(), rng()
    orders = Counter(tuple(draw(sample_with([], image), generator).image[:, 0, 0].tolist()) for _ in range(300))
    assert len(orders) == 6
    assert min(orders.values()) > 25


def test_choice_takes_each_branch() -> None:
    draw, generator = RandomChoice([Resize(10), Resize(20)]), rng()
    counts = Counter(min(draw(sample_with([]), generator).size) for _ in range(200))
    assert set(counts) == {10, 20}
    assert min(counts.values()) > 70


def test_the_generator_alone_decides() -> None:
    transform = Compose([RandomHorizontalFlip(), RandomResize([20, 30, 40]), RandomSizeCrop(10, 20)])
    one = transform(sample_with([[5, 4, 20, 30]]), rng(3))
    torch.manual_seed(99)
    two = transform(sample_with([[5, 4, 20, 30]]), rng(3))
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.boxes, two.boxes)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: RandomHorizontalFlip(1.5), "between 0 and 1"),
        (lambda: RandomResize([]), "short_sides must be a list"),
        (lambda: RandomResize(512), "short_sides must be a list"),
        (lambda: RandomResize([0]), "short_side must be a length"),
        (lambda: Resize(10, -1), "max_size must be a length"),
        (lambda: RandomSizeCrop(20, 10), "min_size <= max_size"),
        (lambda: RandomChoice([]), "at least one"),
    ],
)
def test_bad_arguments_are_named(make: Callable[..., Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()
