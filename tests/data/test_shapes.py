from __future__ import annotations

import itertools
import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from detfamily.data import shapes
from detfamily.data.shapes import CLASSES, Drawn, ShapesData, ShapesSettings, draw, prepare
from detfamily.data.transforms import Sample
from detfamily.errors import DataError

SMALL = {"train_size": 6, "val_size": 3, "image_size": 64, "sides": (7, 32)}


def unchanged(sample: Sample, rng: torch.Generator) -> Sample:
    return sample


def visible_pixels(drawn: list[Drawn], size: int) -> NDArray[np.int64]:
    """(S, S) which shape shows at each pixel, painting from the back to the front; -1 for none."""
    owner = np.full((size, size), -1)
    for number, shape in enumerate(drawn):
        for row, column in np.argwhere(shape.visible):
            owner[row + shape.top, column + shape.left] = number
    return owner


def test_an_image_depends_on_its_seed_split_and_index_alone() -> None:
    pixels, drawn = draw(ShapesSettings(), "train", 5)
    again, drawn_again = draw(ShapesSettings(), "train", 5)
    assert np.array_equal(pixels, again)
    assert [one.box for one in drawn] == [one.box for one in drawn_again]
    others = [(ShapesSettings(), "val", 5), (ShapesSettings(), "train", 6), (ShapesSettings(seed=1), "train", 5)]
    for settings, split, index in others:
        assert not np.array_equal(pixels, draw(settings, split, index)[0])  # type: ignore[arg-type]


def test_boxes_and_areas_are_those_of_the_visible_pixels() -> None:
    settings = ShapesSettings()
    hidden = 0
    for index in range(60):
        pixels, drawn = draw(settings, "train", index)
        assert pixels.shape == (128, 128, 3)
        owner = visible_pixels(drawn, 128)
        for number, shape in enumerate(drawn):
            rows, columns = np.nonzero(owner == number)
            assert shape.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert shape.area == len(rows) >= 0.5 * shape.pixels
            hidden += shape.area < shape.pixels
    assert hidden > 20


def test_what_is_drawn_is_where_the_mask_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painted without noise and texture, the pixels that change are the mask's, up to the half-covered outline."""
    settings = ShapesSettings(difficulty=0, objects=(1, 1))

    def white(along: object, across: object, half: float, colours: object, rng: np.random.Generator) -> object:
        return np.full(3, 255, dtype=np.float32)

    def black(settings: ShapesSettings, rng: np.random.Generator) -> object:
        return np.zeros((settings.image_size, settings.image_size, 3), dtype=np.float32)

    monkeypatch.setattr(shapes, "_paint", white)
    monkeypatch.setattr(shapes, "_background", black)
    for index in range(40):
        pixels, drawn = draw(settings, "val", index)
        owner = visible_pixels(drawn, 128)
        assert np.array_equal(pixels[..., 0] >= 128, owner == 0)


