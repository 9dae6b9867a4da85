"""``detfamily check-data``: each kind of defect is planted into a small data set, and must be found by name."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detfamily.cli import main
from detfamily.data.check.annotations import scan
from detfamily.data.check.command import check
from detfamily.data.check.files import inspect_file, inspect_files, missing_files
from detfamily.data.check.findings import KINDS, Finding, Findings
from detfamily.data.check.report import Report
from detfamily.data.coco import CocoData
from detfamily.errors import DataError

COCO_MINI = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_mini"
HEIGHT, WIDTH = 40, 60
Change = Callable[[dict[str, Any]], Any]


def content(first: int) -> dict[str, Any]:
    """Three images with two objects each; ids start at ``first``."""
    boxes = ([10, 5, 20, 30], [30.5, 2, 20, 10])
    annotations = [
        {
            "id": 10 * image + at,
            "image_id": image,
            "category_id": (7, 21)[at],
            "bbox": list(box),
            "area": 99.0,
            "iscrowd": 0,
        }
        for image in range(first, first + 3)
        for at, box in enumerate(boxes)
    ]
    return {
        "images": [
            {"id": image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH}
            for image in range(first, first + 3)
        ],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "boat"}, {"id": 21, "name": "cow"}],
    }


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A faultless data set: training images 1 to 3, validation images 101 to 103."""
    root = tmp_path / "set"
    for split, first in (("train", 1), ("val", 101)):
        (root / split).mkdir(parents=True)
        (root / f"{split}.json").write_text(json.dumps(content(first)))
        for image in range(first, first + 3):
            Image.fromarray(pixels(image)).save(root / split / f"{image}.jpg")
    return root


def sources(root: Path) -> dict[str, tuple[Path, Path]]:
    return {split: (root / f"{split}.json", root / split) for split in ("train", "val")}


def examine(root: Path, **settings: Any) -> Report:
    return check(sources(root), workers=0, **settings)


def rewrite(root: Path, change: Change, split: str = "train") -> None:
    path = root / f"{split}.json"
    made = json.loads(path.read_text())
    change(made)
    path.write_text(json.dumps(made))


def codes(report: Report, *levels: Any) -> set[str]:
    return {kind.code for kind in report.findings.kinds(*(levels or ("stop", "error")))}


def test_a_faultless_set_has_no_findings(root: Path) -> None:
    report = examine(root)
    assert report.errors == 0 and list(report.findings) == []
    assert report.statistics["train"]["objects_by_class"] == {"boat": 3, "cow": 3}


# -- planted errors ---------------------------------------------------------------------------------------------------


def image(at: int = 1, **values: Any) -> Change:
    return lambda made: made["images"][at].update(values)


def box(at: int = 2, **values: Any) -> Change:
    """Change an annotation: number 2 is the first of image 2, with the id 20."""
    return lambda made: made["annotations"][at].update(values)


def every_box(make: Callable[[list[float]], list[float]]) -> Change:
    def change(made: dict[str, Any]) -> None:
        made["annotations"] = [
            {**one, "id": 100 * copy + one["id"], "bbox": make([x + copy / 7 for x in one["bbox"]])}
            for copy in range(2)
            for one in made["annotations"]
        ]

    return change


def again(key: str, at: int, **values: Any) -> Change:
    return lambda made: made[key].append({**made[key][at], **values})


