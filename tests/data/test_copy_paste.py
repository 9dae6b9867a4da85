from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detfamily.config import build, compose
from detfamily.data.coco import CocoData, CocoDetection, SampleKey
from detfamily.data.copy_paste import CopyPaste, paste
from detfamily.data.loader import train_loader
from detfamily.data.masks import boxes_around, rectangles
from detfamily.data.shapes import ShapesData
from detfamily.data.transforms import Compose, RandomHorizontalFlip, Resize, Sample
from detfamily.errors import DataError

SIDE = 100


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def painted(boxes: list[list[int]], grey: int, with_masks: bool, first_label: int = 0) -> Sample:
    """An image of one grey whose objects differ from it by their number + 1."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    image = torch.full((SIDE, SIDE, 3), grey, dtype=torch.uint8).permute(2, 0, 1)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = grey + number + 1
    labels = torch.arange(len(boxes)) + first_label
    area = (corners[:, 2:] - corners[:, :2]).prod(1)
    masks = rectangles(corners, (SIDE, SIDE)) if with_masks else None
    return Sample(image, corners, labels, area, torch.zeros_like(labels), 1, (SIDE, SIDE), masks)


@pytest.mark.parametrize("with_masks", [False, True])
def test_pasted_objects_cover_what_is_below(with_masks: bool) -> None:
    below = [
        [0, 0, 10, 10],  # untouched
        [20, 20, 60, 60],  # loses its right half: 800 pixels are left
        [62, 30, 76, 44],  # hidden altogether
        [35, 70, 55, 90],  # 100 pixels are left, its left edge moves by 15
        [40, 5, 60, 21],  # loses a row: the edge moves by one pixel
    ]
    above = [[40, 20, 80, 65], [30, 65, 50, 95]]
    result = paste(painted(below, 50, with_masks), painted(above, 200, with_masks, 10), 10, 300)
    assert result.labels.tolist() == [0, 1, 4, 10, 11]
    assert result.boxes.tolist() == [below[0], [20, 20, 40, 60], [40, 5, 60, 20], *above]
    assert result.area.tolist() == [100, 800, 300, 1800, 600]
    assert len(result.iscrowd) == 5
    expected = painted(below, 50, with_masks).image.clone()
    for number, (x1, y1, x2, y2) in enumerate(above):
        expected[:, y1:y2, x1:x2] = 201 + number
    assert torch.equal(result.image, expected)


def test_an_object_stays_by_its_pixels_or_by_its_edges() -> None:
    for x2, min_pixels, max_shift, stays in ((60, 300, 10, True), (60, 800, 10, False), (60, 800, 20, True)):
        below, above = painted([[20, 20, x2, 60]], 50, True), painted([[40, 10, 90, 70]], 200, True)
        assert len(paste(below, above, max_shift, min_pixels).labels) == 1 + stays


def test_masks_paste_their_own_pixels_alone() -> None:
    below, above = painted([[20, 20, 60, 60]], 50, True), painted([[30, 30, 50, 50]], 200, True)
    assert above.masks is not None
    ring = above.masks.clone()
    ring[0, 35:45, 35:45] = False
    result = paste(below, replace(above, masks=ring), 10, 300)
    assert torch.equal(result.image[0] == 201, ring[0])
    assert result.boxes.tolist() == [[20, 20, 60, 60], [30, 30, 50, 50]]  # its edges still show
    assert int((result.image[0] == 51).sum()) == 1600 - 300


def test_boxes_that_are_not_touched_keep_their_fractions() -> None:
    below = painted([[0, 0, 10, 10], [20, 20, 60, 60]], 50, False)
    below = replace(below, boxes=torch.tensor([[0.25, 0.5, 9.75, 9.5], [20.25, 20.5, 59.75, 59.5]]))
    result = paste(below, painted([[40, 10, 90, 70]], 200, False), 10, 300)
    assert result.boxes.tolist() == [[0.25, 0.5, 9.75, 9.5], [20.25, 20.5, 40, 59.5], [40, 10, 90, 70]]


def test_all_numbers_of_objects_are_pasted_equally_often() -> None:
    boxes = [[10 * i, 10 * i, 10 * i + 5, 10 * i + 5] for i in range(6)]
    transform, generator = CopyPaste(Resize(), max_pasted=5), rng()
    counts, chosen = np.zeros(7, dtype=int), np.zeros(6, dtype=int)
    for _ in range(500):
        result = transform(painted([], 50, True), generator, lambda rng: painted(boxes, 200, True))
        counts[len(result.labels)] += 1
        chosen[result.labels.numpy()] += 1
        assert len(set(result.labels.tolist())) == len(result.labels)
    assert counts[5:].sum() == 0 and counts[:5].min() > 70  # 100 each
    assert chosen.min() > 120  # 167 each
    assert transform.most_objects(6) == 10 and transform.most_objects(3) == 6
    assert CopyPaste(Resize(), enabled=False).most_objects(6) == 6


def test_without_objects_to_paste_nothing_changes() -> None:
    one = painted([[20, 20, 60, 60]], 50, True)
    result = paste(one, painted([], 200, True), 10, 300)
    assert torch.equal(result.image, one.image) and torch.equal(result.boxes, one.boxes)


def test_switched_off_no_other_image_is_asked_for() -> None:
    def refuse(generator: torch.Generator) -> Sample:
        raise AssertionError

    one = painted([[20, 20, 60, 60]], 50, False)
    assert torch.equal(CopyPaste(Resize(), enabled=False)(one, rng(), refuse).image, one.image)


def test_images_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="images of one size.*PadToSquare"):
        small = replace(painted([], 1, True), image=torch.zeros(3, 9, 9))
        CopyPaste(Resize())(painted([], 1, True), rng(), lambda _: small)
    with pytest.raises(ValueError, match="max_pasted=1 pastes nothing"):
        CopyPaste(Resize(), max_pasted=1)


# --- data sets --------------------------------------------------------------------------------------------------------


def write_set(root: Path, segmentation: Callable[[int], Any]) -> CocoData:
    """Twelve images, each with a box of its own grey at a place of its own."""
    images, annotations = [], []
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i in range(12):
        image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        x, y = 8 * i, 50
        image[y : y + 8, x : x + 8] = 10 * (i + 1)
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
        box = {"bbox": [x, y, 8, 8], "area": 64, "iscrowd": 0, "segmentation": segmentation(i)}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1 + i % 2, **box})
        for split in ("train", "val"):
            Image.fromarray(image).save(root / f"{split}2017" / f"{i}.png")
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    content = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(content)
    return CocoData(str(root))


def triangle(i: int) -> list[list[float]]:
    x = 8.0 * i
    return [[x, 50, x + 8, 50, x, 58]]


def copied(dataset: CocoDetection, seed: int) -> list[int]:
    """The images whose objects are seen in the sample of the first one."""
    sample = dataset[SampleKey(0, seed)]
    return [int(box[0] / 8) for box in sample.boxes.tolist()]


def test_a_training_set_gives_another_image_and_masks(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, triangle).train(CopyPaste(Resize()))
    assert dataset.max_objects == 2
    found = [copied(dataset, seed) for seed in range(200)]
    assert {tuple(one) for one in found} == {(0,), *((0, i) for i in range(1, 12))}
    assert found == [copied(dataset, seed) for seed in range(200)]
    seed = next(seed for seed, one in enumerate(found) if one == [0, 4])
    sample = dataset[SampleKey(0, seed)]
    other = dataset.load(4)
    assert other.masks is not None and 25 < int(other.masks[0].sum()) < 45  # half of a square of 64 pixels
    assert torch.equal(sample.image[0] == 50, other.masks[0])


def test_masks_are_read_only_where_objects_are_pasted(tmp_path: Path) -> None:
    data = write_set(tmp_path, triangle)
    for transform in (Resize(), CopyPaste(Resize(), enabled=False)):
        assert data.train(transform)[0].masks is None
    assert data.validation(Resize())[0].masks is None


def test_workers_change_nothing(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, triangle).train(CopyPaste(Compose([RandomHorizontalFlip()])))
    one, other = ([batch.images.pixels for batch in train_loader(dataset, 3, n, seed=4)] for n in (0, 2))
    assert len(one) == 4 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_without_segmentations_rectangles_are_pasted_and_a_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = write_set(tmp_path, lambda i: []).train(CopyPaste(Resize()))
    assert "12 of 12 objects have no segmentation; they are pasted as rectangles" in caplog.text
    sample = next(one for seed in range(99) if len((one := dataset[SampleKey(0, seed)]).labels) == 2)
    assert sample.masks is None
    assert int((sample.image[0] > 10).sum()) == 64


def test_a_broken_segmentation_is_named(tmp_path: Path) -> None:
    data = write_set(tmp_path, lambda i: [[1, 2, 3]] if i == 6 else triangle(i))
    with pytest.raises(DataError, match=r"instances_train2017.json: the 'segmentation' of annotation 7: expected x, y"):
        data.train(CopyPaste(Resize()))
    assert len(data.train(Resize())) == 12


def test_shapes_bring_their_masks(tmp_path: Path) -> None:
    data = ShapesData(train_size=4, val_size=1, image_size=64, sides=(7, 32), root=str(tmp_path))
    dataset = data.train(CopyPaste(Resize()))
    for index in range(4):
        sample = dataset.load(index)
        assert sample.masks is not None
        assert torch.equal(boxes_around(sample.masks), sample.boxes)
        assert torch.equal(sample.masks.flatten(1).sum(1).float(), sample.area)


@pytest.mark.parametrize(("copy_paste", "name", "side"), [(True, "lsj", 64), (False, "lsj_1280", 1280)])
def test_the_recipe(tmp_path: Path, copy_paste: bool, name: str, side: int) -> None:
    overrides = [f"augmentation={name}", f"augmentation.copy_paste={copy_paste}"]
    overrides += [f"augmentation.image_size={side}"] if side == 64 else []
    cfg = compose("train", overrides)
    data = ShapesData(train_size=4, val_size=1, image_size=64, sides=(7, 32), root=str(tmp_path))
    dataset = data.train(build(cfg.augmentation.train))
    samples = [dataset[SampleKey(i % 4, i)] for i in range(8)]
    assert {one.size for one in samples} == {(side, side)}
    most = [len(dataset.load(i % 4).labels) for i in range(8)]
    assert copy_paste == any(len(one.labels) > n for one, n in zip(samples, most, strict=True))
