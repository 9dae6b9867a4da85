from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from detfamily.data.batches import collate
from detfamily.data.coco import Annotations, CocoData, SampleKey
from detfamily.data.images import read_image
from detfamily.data.transforms import RandomHorizontalFlip, Sample
from detfamily.errors import DataError

HEIGHT, WIDTH = 40, 60
CATEGORIES = [{"id": 90, "name": "kite"}, {"id": 7, "name": "train"}, {"id": 21, "name": "cow"}]


def unchanged(sample: Sample, rng: torch.Generator) -> Sample:
    return sample


def annotation(number: int, image_id: int, category_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": bbox[2] * bbox[3] / 2,
        "iscrowd": 0,
        **more,
    }


def content() -> dict[str, Any]:
    """Ids out of order, file names in subfolders, a crowd, boxes that stick out or vanish, an image without objects."""
    names = {30: "b/c/30.jpg", 10: "10.png", 20: "b/20.jpg"}
    return {
        "images": [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in names.items()],
        "annotations": [
            annotation(1, 30, 90, [10, 5, 20, 30]),
            annotation(2, 10, 21, [50.5, -3, 20, 10]),
            annotation(3, 30, 7, [0, 0, 60, 40], iscrowd=1),
            annotation(4, 10, 7, [70, 5, 5, 5]),
            annotation(5, 10, 90, [1, 2, 0, 4]),
            annotation(6, 30, 7, [1, 2, 3, 4]),
        ],
        "categories": [dict(one) for one in CATEGORIES],
    }


def write_set(root: Path, change: Callable[[dict[str, Any]], Any] | None = None, split: str = "val") -> Path:
    made = content()
    if change is not None:
        change(made)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(made))
    rng = np.random.default_rng(0)
    for image in content()["images"]:
        path = root / f"{split}2017" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", split="train")
    return write_set(tmp_path / "set")


def test_images_come_in_the_order_of_their_ids_with_their_objects(root: Path) -> None:
    data = CocoData(str(root))
    dataset = data.train(unchanged)
    assert dataset.image_ids == [10, 20, 30]
    assert dataset.max_objects == 2
    first, empty, last = (dataset[i] for i in range(3))
    assert first.boxes.tolist() == [[50.5, 0, 60, 7]]
    assert [data.label_map.category_id(int(i)) for i in first.labels] == [21]
    assert empty.boxes.shape == (0, 4)
    assert empty.image.shape == (3, HEIGHT, WIDTH)
    assert last.boxes.tolist() == [[10, 5, 30, 35], [1, 2, 4, 6]]
    assert [data.label_map.category_id(int(i)) for i in last.labels] == [90, 7]
    assert last.area.tolist() == [300, 6]
    assert last.original_size == (HEIGHT, WIDTH)
    assert "1 crowd regions and 2 boxes without extent left out" in data.describe()


def test_labels_are_contiguous_or_the_category_ids(root: Path) -> None:
    contiguous = CocoData(str(root))
    assert contiguous.label_map.num_classes == 3
    assert contiguous.train(unchanged)[2].labels.tolist() == [2, 0]
    official = CocoData(str(root), labels="category_id")
    assert official.label_map.num_classes == 91
    assert official.train(unchanged)[2].labels.tolist() == [90, 7]


def test_real_annotations_agree_with_pycocotools(goldens: Path) -> None:
    place = goldens.parent / "data" / "coco_mini"
    if not place.is_dir():
        pytest.skip("coco_mini is not beside the golden cases")
    data = CocoData(str(place))
    dataset = data.validation(unchanged)
    reference = COCO(str(data.validation_annotations))
    assert dataset.image_ids == sorted(reference.imgs)
    for index, image_id in enumerate(dataset.image_ids):
        sample = dataset[index]
        known = [one for one in reference.imgToAnns[image_id] if not one["iscrowd"] and min(one["bbox"][2:]) > 0]
        assert [data.label_map.category_id(int(i)) for i in sample.labels] == [one["category_id"] for one in known]
        wanted = np.array([one["bbox"] for one in known], dtype=np.float32).reshape(-1, 4)
        wanted[:, 2:] += wanted[:, :2]
        height, width = sample.size
        assert np.array_equal(sample.boxes.numpy(), np.clip(wanted, 0, [width, height, width, height]))
        assert sample.area.tolist() == pytest.approx([one["area"] for one in known], rel=1e-6)


def test_names_can_be_anything(tmp_path: Path) -> None:
    root = write_set(tmp_path / "any")
    (root / "annotations" / "instances_val2017.json").rename(root / "boxes.json")
    (root / "val2017").rename(root / "pictures")
    names = {"train_images": "pictures", "val_images": "pictures"}
    data = CocoData(str(root), **names, train_annotations="boxes.json", val_annotations="boxes.json")
    assert len(data.train(unchanged)) == len(data.validation(unchanged)) == 3


