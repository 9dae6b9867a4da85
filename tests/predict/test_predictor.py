from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detfamily
from detfamily.data.labels import LabelMap
from detfamily.engine import checkpoint as checkpoint_file
from detfamily.engine.evaluate import evaluate
from detfamily.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from detfamily.predict import Prediction, Predictor, load
from detfamily.structures import Detections

from .conftest import CLASSES, FAMILIES, make, photo


@pytest.fixture(scope="module")
def predictor(predictors: Callable[..., Predictor]) -> Predictor:
    return replace(predictors("deformable_detr"), threshold=0.3)


def same(one: Prediction, other: Prediction) -> None:
    torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)
    assert (one.names, one.size) == (other.names, other.size)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three images of different sizes and one object, in the COCO format."""
    root = tmp_path / "coco"
    images, annotations = [], []
    for index, (height, width) in enumerate([(64, 96), (80, 80), (96, 56)]):
        name = f"{index + 1:012}.{'jpg' if index else 'png'}"
        (root / "val").mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(height, width, index)).save(root / "val" / name)
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        box = {"bbox": [8, 8, 24, 24], "area": 576, "iscrowd": 0}
        annotations.append({"id": index + 1, "image_id": index + 1, "category_id": 5, **box})
    categories = [{"id": one, "name": name} for one, name in zip(CLASSES.category_ids, CLASSES.names, strict=True)]
    (root / "val.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("resized", [False, True])
def test_the_boxes_are_those_that_evaluation_gets(
    checkpoints: Callable[..., Path],
    predictors: Callable[..., Predictor],
    coco: Path,
    tmp_path: Path,
    family: str,
    resized: bool,
) -> None:
    overrides = ["augmentation=detr", "augmentation.test_short_side=72", "augmentation.max_size=100"] if resized else []
    path = checkpoints(family)
    data = ["data=coco", f"data.root={coco}", "data.val_images=val", "data.val_annotations=val.json"]
    evaluate([f"checkpoint={path}", f"output_dir={tmp_path}", "evaluation.batch_size=1", *data, *overrides])
    expected: dict[int, list[tuple[float, ...]]] = {}
    for row in json.loads((tmp_path / "results_val.json").read_text()):
        x, y, w, h = row["bbox"]
        expected.setdefault(row["image_id"], []).append((row["score"], row["category_id"], x, y, x + w, y + h))

    predictor = predictors(family, *overrides)
    files = sorted((coco / "val").iterdir())
    for file, found in zip(files, predictor.predict(files), strict=True):
        rows = torch.tensor(sorted(expected[int(file.stem)], reverse=True), dtype=torch.float64)
        assert len(found) == len(rows) > 0
        torch.testing.assert_close(found.scores.double(), rows[:, 0], rtol=1e-4, atol=1e-5)
        ids = [predictor.label_map.category_id(int(label)) for label in found.labels]
        assert ids == rows[:, 1].int().tolist()
        torch.testing.assert_close(found.boxes.double(), rows[:, 2:], rtol=1e-3, atol=2e-2)
        assert found.boxes.std(0).min() > 0.1  # not one box for all


def test_all_kinds_of_images_give_the_same(predictor: Predictor, tmp_path: Path) -> None:
    pixels = photo(64, 96)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [path, str(path), Image.open(path), pixels, tensor, tensor.contiguous()]
    expected = predictor.predict(path)
    assert len(expected) > 0 and expected.size == (64, 96) and expected.source == str(path)
    for image in kinds:
        one = predictor.predict(image)
        assert isinstance(one, Prediction)
        same(one, expected)
    for found in predictor.predict(kinds):
        same(found, expected)
    for batch in (torch.stack([tensor, tensor]), np.stack([pixels, pixels]), (image for image in (path, pixels))):
        found = predictor.predict(batch)
        assert isinstance(found, list) and len(found) == 2
        same(found[1], expected)
    assert predictor.predict([]) == []


def test_the_images_beside_it_change_nothing(predictors: Callable[..., Predictor]) -> None:
    together = replace(predictors("refinement"), batch_size=3)
    sizes = [(64, 96), (96, 64), (64, 96), (64, 96), (80, 80), (64, 96), (96, 64)] * 3
    images = [photo(*size, seed) for seed, size in enumerate(sizes)]
    seen: list[tuple[int, ...]] = []
    forward = together.detector.forward

    def spy(batch):
        seen.append(tuple(batch.pixels.shape))
        assert not batch.padded
        return forward(batch)

    together.detector.forward = spy
    found = together.predict(images)
    del together.detector.forward
    assert max(shape[0] for shape in seen) == 3 and sum(shape[0] for shape in seen) == len(images)
    alone = replace(together, batch_size=1)
    for image, one in zip(images, found, strict=True):
        same(one, alone.predict(image))


def test_threshold_and_limit(predictors: Callable[..., Predictor]) -> None:
    everything = predictors("deformable_detr")
    image = photo(64, 96)
    found = everything.predict(image)
    assert len(found) == 12 * 3  # fewer than postprocess.num_select
    assert (found.scores.diff() <= 0).all()
    middle = float(found.scores[10])
    for some in (everything.predict(image, threshold=middle), replace(everything, threshold=middle).predict(image)):
        assert len(some) == 11 and (some.scores >= middle).all()
        assert torch.equal(some.boxes, found.boxes[:11]) and some.names == found.names[:11]
        assert some.best_score == float(found.scores[0])
    few = replace(everything, max_detections=4).predict(image)
    assert torch.equal(few.boxes, found.boxes[:4])
    nothing = everything.predict(image, threshold=1)
    assert len(nothing) == 0 and nothing.boxes.shape == (0, 4) and nothing.best_score == found.best_score


def test_names_are_those_of_the_training(predictor: Predictor) -> None:
    assert predictor.names == {0: "cat", 1: "dog", 2: "eel"}
    found = predictor.predict(photo(64, 96), threshold=0)
    assert found.names == tuple(("cat", "dog", "eel")[int(label)] for label in found.labels)
    assert set(found.names) == {"cat", "dog", "eel"}


def test_columns_that_stand_for_nothing_are_never_found(tmp_path: Path) -> None:
    gaps = LabelMap.by_category_id([{"id": 1, "name": "cat"}, {"id": 4, "name": "dog"}])
    predictor = load(make(tmp_path / "gaps.pt", FAMILIES["deformable_detr"], gaps), threshold=0)
    found = predictor.predict(photo(64, 96))
    assert predictor.names == {1: "cat", 4: "dog"} and set(found.labels.tolist()) == {1, 4}
    assert len(found) == 12 * 2


def test_a_turned_photo_is_seen_upright(predictor: Predictor, tmp_path: Path) -> None:
    upright = photo(64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    found = predictor.predict(tmp_path / "turned.png")
    assert found.size == (64, 96)
    same(found, predictor.predict(upright))
    same(predictor.predict(Image.open(tmp_path / "turned.png")), found)
    assert found.draw().width > found.draw().height


@pytest.mark.parametrize("size", [(1, 1), (3, 1200), (1200, 2), (5, 1), (33, 65)])
@pytest.mark.parametrize("resized", [False, True])
def test_images_of_any_size(predictors: Callable[..., Predictor], size: tuple[int, int], resized: bool) -> None:
    overrides = ["augmentation=detr", "augmentation.test_short_side=64", "augmentation.max_size=200"] if resized else []
    for family in FAMILIES:
        predictor = predictors(family, *overrides)
        image = photo(*size)
        if family == "two_stages" and not resized and max(size) < 10:
            words = rf"an image of {size[1]}x{size[0]} pixels: model\.num_queries=12 proposals"
            with pytest.raises(DataError, match=words):
                predictor.predict(image)
            continue
        found = predictor.predict(image)
        assert len(found) > 0 and found.size == size
        clipped = found.clipped().boxes
        assert (clipped >= 0).all() and (clipped[:, 2:] <= torch.tensor(size[::-1])).all()
        assert found.draw(image).width >= 1


def test_boxes_are_clipped_only_on_demand(predictor: Predictor) -> None:
    boxes = torch.tensor([[-3.0, 2.0, 50.0, 30.0], [4.0, -1.0, 9.0, 8.0]])
    found = Prediction(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), ("cat", "dog"), (20, 40), 0.9)
    assert found.clipped().boxes.tolist() == [[0, 2, 40, 20], [4, 0, 9, 8]]
    assert found.boxes[0, 0] == -3


def test_drawing(predictor: Predictor, tmp_path: Path) -> None:
    pixels = photo(400, 500)
    found = predictor.predict(pixels)
    drawn = np.asarray(found.draw(pixels))
    assert drawn.shape == pixels.shape and (drawn != pixels).any()
    with pytest.raises(DataError, match="keeps no pixels: pass the image"):
        found.draw()
    with pytest.raises(DataError, match="is about an image of 500x400 pixels .* has 40x30"):
        found.draw(photo(30, 40))


def test_results_can_be_worked_with(predictor: Predictor) -> None:
    found = predictor.predict(photo(64, 96))
    found.boxes.mul_(2)  # not of torch's inference mode
    found.scores.requires_grad_()
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and found.labels.dtype == torch.int64


def test_one_broken_image_is_named_and_a_stream_goes_on(predictor: Predictor, photos: Path) -> None:
    (photos / "half.png").write_bytes((photos / "a.png").read_bytes()[:100])
    files = [photos / "a.jpg", photos / "half.png", photos / "nowhere.jpg", photos / "a.png"]
    with pytest.raises(DataError, match=r"^images\[1\]: .*half.png is damaged or cut off"):
        predictor.predict(files)
    for several in (predictor, replace(predictor, batch_size=2)):
        outcomes = list(several.stream(files))
        assert [one.error is None for one in outcomes] == [True, False, False, True]
        assert "nowhere.jpg: No such file" in str(outcomes[2].error)
        assert outcomes[3].prediction is not None and outcomes[3].pixels is not None
        same(outcomes[3].prediction, predictor.predict(files[3]))


def test_a_stream_reads_only_a_little_ahead(predictor: Predictor) -> None:
    given = 0

    def camera():
        nonlocal given
        while True:
            given += 1
            yield photo(64, 96)

    stream = predictor.stream(camera())
    assert next(stream).prediction is not None and given == 1
    stream = replace(predictor, batch_size=2).stream(camera())
    assert next(stream).prediction is not None and given == 1 + 8


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (7, "an image is a path, .* not a int"),
        ([None], r"images\[0\]: an image is a path, .* not a NoneType"),
        (np.zeros((5, 6, 3)), "uint8 .* not float64"),
        (np.zeros((5, 6, 2), np.uint8), r"\(H, W, 3\).*not \(5, 6, 2\)"),
        (torch.zeros(3, 5, 6), r"\(3, H, W\) uint8, not \(3, 5, 6\) torch.float32; for values from 0 to 1"),
        (torch.zeros(5, 6, 3, dtype=torch.uint8), r"\(3, H, W\) uint8, not \(5, 6, 3\)"),
        (torch.zeros(2, 1, 3, 5, 6, dtype=torch.uint8), r"images\[0\]: .*not \(1, 3, 5, 6\)"),
        (Path(__file__).parent, r"is a folder: pass detfamily.find_images\('.*'\).paths"),
        ("no such.jpg", "cannot read no such.jpg"),
    ],
)
def test_what_is_no_image_is_refused(predictor: Predictor, images: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        predictor.predict(images)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"threshold": 1.5}, "threshold=1.5: expected a score between 0"),
        ({"threshold": "high"}, "threshold='high'"),
        ({"max_detections": 0}, "max_detections=0: expected a whole number of 1 or more"),
        ({"batch_size": None}, "batch_size=None"),
        ({"device": "gpu"}, "device='gpu' does not exist; expected cpu, cuda"),
        ({"device": "meta"}, "device='meta' is not supported"),
        ({"device": "cuda:99"}, "torch finds [0-9]+ CUDA devices"),
        ({"overrides": ["augmentation.test_short=3"]}, "test_short"),
    ],
)
def test_wrong_settings_are_named(checkpoints: Callable[..., Path], more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(checkpoints("deformable_detr"), **more)  # type: ignore[arg-type]


def test_a_wrong_checkpoint_is_named(checkpoints: Callable[..., Path]) -> None:
    path = checkpoints("detr")
    with pytest.raises(CheckpointError, match="there is no checkpoint .*did you mean"):
        load(path.with_name(path.name[1:]))
    with pytest.raises(CheckpointError, match="do not fit"):
        load(path, overrides=["decoder.num_layers=4"])


def test_spoilt_weights_are_not_taken_for_an_empty_image(checkpoints: Callable[..., Path], photos: Path) -> None:
    predictor = load(checkpoints("detr"))
    next(predictor.detector.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinity for .*a.jpg"):
        predictor.predict(photos / "a.jpg")


def test_too_little_memory_is_said_in_words(predictor: Predictor) -> None:
    def exhausted(*_: object) -> list[Detections]:
        raise torch.OutOfMemoryError

    poor = replace(predictor, postprocess=exhausted)
    with pytest.raises(ConfigError, match="1 images of 96x64 pixels at once are too much .* lower batch_size"):
        poor.predict(photo(64, 96))


def test_averaged_weights_are_taken(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain.pt", FAMILIES["detr"])
    weights = checkpoint_file.load(plain)["model"]
    other = {name: value + 0.05 if value.is_floating_point() else value for name, value in weights.items()}
    averaged = make(tmp_path / "averaged.pt", FAMILIES["detr"], ema={"updates": 1, "model": other})
    image = photo(64, 96)
    assert not torch.allclose(load(averaged).predict(image, 0).boxes, load(plain).predict(image, 0).boxes, atol=1)


def test_a_checkpoint_of_a_gpu_works_without_one(tmp_path: Path) -> None:
    path = make(tmp_path / "gpu.pt", [*FAMILIES["detr"], "runtime.device=cuda", "runtime.precision=bf16"])
    predictor = load(path, device="cpu", threshold=0)
    assert predictor.device == torch.device("cpu") and predictor.runtime.precision == "bf16"
    found = predictor.predict(photo(64, 96))
    exact = load(path, device="cpu", threshold=0, overrides=["runtime.precision=fp32"]).predict(photo(64, 96))
    assert found.best_score == pytest.approx(exact.best_score, abs=0.05)


def test_torch_is_left_as_it_was(checkpoints: Callable[..., Path]) -> None:
    before = torch.get_num_threads(), torch.get_rng_state(), torch.get_float32_matmul_precision()
    load(checkpoints("deformable_detr", "runtime.threads=3")).predict(photo(64, 96))
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (before[0], before[2])


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, detfamily; print('torch' in sys.modules); detfamily.load; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True"]
    assert detfamily.load is load and detfamily.Prediction is Prediction
    assert set(detfamily.__all__) <= set(dir(detfamily))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        detfamily.__getattr__("lod")


def test_grey_tensors_are_images(predictor: Predictor) -> None:
    grey = torch.from_numpy(photo(64, 96)).permute(2, 0, 1)[:1]
    same(predictor.predict(grey), predictor.predict(grey.repeat(3, 1, 1)))