IN_JSON: list[tuple[str, Change, dict[str, Any]]] = [
    ("json-layout", lambda made: made.pop("annotations"), {"words": "no list 'annotations'"}),
    ("no-images", lambda made: made["images"].clear(), {}),
    ("no-categories", lambda made: made["categories"].clear(), {}),
    ("no-annotations", lambda made: made["annotations"].clear(), {}),
    ("category-id", again("categories", 0, id="7", name="kite"), {"words": "not '7'"}),
    ("category-id-twice", again("categories", 0, name="kite"), {"words": "category id 7 occurs twice"}),
    ("category-name", lambda made: made["categories"][0].pop("name"), {"words": "category 7 needs a text"}),
    ("category-name-twice", again("categories", 0, id=8), {"words": "'boat' occurs twice: ids 7, 8"}),
    ("categories-differ", lambda made: made["categories"][0].update(name="ship"), {"words": "7 'ship'"}),
    (
        "image-id",
        again("images", 0, id=None, file_name="x.jpg"),
        {"words": "an image needs a whole number"},
    ),
    ("image-id-twice", again("images", 0, file_name="x.jpg"), {"image_id": 1}),
    ("image-size", image(height=40.5), {"image_id": 2, "file": "2.jpg", "words": "'height', not 40.5"}),
    ("image-size", lambda made: made["images"][1].pop("width"), {"image_id": 2}),
    ("image-size-zero", image(width=0), {"image_id": 2, "file": "2.jpg", "words": "impossible size 0x40"}),
    ("file-name", lambda made: made["images"][1].pop("file_name"), {"image_id": 2}),
    ("file-name-twice", image(file_name="./1.jpg"), {"image_id": 2, "words": "images 1 and 2"}),
    ("annotation-id", lambda made: made["annotations"][2].pop("id"), {"image_id": 2, "words": "annotation number 2"}),
    ("annotation-id-twice", box(id=10), {"image_id": 2, "annotation_id": 10}),
    ("annotation-image", box(image_id=77), {"annotation_id": 20, "image_id": 77, "words": "which is not listed"}),
    ("annotation-image", box(image_id="2"), {"annotation_id": 20, "words": "not '2'"}),
    ("annotation-image", lambda made: made["annotations"].append(5), {"words": "annotation number 6"}),
    ("annotation-category", box(category_id=9), {"annotation_id": 20, "image_id": 2, "words": "category 9"}),
    ("annotation-category", box(category_id=[7]), {"annotation_id": 20}),
    ("box-format", box(bbox=[1, 2, 3]), {"annotation_id": 20, "image_id": 2, "file": "2.jpg"}),
    ("box-format", box(bbox=[1, 2, 3, "4"]), {"annotation_id": 20, "words": "four numbers"}),
    ("box-format", lambda made: made["annotations"][2].pop("bbox"), {"annotation_id": 20}),
    ("box-not-finite", box(bbox=[1, 2, float("nan"), 4]), {"annotation_id": 20, "file": "2.jpg"}),
    ("box-not-finite", box(bbox=[1, 2, float("inf"), 4]), {"annotation_id": 20}),
    ("box-not-finite", box(bbox=[1, 2, 10**400, 4]), {"annotation_id": 20}),
    ("box-not-finite", box(bbox=[1, 2, 1e12, 4]), {"annotation_id": 20, "words": "far beyond any image"}),
    ("box-negative", box(bbox=[10, 5, -8, 30]), {"annotation_id": 20, "image_id": 2, "file": "2.jpg"}),
    ("box-empty", box(bbox=[10, 5, 8, 0]), {"annotation_id": 20, "image_id": 2, "file": "2.jpg"}),
    ("box-outside", box(bbox=[60, 5, 8, 30]), {"annotation_id": 20, "image_id": 2, "words": "nothing of it"}),
    ("box-sticks-out", box(bbox=[10, 5, 20, 36.5]), {"annotation_id": 20, "words": "reaches 1.5 pixels out"}),
    ("box-sticks-out", box(bbox=[-2, 5, 20, 30]), {"annotation_id": 20, "words": "reaches 2 pixels out"}),
    (
        "box-twice",
        again("annotations", 2, id=99),
        {"annotation_id": 99, "words": "repeats annotation 20"},
    ),
    ("boxes-relative", every_box(lambda b: [x / 100 for x in b]), {"words": "relative to the image"}),
    ("boxes-corners", every_box(lambda b: [35 + b[0] / 10, 20, 55, 38]), {"words": "not two corners"}),
    ("boxes-empty", every_box(lambda b: [*b[:2], 0, 0]), {"words": "none of its 12 boxes"}),
    ("area-missing", lambda made: made["annotations"][2].pop("area"), {"annotation_id": 20, "file": "2.jpg"}),
    ("area-wrong", box(area=-3), {"annotation_id": 20, "words": "area -3"}),
    ("area-wrong", box(area="12"), {"annotation_id": 20}),
    ("area-wrong", box(area=float("nan")), {"annotation_id": 20}),
    ("crowd-wrong", box(iscrowd=2), {"annotation_id": 20, "image_id": 2}),
    ("crowd-wrong", box(iscrowd="0"), {"annotation_id": 20, "words": "'iscrowd' '0'"}),
]
CONSEQUENCES = {
    "no-images": {"annotation-image"},
    "no-categories": {"annotation-category", "categories-differ"},
    "category-name": {"categories-differ"},
    "category-name-twice": {"categories-differ"},
    "boxes-corners": {"box-sticks-out"},
    "boxes-empty": {"box-empty"},
}
"""What follows from a defect of a whole file."""


