from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from detfamily.structures import Detections
from detfamily.visualize import boxes as module
from detfamily.visualize.boxes import draw_boxes, draw_comparison, label_color

NAMES = ("circle", "square", None)


def gray(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def pixels_of(picture: Image.Image, color: tuple[int, int, int]) -> set[tuple[int, int]]:
    found = picture.load()
    assert found is not None
    return {(x, y) for x in range(picture.width) for y in range(picture.height) if found[x, y] == color}


def test_boxes_lie_where_they_should_on_an_enlarged_image() -> None:
    picture = draw_boxes(gray(64, 128), torch.tensor([[20.0, 30.0, 60.0, 50.0]]), torch.tensor([1]), NAMES)
    assert picture.size == (384, 192)
    drawn = pixels_of(picture, label_color(1))
    below = {y for x, y in drawn if x == 120}  # away from the label, which lies over the left corner
    assert {90, 150} <= below and max(below) == 150
    assert {60, 180} <= {x for x, y in drawn if y == 130}
    assert min(x for x, _ in drawn) == 60 and max(x for x, _ in drawn) == 180


def test_large_images_are_reduced_and_others_keep_their_size() -> None:
    none = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert draw_boxes(gray(100, 1000), *none, NAMES, sides=(384, 800)).size == (800, 80)
    assert draw_boxes(gray(100, 500), *none, NAMES, sides=(384, 800)).size == (500, 100)
    untouched = draw_boxes(gray(400, 300), *none, NAMES)
    assert untouched.getextrema() == ((128, 128),) * 3


def test_colors_are_stable_and_differ() -> None:
    colors = [label_color(label) for label in range(91)]
    assert len(set(colors)) == 91
    assert colors == [label_color(label) for label in range(91)]
    for one, other in itertools.pairwise(colors):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 150


def test_labels_never_leave_the_picture_and_avoid_each_other() -> None:
    rng = random.Random(0)
    for _ in range(200):
        taken: list[module.Rectangle] = []
        for _ in range(6):
            x1, y1 = rng.uniform(0, 383), rng.uniform(0, 199)
            corners = (x1, y1, rng.uniform(x1, 383), rng.uniform(y1, 199))
            place = module._free_place(corners, (rng.uniform(5, 383), 14.0), (384, 200), taken)
            assert 0 <= place[0] <= place[2] <= 383 and 0 <= place[1] <= place[3] <= 199
            taken.append(place)
    first = module._free_place((50, 50, 150, 150), (60, 14), (384, 200), [])
    second = module._free_place((50, 50, 150, 150), (60, 14), (384, 200), [first])
    assert module._overlap(first, second) == 0


def test_long_names_are_cut_to_the_picture() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    font = module._font(384)
    cut = module._fitted(draw, "a very long name of a class indeed " * 5, font, 200)
    assert cut.startswith("a very long") and cut.endswith("...") and draw.textlength(cut, font=font) <= 200
    assert module._fitted(draw, "short", font, 200) == "short"
    name = ["x" * 500]
    picture = draw_boxes(gray(128, 128), torch.tensor([[100.0, 100.0, 120.0, 120.0]]), torch.tensor([0]), name)
    assert picture.size == (384, 384)


def test_boxes_outside_or_without_area_are_drawn_at_the_edge() -> None:
    odd = torch.tensor([[-50.0, -50.0, -10.0, -10.0], [90, 90, 500, 500], [40, 40, 40, 40], [60, 60, 50, 50]])
    labels = torch.tensor([0, 1, 2, -1])
    assert draw_boxes(gray(128, 128), odd, labels, {0: "only this"}).size == (384, 384)


def test_a_label_without_a_name_is_a_number() -> None:
    assert [module._name(NAMES, label) for label in (0, 2, 7, -1)] == ["circle", "2", "7", "-1"]
    assert [module._name({7: "cat"}, label) for label in (7, 8)] == ["cat", "8"]


def test_mistakes_are_named() -> None:
    box, label = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"must be \(3, H, W\) uint8, got .*float32"):
        draw_boxes(torch.zeros(3, 8, 8), box, label, NAMES)
    with pytest.raises(ValueError, match="numbers differ"):
        draw_boxes(gray(8, 8), box, torch.tensor([0, 1]), NAMES)
    with pytest.raises(ValueError, match=r"1 labels .* and 2 scores"):
        draw_boxes(gray(8, 8), box, label, NAMES, torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="NaN"):
        draw_boxes(gray(8, 8), box * float("nan"), label, NAMES)


def test_comparison_shows_truth_left_and_confident_predictions_right(tmp_path: Path) -> None:
    truth = (torch.tensor([[20.0, 30.0, 60.0, 50.0]]), torch.tensor([0]))
    found = Detections(
        torch.tensor([0.9, 0.29]), torch.tensor([1, 2]), torch.tensor([[20.0, 30, 60, 50], [70, 70, 90, 90]])
    )
    path = tmp_path / "new" / "picture.png"
    draw_comparison([gray(128, 128)], [truth], [found], NAMES, path)
    picture = Image.open(path).convert("RGB")
    assert picture.width == 2 * 384 + module._GAP and picture.height > 384
    left = pixels_of(picture, label_color(0))
    right = pixels_of(picture, label_color(1))
    assert left and max(x for x, _ in left) < 384
    assert right and min(x for x, _ in right) > 384
    assert not pixels_of(picture, label_color(2))
    assert list(path.parent.iterdir()) == [path]


def test_comparison_of_images_of_several_sizes(tmp_path: Path) -> None:
    sizes = [(480, 640), (128, 128), (1333, 800), (30, 200), (427, 640)]
    images = [gray(*size) for size in sizes]
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    weak = Detections(torch.tensor([0.01]), torch.tensor([0]), torch.tensor([[1.0, 1.0, 9.0, 9.0]]))
    none = Detections(torch.zeros(0), nothing[1], nothing[0])
    for columns, widths in ((1, 2 * 640), (2, 2 * 640 + 2 * 384), (9, 4 * 640 + 2 * 384 + 2 * 480 + 2 * 384)):
        path = tmp_path / f"{columns}.png"
        draw_comparison(images, [nothing] * 5, [weak, none] * 2 + [weak], NAMES, path, columns=columns)
        assert Image.open(path).width >= widths
    with pytest.raises(ValueError, match="got 5 images, 1 truths"):
        draw_comparison(images, [nothing], [none] * 5, NAMES, tmp_path / "no.png")
    with pytest.raises(ValueError, match="at least one"):
        draw_comparison([], [], [], NAMES, tmp_path / "no.png")
    with pytest.raises(ValueError, match="columns"):
        draw_comparison(images, [nothing] * 5, [none] * 5, NAMES, tmp_path / "no.png", columns=0)
    assert not (tmp_path / "no.png").exists()