# Area of each class, half of its longer side being 1.
_ANGLE, _BITE, _OFFSET = math.pi / 5, 0.85, 0.55
_LENS = (
    _BITE**2 * math.acos((_OFFSET**2 + _BITE**2 - 1) / (2 * _OFFSET * _BITE))
    + math.acos((_OFFSET**2 + 1 - _BITE**2) / (2 * _OFFSET))
    - 0.5 * math.sqrt((_BITE + 1 - _OFFSET) * (_OFFSET + _BITE - 1) * (_OFFSET - _BITE + 1) * (_OFFSET + _BITE + 1))
)
AREAS = {
    "circle": math.pi,
    "square": 4.0,
    "triangle": math.sqrt(3),
    "star": 5 * 0.45 * math.sin(_ANGLE),
    "ring": math.pi * (1 - 0.44**2),
    "cross": 4 * (2 * 0.3 - 0.3**2),
    "bar": 4 * 0.28,
    "crescent": math.pi - _LENS,
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes_have_their_form(name: str) -> None:
    axis = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    inside = CLASSES[name](axis[None], axis[:, None], np.float32(1)) < 0
    assert inside.mean() * 9 == pytest.approx(AREAS[name], rel=0.02)
    rows, columns = np.nonzero(inside)
    reach = np.hypot(axis[rows], axis[columns]).max()
    assert reach <= shapes.REACH
    extents = np.ptp(axis[rows]), np.ptp(axis[columns])
    assert max(extents) == pytest.approx(2, rel=0.06)


def test_sizes_numbers_and_classes_are_spread_as_described() -> None:
    drawn = [draw(ShapesSettings(), "train", index)[1] for index in range(300)]
    counts = [len(one) for one in drawn]
    assert 1 <= min(counts) <= max(counts) <= 10
    assert 5 < np.mean(counts) < 6
    flat = list(itertools.chain.from_iterable(drawn))
    assert np.bincount([one.label for one in flat], minlength=8).min() > 120
    areas = np.array([one.area for one in flat])
    small, large = (areas < 1024 / 9).mean(), (areas >= 1024).mean()
    assert 0.25 < small < 0.45
    assert 0.05 < large < 0.2


def test_plain_shapes_do_not_touch_and_are_whole() -> None:
    settings = ShapesSettings(difficulty=0)
    for index in range(40):
        pixels, drawn = draw(settings, "train", index)
        assert drawn
        assert all(one.area == one.pixels for one in drawn)
        assert (visible_pixels(drawn, 128) >= 0).sum() == sum(one.pixels for one in drawn)
        corner = pixels[np.ix_([0, 1], [0, 1])].reshape(-1, 3)
        covered = visible_pixels(drawn, 128)[:3, :3] >= 0
        assert covered.any() or len(np.unique(corner, axis=0)) == 1


def test_the_data_set_holds_what_was_drawn(tmp_path: Path) -> None:
    data = ShapesData(**SMALL, root=str(tmp_path))
    settings = ShapesSettings(image_size=64, sides=(7.0, 32.0))
    assert data.label_map.names == tuple(CLASSES)
    assert len(data.train(unchanged)) == 6
    validation = data.validation(unchanged)
    assert len(validation) == 3
    for index in range(3):
        pixels, drawn = draw(settings, "val", index)
        sample = validation[index]
        assert sample.boxes.tolist() == [list(one.box) for one in drawn]
        assert sample.labels.tolist() == [one.label for one in drawn]
        assert sample.area.tolist() == [one.area for one in drawn]
        assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(int) - pixels).mean() < 6
    assert data.area_ranges["small"] == (0, pytest.approx(1024 / 9))
    written = json.loads(data.validation_annotations.read_text())
    assert {one["iscrowd"] for one in written["annotations"]} == {0}
    assert min(one["id"] for one in written["annotations"]) == 1


def test_it_is_drawn_once_and_anew_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ShapesData(**SMALL, root=str(tmp_path))
    monkeypatch.setattr(shapes, "_draw_all", lambda *_: pytest.fail("drawn again"))
    assert ShapesData(**SMALL, root=str(tmp_path)).root == first.root
    monkeypatch.undo()
    assert ShapesData(**{**SMALL, "val_size": 2}, root=str(tmp_path)).root != first.root
    assert ShapesData(**SMALL, seed=1, root=str(tmp_path)).root != first.root
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_the_cache_folder_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETFAMILY_CACHE", str(tmp_path / "cache"))
    assert ShapesData(**SMALL).root.parent == tmp_path / "cache" / "shapes"
    monkeypatch.delenv("DETFAMILY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ShapesData(**SMALL).root.parent == tmp_path / "xdg" / "detfamily" / "shapes"


def _prepare(cache: str) -> str:
    return str(prepare(ShapesSettings(image_size=64, sides=(7.0, 32.0)), {"train": 40, "val": 2}, Path(cache)))


@pytest.mark.parametrize("locked", [True, False])
def test_two_processes_may_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool) -> None:
    if not locked:
        monkeypatch.setattr(shapes, "fcntl", None)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=lambda: queue.put(_prepare(str(tmp_path)))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    folder = Path(queue.get())
    assert str(folder) == queue.get()
    assert len(list((folder / "train").iterdir())) == 40
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_draw_all", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _prepare(str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert Path(_prepare(str(tmp_path))).is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_size": 0}, "data.train_size=0"),
        ({"image_size": 8}, "data.image_size=8 is too small"),
        ({"difficulty": 3}, "data.difficulty=3.0"),
        ({"objects": (0, 5)}, r"data.objects=\[0, 5\]"),
        ({"objects": (5,)}, "pairs"),
        ({"sides": (7, 200)}, r"data.sides=\[7.0, 200.0\]"),
        ({"seed": -1}, "data.seed=-1"),
    ],
)
def test_settings_that_cannot_be_drawn_are_named(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ShapesData(**{**SMALL, **arguments}, root=str(tmp_path))  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set data.root or DETFAMILY_CACHE"):
        ShapesData(**SMALL, root=str(tmp_path / "file" / "cache"))


def test_images_are_ordinary_files(tmp_path: Path) -> None:
    data = ShapesData(**SMALL, root=str(tmp_path))
    with Image.open(data.root / "train" / "000001.jpg") as image:
        assert image.size == (64, 64)
        assert image.format == "JPEG"