def named(finding: Finding, expected: dict[str, Any]) -> bool:
    words = expected.get("words", "")
    rest = {key: value for key, value in expected.items() if key != "words"}
    return words in finding.words and all(getattr(finding, key) == value for key, value in rest.items())


@pytest.mark.parametrize(("code", "change", "expected"), IN_JSON, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(IN_JSON)])
def test_a_defect_in_the_annotations_is_named(root: Path, code: str, change: Change, expected: dict[str, Any]) -> None:
    rewrite(root, change)
    report = examine(root, decode=False)
    assert codes(report) - CONSEQUENCES.get(code, set()) == {code}
    assert report.findings.counts[code] == len(report.findings.of(code))
    assert any(named(one, expected) for one in report.findings.of(code)), report.findings.of(code)
    assert {one.split for one in report.findings.of(code)} == ({None} if code == "categories-differ" else {"train"})


def jpeg(seed: int = 2, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).resize(size).save(file, "JPEG", **options)
    return file.getvalue()


def png(mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(2)).convert(mode).save(file, "PNG", **options)
    return file.getvalue()


def with_wrong_sum(data: bytes) -> bytes:
    """A PNG whose pixels decode, but whose check sum of them is wrong."""
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    end = at + 4 + length
    return data[:end] + struct.pack(">I", zlib.crc32(b"other")) + data[end + 4 :]


def tiff(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (WIDTH, HEIGHT), 7).save(file, "TIFF")
    return file.getvalue()


def turned(data_size: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(size=data_size, exif=exif)


IN_FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("file-missing", lambda path: path.unlink(), "does not exist"),
    ("file-missing", lambda path: (path.unlink(), path.symlink_to("nowhere.jpg")), "does not exist"),
    ("file-unreadable", lambda path: (path.unlink(), path.mkdir()), "it is a folder"),
    ("file-unreadable", lambda path: (path.unlink(), path.symlink_to(path.name)), "cannot read"),
    ("file-empty", lambda path: path.write_bytes(b""), "0 bytes"),
    ("not-an-image", lambda path: path.write_bytes(b"<html>not found</html>"), "not an image"),
    ("file-damaged", lambda path: path.write_bytes(jpeg()[:600]), "damaged or cut off"),
    ("file-damaged", lambda path: path.write_bytes(jpeg()[:-2] + bytes(500)), "a JPEG without its end"),
    ("file-damaged", lambda path: path.write_bytes(jpeg()[:500] + bytes(len(jpeg()) - 500)), "damaged or cut off"),
    ("file-damaged", lambda path: path.write_bytes(b"\xff\xd8" + bytes(100)), "2.jpg"),
    ("file-damaged", lambda path: path.write_bytes(png()[:600]), "damaged or cut off"),
    ("file-damaged", lambda path: path.write_bytes(with_wrong_sum(png())), "damaged or cut off"),
    ("pixels-32-bit", lambda path: path.write_bytes(tiff("F")), "32 bits"),
    ("size-differs", lambda path: path.write_bytes(jpeg(size=(61, 40))), "is 61x40 pixels .* says 60x40"),
    ("size-differs", lambda path: path.write_bytes(turned((40, 60))), "turned upright by its EXIF orientation"),
]


@pytest.mark.parametrize(("code", "plant", "words"), IN_FILES, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(IN_FILES)])
def test_a_defect_of_a_file_is_named(root: Path, code: str, plant: Callable[[Path], Any], words: str) -> None:
    plant(root / "train" / "2.jpg")
    report = examine(root)
    assert codes(report) == {code}
    (found,) = report.findings.of(code)
    assert (found.split, found.file, found.image_id) == ("train", "2.jpg", 2)
    assert found.words.startswith("image 2: ")
    assert re.search(words, found.words)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(root: Path) -> None:
    (root / "train" / "2.jpg").chmod(0)
    report = examine(root)
    assert codes(report) == {"file-unreadable"}
    assert "Permission denied" in report.findings.of("file-unreadable")[0].words


@pytest.mark.parametrize(
    ("code", "text"),
    [("json-missing", None), ("json-broken", '{"images": [{"id'), ("json-layout", "[]"), ("json-broken", "")],
)
def test_a_defect_of_the_whole_file_is_named_and_the_other_split_still_checked(
    root: Path, code: str, text: str | None
) -> None:
    (root / "train.json").unlink()
    if text is not None:
        (root / "train.json").write_text(text)
    rewrite(root, lambda made: made["annotations"][0].update(category_id=9), "val")
    report = examine(root)
    assert codes(report) == {code, "annotation-category"}
    assert [(one.split, one.file) for one in report.findings.of(code)] == [("train", str(root / "train.json"))]
    assert set(report.statistics) == {"val"}