def test_a_checkpoint_can_be_evaluated_without_the_training_set(tmp_path: Path) -> None:
    data = CocoData(str(write_set(tmp_path / "val_only")))
    assert len(data.validation(unchanged)) == 3
    with pytest.raises(DataError, match=r"instances_train2017.json do not exist.*data.train_annotations=\.\.\."):
        data.train(unchanged)


def test_limits_take_the_first_images_with_objects(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETFAMILY_CACHE", str(tmp_path / "cache"))
    data = CocoData(str(root), limit_train=1, limit_val=2)
    assert data.train(unchanged).image_ids == [10]
    assert data.validation(unchanged).image_ids == [10, 30]
    reference = COCO(str(data.validation_annotations))
    assert sorted(reference.imgs) == [10, 30]
    assert sorted(reference.anns) == [1, 2, 3, 4, 5, 6]
    assert len(reference.cats) == 3
    assert data.validation_annotations.is_relative_to(tmp_path / "cache")


def test_without_limits_the_evaluator_gets_the_original(root: Path) -> None:
    assert CocoData(str(root)).validation_annotations == root / "annotations" / "instances_val2017.json"


def test_overfitting_validates_on_training_images(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETFAMILY_CACHE", str(tmp_path / "cache"))
    file = "annotations/instances_train2017.json"
    data = CocoData(str(root), val_images="train2017", val_annotations=file, limit_train=1, limit_val=1)
    train, validation = data.train(unchanged), data.validation(unchanged)
    assert train.image_ids == validation.image_ids == [10]
    assert torch.equal(train[0].image, validation[0].image)


def test_the_seed_of_the_key_decides_the_augmentation(root: Path) -> None:
    dataset = CocoData(str(root)).train(RandomHorizontalFlip())
    samples = [dataset[SampleKey(2, seed)].boxes for seed in range(20)]
    again = [dataset[SampleKey(2, seed)].boxes for seed in range(20)]
    assert all(torch.equal(one, two) for one, two in zip(samples, again, strict=True))
    assert len({tuple(one.flatten().tolist()) for one in samples}) == 2


# --- what users get wrong ---------------------------------------------------------------------------------------------


def first_annotation(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda made: made["annotations"][0].update(values)


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda made: made.pop("annotations"), "no list 'annotations'"),
    (lambda made: made["images"].clear(), "lists no images"),
    (lambda made: made["categories"].clear(), "no categories"),
    (lambda made: made["images"].append(made["images"][0]), "image id 30 occurs twice"),
    (lambda made: made["images"][0].pop("height"), "image 30 needs a whole number as its 'height'"),
    (lambda made: made["images"][0].pop("file_name"), "image 30 has no 'file_name'"),
    (lambda made: made["images"][0].update(id="30"), "an image needs a whole number as its 'id', not '30'"),
    (lambda made: made["images"][0].update(width=0), "image 30 has the impossible size 0x40"),
    (first_annotation(category_id=8), "annotation 1 has the category 8, which is not listed; valid names: 21, 7, 90"),
    (first_annotation(image_id=31), "annotation 1 belongs to image 31, which is not listed"),
    (first_annotation(bbox=[1, 2, 3]), "annotation 1 needs a 'bbox' of four numbers"),
    (first_annotation(bbox=None), "annotation 1 needs a 'bbox' of four numbers"),
    (first_annotation(bbox=[1, 2, float("nan"), 3]), "annotation 1 has the box .* not finite"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_annotations_are_named(tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    write_set(tmp_path / "set", change)
    with pytest.raises(DataError, match=message) as caught:
        CocoData(str(tmp_path / "set")).validation(unchanged)
    assert "instances_val2017.json" in str(caught.value)


def plausible(boxes: list[list[float]]) -> Annotations:
    made = content()
    made["annotations"] = [annotation(i + 1, 10, 7, box) for i, box in enumerate(boxes)]
    return Annotations.from_json(made, Path("some.json"))


def test_boxes_of_another_format_are_refused() -> None:
    with pytest.raises(DataError, match=r"relative to the image \(image 10: \[0.1, 0.2, 0.3, 0.4\]\)"):
        plausible([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.1, 1.0]])
    with pytest.raises(DataError, match="12 of 12 boxes reach out of their image .*two corners"):
        plausible([[30, 20, 55, 38]] * 12)
    with pytest.raises(DataError, match="none of its 12 boxes has a width"):
        plausible([[30, 20, -5, 10]] * 12)
    assert len(plausible([[30, 20, 55, 38]]).boxes) == 1


def test_missing_area_and_iscrowd_are_filled_in() -> None:
    made = content()
    for one in made["annotations"]:
        del one["area"], one["iscrowd"]
    found = Annotations.from_json(made, Path("some.json"))
    assert found.area.tolist() == [200, 600, 2400, 12]


def test_different_categories_are_named(root: Path) -> None:
    write_set(root, lambda made: made["categories"][1].update(name="tram"), split="train")
    with pytest.raises(
        DataError, match="only in instances_train2017.json: 7 'tram'; only in .*val2017.json: 7 'train'"
    ):
        CocoData(str(root)).train(unchanged)


def test_missing_places_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.root is not set"):
        CocoData("")
    with pytest.raises(DataError, match=r"data.root=.*nowhere is not a folder; it should hold train2017/"):
        CocoData(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="did you mean 'category_id'"):
        CocoData(str(root), labels="categoryid")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="limit_train=0 leaves nothing"):
        CocoData(str(root), limit_train=0)
    with pytest.raises(DataError, match="val2018.json do not exist"):
        CocoData(str(root), val_annotations="annotations/instances_val2018.json").label_map  # noqa: B018


def test_a_wrong_image_folder_shows_before_any_work(root: Path) -> None:
    with pytest.raises(DataError, match="does not exist.*'10.png'.*; it is there with data.val_images=train2017"):
        CocoData(str(root), val_images="images").validation(unchanged)
    with pytest.raises(DataError, match="lacks 3 of 3 images"):
        CocoData(str(root), val_images="annotations").validation(unchanged)


def test_broken_json(root: Path) -> None:
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match="not a json file, or only a part"):
        CocoData(str(root)).validation(unchanged)
    path.write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        CocoData(str(root)).validation(unchanged)


def test_area_ranges_are_checked(root: Path) -> None:
    ranges = {"all": [0, 1e9], "small": [0, 5], "medium": [5, 9], "large": [9, 1e9]}
    assert CocoData(str(root), area_ranges=ranges).area_ranges["medium"] == (5.0, 9.0)
    with pytest.raises(DataError, match=r"area_ranges.medium must be \[low, high\]"):
        CocoData(str(root), area_ranges={**ranges, "medium": [9, 5]})
    with pytest.raises(DataError, match="lacks 'small'"):
        CocoData(str(root), area_ranges={"all": [0, 1e9]})


# --- images -----------------------------------------------------------------------------------------------------------


def picture(mode: str) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    smooth = np.linspace(0, 255, 30 * 41 * bands).reshape(30, 41, bands).astype(np.uint8)
    return Image.fromarray(smooth.squeeze(), mode if mode != "P" else "L").convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png")],
)
def test_every_kind_of_image_becomes_rgb_as_pil_sees_it(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    picture(mode).save(path)
    ours = read_image(path)
    assert ours.dtype == torch.uint8
    with Image.open(path) as image:
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_an_orientation_in_the_file_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 30, 41)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("b/20.jpg", lambda data: data[: len(data) // 2], "image 20: .*20.jpg is damaged or cut off"),
        ("b/20.jpg", lambda data: b"", "image 20: .*20.jpg is not an image"),
        ("b/20.jpg", lambda data: b"\xff\xd8" + bytes(100), "image 20: .*20.jpg is (not an image|damaged)"),
        ("10.png", lambda data: data[: len(data) // 2], "image 10: .*10.png is damaged or cut off"),
    ],
)
def test_damaged_images_are_named(root: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    path = root / "train2017" / name
    path.write_bytes(damage(path.read_bytes()))
    dataset = CocoData(str(root)).train(unchanged)
    index = [10, 20].index(int(path.stem))
    with pytest.raises(DataError, match=message):
        dataset[index]


def test_an_image_of_another_size_is_refused(root: Path) -> None:
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "train2017" / "b" / "20.jpg")
    dataset = CocoData(str(root)).train(unchanged)
    with pytest.raises(DataError, match=r"image 20: .*20.jpg is 40x60 pixels .* says 60x40"):
        dataset[1]
    (root / "train2017" / "b" / "20.jpg").unlink()
    with pytest.raises(DataError, match="image 20: cannot read .*20.jpg: No such file"):
        dataset[1]


def test_samples_make_a_batch(root: Path) -> None:
    dataset = CocoData(str(root)).validation(unchanged)
    batch = collate([dataset[i] for i in range(3)])
    assert batch.targets.counts == (1, 0, 2)
    assert batch.images.image_ids == (10, 20, 30)