def test_images_in_training_and_validation_are_named(root: Path) -> None:
    (root / "val" / "102.jpg").write_bytes((root / "train" / "3.jpg").read_bytes())
    (root / "val" / "101.jpg").unlink()
    rewrite(root, image(0, file_name="../train/1.jpg"), "val")
    report = examine(root)
    assert codes(report) == {"image-in-both"}
    assert [(one.image_id, one.words) for one in report.findings.of("image-in-both")] == [
        (101, f"validation image 101 is training image 1: {root}/train/1.jpg"),
        (102, "validation image 102 (102.jpg) has the same bytes as training image 3 (3.jpg)"),
    ]
    assert [one.image_id for one in examine(root, decode=False).findings.of("image-in-both")] == [101]


def test_all_kinds_of_errors_are_planted() -> None:
    errors = {code for code, kind in KINDS.items() if kind.level != "notice"}
    planted = {code for code, *_ in IN_JSON} | {code for code, *_ in IN_FILES}
    assert planted | {"json-missing", "json-broken", "image-in-both"} == errors
    assert len(errors) >= 40


def test_the_documentation_lists_all_kinds() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (stop|error|notice) \| (.*) \|$", text, re.MULTILINE)
    assert rows == [(kind.code, kind.level, kind.title) for kind in KINDS.values()]


def test_many_defects_at_once_are_all_found(root: Path) -> None:
    """Defects do not hide each other, except where one takes away what the other is about."""
    alone = [
        ("box-negative", box(0, bbox=[10, 5, -8, 30])),
        ("area-wrong", box(0, area=-1)),
        ("crowd-wrong", box(0, iscrowd=7)),
        ("box-format", box(1, bbox=[])),
        ("annotation-category", box(2, category_id=1)),
        ("box-outside", box(3, bbox=[10, 90, 8, 30])),
        ("annotation-id-twice", box(3, id=10)),
        ("image-size-zero", image(2, height=-4)),
    ]
    for _, change in alone:
        rewrite(root, change)
    (root / "train" / "1.jpg").write_bytes(b"")
    (root / "train" / "2.jpg").unlink()
    assert codes(examine(root)) == {code for code, _ in alone} | {"file-empty", "file-missing"}


def test_boxes_may_reach_out_by_a_pixel(root: Path) -> None:
    rewrite(root, box(bbox=[-1, -0.5, 61.5, 41.5]))
    assert examine(root, decode=False).errors == 0


# -- notices ----------------------------------------------------------------------------------------------------------


def drop_category(category_id: int) -> Change:
    def change(made: dict[str, Any]) -> None:
        made["annotations"] = [one for one in made["annotations"] if one["category_id"] != category_id]

    return change


def empty_image(made: dict[str, Any]) -> None:
    made["annotations"] = [one for one in made["annotations"] if one["image_id"] != 2]


def many_boats(made: dict[str, Any]) -> None:
    first = made["annotations"][0]
    made["annotations"] += [{**first, "id": 1000 + i, "bbox": [1 + i / 8, 1, 5, 6]} for i in range(301)]


NOTICES: list[tuple[str, Change | None, bytes | None, str]] = [
    ("no-objects", empty_image, None, "image 2 has no objects"),
    ("crowd", box(iscrowd=1), None, "annotation 20 is a crowd region"),
    ("crowd-missing", lambda made: made["annotations"][2].pop("iscrowd"), None, "annotation 20 has no 'iscrowd'"),
    ("tiny-object", box(bbox=[10, 5, 20, 3.5]), None, "annotation 20 has the box [10, 5, 20, 3.5]"),
    ("many-objects", many_boats, None, "image 1 has 303 objects, the detector 300 queries"),
    ("class-imbalance", many_boats, None, "304 objects of 'boat', 3 of 'cow'"),
    ("class-only-in-val", drop_category(7), None, "class 'boat' has 3 objects, all in val"),
    ("sizes-vary", image(width=600, height=400), None, "image 2 of 600x400"),
    ("image-twice", None, jpeg(1, quality=75), "images 1 and 2 have the same bytes"),
    ("grey", None, png("L"), "image 2"),
    ("alpha", None, png("RGBA"), "image 2"),
    ("deep", None, png("I;16"), "image 2"),
    ("rotated", None, turned((60, 40)), "image 2"),
    ("frames", None, None, "image 2"),
    ("cmyk", None, None, "image 2"),
    ("file-unlisted", lambda made: made["images"].pop(), None, "3.jpg"),
]


def moving() -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(pixels(seed)) for seed in (2, 3)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


def printed() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(2)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(("code", "change", "data", "words"), NOTICES, ids=[code for code, *_ in NOTICES])
def test_a_notice_names_what_it_is_about(
    root: Path, code: str, change: Change | None, data: bytes | None, words: str
) -> None:
    if change:
        rewrite(root, change)
    if code == "file-unlisted":
        rewrite(root, lambda made: made["annotations"].__delitem__(slice(4, None)))
    data = {"frames": moving, "cmyk": printed}.get(code, lambda: data)()
    if data:
        (root / "train" / "2.jpg").write_bytes(data)
    report = examine(root, num_queries=300)
    assert codes(report) <= {"size-differs"} and (code == "sizes-vary" or report.errors == 0)
    assert any(words in one.words for one in report.findings.of(code)), list(report.findings)


def test_classes_that_one_split_lacks(root: Path) -> None:
    rewrite(root, drop_category(21), "val")
    for split in ("train", "val"):
        rewrite(root, lambda made: made["categories"].append({"id": 50, "name": "kite"}), split)
    found = {one.code: one.words for one in examine(root, decode=False).findings}
    assert found == {
        "class-only-in-train": "class 'cow' has 3 objects, all in train",
        "class-unused": "class 'kite' has no objects",
    }


def test_an_ordinary_image_has_no_traits(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    facts = inspect_file(tmp_path / "a.jpg")
    assert (facts.problem, facts.traits, facts.size, facts.turned) == ("", (), (HEIGHT, WIDTH), False)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_statistics_agree_with_counting_by_hand(root: Path) -> None:
    rewrite(root, box(0, iscrowd=1))
    rewrite(root, box(1, area=2000.0))
    rewrite(root, empty_image)
    numbers = examine(root, decode=False).statistics["train"]
    assert (numbers["images"], numbers["images_without_objects"]) == (3, 1)
    assert (numbers["objects"], numbers["crowd_regions"]) == (3, 1)
    assert numbers["objects_by_class"] == {"boat": 1, "cow": 2}
    assert numbers["objects_by_size"] == {"all": 3, "small": 2, "medium": 1, "large": 0}
    assert numbers["objects_per_image"] == {"mean": 1.0, "median": 1.0, "most": 2, "image_with_most": 3}
    assert numbers["image_sizes"]["largest"] == {"width": WIDTH, "height": HEIGHT, "image_id": 3}


def test_scanning_agrees_with_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    annotations = []
    for number in range(400):
        x, y, w, h = rng.integers(-12, 70, 4).tolist()
        annotations.append({"id": number, "image_id": int(rng.integers(1, 4)), "category_id": 7, "bbox": [x, y, w, h]})
    made = {**content(1), "annotations": [{**one, "area": 1, "iscrowd": 0} for one in annotations]}
    findings = Findings()
    scan(made, findings)
    expected: dict[str, set[int]] = {
        code: set() for code in ("box-negative", "box-empty", "box-outside", "box-sticks-out")
    }
    for one in annotations:
        x, y, w, h = one["bbox"]
        if w < 0 or h < 0:
            expected["box-negative"].add(one["id"])
        elif w == 0 or h == 0:
            expected["box-empty"].add(one["id"])
        elif x >= WIDTH or y >= HEIGHT or x + w <= 0 or y + h <= 0:
            expected["box-outside"].add(one["id"])
        elif x < -1 or y < -1 or x + w > WIDTH + 1 or y + h > HEIGHT + 1:
            expected["box-sticks-out"].add(one["id"])
    assert {code: {one.annotation_id for one in findings.of(code)} for code in expected} == expected
    assert all(expected.values())


def test_processes_give_what_this_one_gives(root: Path) -> None:
    paths = [
        root / split / f"{image}.jpg"
        for split, first in (("train", 1), ("val", 101))
        for image in range(first, first + 3)
    ]
    paths[1].write_bytes(b"no image")
    alone, shared = (list(inspect_files(paths, workers, "decoding")) for workers in (0, 2))
    assert alone == shared and [one.problem for one in alone] == ["", "not-an-image", "", "", "", ""]


def test_missing_files_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    (tmp_path / "a" / "2.jpg").mkdir()
    names = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg", "./a/1.jpg", str(tmp_path / "a" / "1.jpg")]
    assert missing_files(tmp_path, names) == [1, 2, 3]


# -- the command ------------------------------------------------------------------------------------------------------


def overrides(root: Path) -> list[str]:
    names = [f"data.{split}_{what}" for split in ("train", "val") for what in ("images", "annotations")]
    places = ["train", "train.json", "val", "val.json"]
    return ["data=coco", f"data.root={root}", *(f"{name}={place}" for name, place in zip(names, places, strict=True))]


def test_the_command_ends_with_status_1_for_errors_and_0_for_notices(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(root, empty_image)
    assert main(["check-data", *overrides(root), "check.workers=0"]) == 0
    said = capsys.readouterr().out
    assert "1 notice\n" in said and "no errors" in said and "train: image 2 has no objects (2.jpg)" in said
    (root / "val" / "101.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        main(["check-data", *overrides(root), "check.workers=0"])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "1 error\n  file-empty (1): " in said and "val: image 101: " in said


def test_the_limit_and_the_report(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root, lambda made: [one.update(category_id=9) for one in made["annotations"]])
    with pytest.raises(SystemExit):
        main(["check-data", *overrides(root), "check.limit=2", "check.decode=false"])
    said = capsys.readouterr().out
    assert "annotation-category (6)" in said and said.count("has the category 9") == 2 and "... and 4 more" in said
    target = tmp_path / "new" / "report.json"
    with pytest.raises(SystemExit):
        main(["check-data", *overrides(root), "check.limit=0", "check.decode=false", f"check.report={target}"])
    assert capsys.readouterr().out.count("has the category 9") == 6
    report = json.loads(target.read_text())
    (kind,) = [one for one in report["kinds"] if one["code"] == "annotation-category"]
    assert (kind["number"], kind["level"], report["errors"], report["decoded"]) == (6, "stop", 6, False)
    assert [one["annotation_id"] for one in kind["findings"]] == [10, 11, 20, 21, 30, 31]
    assert report["statistics"]["val"]["objects"] == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("check.limit=-1", "check.limit is -1"),
        ("check.workers=x", "check.workers is 'x'"),
        ("check.report=.", "folder"),
    ],
)
def test_settings_that_make_no_sense(root: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", *overrides(root), override]) == 2
    assert words in capsys.readouterr().err


def test_queries_are_those_of_the_detector(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", *overrides(root), "check.decode=false", "model.num_queries=1"]) == 0
    assert "image 1 has 2 objects, the detector 1 queries" in capsys.readouterr().out


def test_validating_on_the_training_images_is_no_leak(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", *overrides(root), "data.validate_on=train", "check.decode=false"]) == 0
    assert "val:" not in capsys.readouterr().out


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="no real images: put coco_mini at ../shared/data/coco_mini")
def test_real_images_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", "data=coco_mini", f"data.root={COCO_MINI}"]) == 0
    said = capsys.readouterr().out
    assert "no errors" in said and "images       192, 2 without objects" in said


# -- training runs the cheap part first --------------------------------------------------------------------------------


def read(root: Path) -> CocoData:
    return CocoData(str(root), "train", "train.json", "val", "val.json")


@pytest.mark.parametrize(("code", "change", "expected"), IN_JSON, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(IN_JSON)])
def test_training_refuses_what_it_cannot_live_with(
    root: Path, code: str, change: Change, expected: dict[str, Any]
) -> None:
    rewrite(root, change)
    data = read(root)
    if KINDS[code].level == "stop" or code == "no-annotations":
        with pytest.raises(DataError, match="train.json"):
            data.train(lambda sample, rng: sample)
    else:
        data.train(lambda sample, rng: sample)
        assert "1 doubtful entries: see detfamily check-data" in data.describe()


def test_training_names_the_first_few_and_counts_the_rest(root: Path) -> None:
    rewrite(root, lambda made: [one.update(category_id=9) for one in made["annotations"]])
    with pytest.raises(DataError) as caught:
        read(root).train(lambda sample, rng: sample)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and "annotation 10 has the category 9" in lines[0]
    assert lines[-1] == "and 1 more, which detfamily check-data names"


def test_one_missing_image_stops_training_before_it_begins(root: Path) -> None:
    (root / "train" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 3 images: train.json names '3.jpg' \(image 3\)"):
        read(root).train(lambda sample, rng: sample)
