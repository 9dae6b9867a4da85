"""``detfamily import-data``: small data sets of both layouts, made by hand, against boxes worked out by hand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detfamily.cli import main
from detfamily.data.importers.voc import VocSettings, parse_xml, read_voc
from detfamily.data.importers.yolo import labels_of, read_yolo
from detfamily.errors import DataError

SIZES = {"dog": (60, 40), "two words": (50, 30), "2007_000027": (80, 20)}


def picture(path: Path, size: tuple[int, int], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (sum(map(ord, path.stem)) % 256, 50, 90)).save(path, **options)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def of(content: dict[str, Any], file_name: str) -> list[dict[str, Any]]:
    """The annotations of an image."""
    (image_id,) = [one["id"] for one in content["images"] if one["file_name"] == file_name]
    return [one for one in content["annotations"] if one["image_id"] == image_id]


# -- VOC --------------------------------------------------------------------------------------------------------------


def voc_object(name: str, corners: tuple[Any, Any, Any, Any], more: str = "<difficult>0</difficult>") -> str:
    sides = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object>\n<name>{name}</name>{more}\n<bndbox>{sides}</bndbox>\n</object>\n"


def voc_xml(root: Path, name: str, *objects: str, size: tuple[int, int] | None = None, head: str = "") -> Path:
    width, height = size or SIZES[name]
    sides = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    text = f"{head}<annotation>\n<filename>{name}.jpg</filename>\n{sides}\n{''.join(objects)}</annotation>\n"
    return write(root / "Annotations" / f"{name}.xml", text)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "voc set"
    for name, size in SIZES.items():
        picture(root / "JPEGImages" / f"{name}.jpg", size)
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    voc_xml(
        root,
        "dog",
        voc_object("dog", (1, 1, 60, 40), "<truncated>1</truncated><difficult>0</difficult>" + part),
        voc_object("person", (11, 6, 20.5, 30), "<difficult>1</difficult>"),
    )
    voc_xml(root, "two words", voc_object("cat", (5, 5, 5, 5), "<truncated>Unspecified</truncated>"))
    voc_xml(root, "2007_000027", size=(0, 0))
    write(root / "ImageSets" / "Main" / "train.txt", "dog\ntwo words\n")
    write(root / "ImageSets" / "Main" / "val.txt", "2007_000027  1\n\n")
    write(root / "ImageSets" / "Main" / "dog_train.txt", "dog  1\ntwo words -1\n")
    return root


def test_voc_boxes_are_first_and_last_pixels_counted_from_1(voc: Path) -> None:
    imported = read_voc(voc, VocSettings())
    assert imported.categories == {"cat": 1, "dog": 2, "person": 3}
    train, val = imported.coco("train"), imported.coco("val")
    assert [(one["file_name"], one["width"], one["height"]) for one in train["images"] + val["images"]] == [
        ("JPEGImages/dog.jpg", 60, 40),
        ("JPEGImages/two words.jpg", 50, 30),
        ("JPEGImages/2007_000027.jpg", 80, 20),  # the annotation says 0x0
    ]
    assert [one["id"] for one in train["images"] + val["images"]] == [1, 2, 3]
    dog, person = of(train, "JPEGImages/dog.jpg")
    assert dog == {
        "id": 1,
        "image_id": 1,
        "category_id": 2,
        "bbox": [0, 0, 60, 40],
        "area": 2400,
        "iscrowd": 0,
        "difficult": 0,
        "truncated": 1,
    }
    assert person["bbox"] == [10, 5, 10.5, 25]
    (pixel,) = of(train, "JPEGImages/two words.jpg")
    assert (pixel["bbox"], pixel["category_id"], pixel["truncated"]) == ([4, 4, 1, 1], 1, 0)
    assert val["annotations"] == [] and val["categories"] == train["categories"]


@pytest.mark.parametrize(
    ("difficult", "crowds"), [("ignore", [0, 1, 0]), ("keep", [0, 0, 0]), ("drop", [0, 0])], ids=str
)
def test_voc_difficult_objects(voc: Path, difficult: Any, crowds: list[int]) -> None:
    imported = read_voc(voc, VocSettings(difficult=difficult))
    annotations = imported.coco("train")["annotations"]
    assert [one["iscrowd"] for one in annotations] == crowds
    assert [one["difficult"] for one in annotations] == ([0, 0] if difficult == "drop" else [0, 1, 0])
    assert any(remark.startswith("1 difficult objects") for remark in imported.remarks)


def test_voc_boxes_as_borders(voc: Path) -> None:
    voc_xml(voc, "dog", voc_object("dog", (0, 0, 60, 40)), voc_object("dog", (10, 5, 20, 30)))
    edges = read_voc(voc, VocSettings(boxes="edges"))
    assert [one["bbox"] for one in of(edges.coco("train"), "JPEGImages/dog.jpg")] == [[0, 0, 60, 40], [10, 5, 10, 25]]
    assert not [remark for remark in edges.remarks if "voc.boxes=edges" in remark]
    assert [remark for remark in read_voc(voc, VocSettings()).remarks if "voc.boxes=edges" in remark]


def test_voc_lists_and_names_can_be_chosen(voc: Path) -> None:
    imported = read_voc(voc, VocSettings(splits=["dog_train"], names=["person", "dog", "cat", "cow"]))
    assert imported.categories == {"person": 1, "dog": 2, "cat": 3, "cow": 4}
    assert [len(images) for images in imported.splits.values()] == [2]
    with pytest.raises(DataError, match="'dgo_train'|dgo_train.txt does not exist; did you mean 'dog_train'"):
        read_voc(voc, VocSettings(splits=["dgo_train"]))
    with pytest.raises(DataError, match=r"dog.xml:5: the class 'dog' is not in voc.names; did you mean 'dogs'"):
        read_voc(voc, VocSettings(names=["dogs", "cat", "person"]))


def test_voc_without_lists_is_one_split(voc: Path) -> None:
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    imported = read_voc(voc, VocSettings())
    assert {split: len(images) for split, images in imported.splits.items()} == {"all": 3}


def test_voc_images_of_another_kind_and_in_subfolders(voc: Path) -> None:
    picture(voc / "JPEGImages" / "sub" / "bird.png", (9, 9))
    xml = voc_xml(voc, "sub/bird", voc_object("bird", (2, 2, 4, 4)), size=(9, 9))
    assert xml.parent.name == "sub"
    write(voc / "ImageSets" / "Main" / "val.txt", "sub/bird.png\n")
    val = read_voc(voc, VocSettings()).coco("val")
    assert [one["bbox"] for one in of(val, "JPEGImages/sub/bird.png")] == [[1, 1, 3, 3]]


VOC_BROKEN: list[tuple[str, str]] = [
    (voc_object("dog", (1, 1, "x", 4)), r"dog.xml:6: <xmax> is 'x', expected a number"),
    (voc_object("dog", (1, 1, "nan", 4)), r"dog.xml:6: <xmax> is 'nan'"),
    (voc_object("dog", (9, 1, 4, 4)), r"dog.xml:6: the box has its ends the wrong way round: x from 9 to 4"),
    (voc_object("", (1, 1, 4, 4)), r"dog.xml:4: an object without a name"),
    ("<object><name>dog</name></object>", r"dog.xml:4: an object without <bndbox>"),
    ("<object><name>dog</name><bndbox><xmin>1</xmin></bndbox></object>", r"dog.xml:4: <bndbox> has no <ymin>"),
    (voc_object("dog", (1, 1, 4, 4), "<difficult>maybe</difficult>"), r"dog.xml:5: <difficult> is 'maybe'"),
    ("<object>", r"dog.xml:4: not XML: mismatched tag"),
    ("\0", r"dog.xml:4: not XML"),
]


@pytest.mark.parametrize(("body", "message"), VOC_BROKEN)
def test_voc_problems_name_file_and_line(voc: Path, body: str, message: str) -> None:
    voc_xml(voc, "dog", body)
    with pytest.raises(DataError, match=message):
        read_voc(voc, VocSettings())


def test_voc_all_problems_are_named_at_once(voc: Path) -> None:
    voc_xml(voc, "dog", voc_object("dog", (1, 1, "x", 4)), voc_object("", (1, 1, 2, 2)))
    (voc / "JPEGImages" / "two words.jpg").unlink()
    write(voc / "ImageSets" / "Main" / "val.txt", "2007_000027\nnobody\n")
    with pytest.raises(DataError) as caught:
        read_voc(voc, VocSettings())
    said = str(caught.value)
    assert said.startswith("4 problems, so nothing is written:\n")
    assert "two words.xml:1: JPEGImages has no image of the name two words" in said
    assert re.search(r"val.txt:2: .*nobody.xml does not exist", said)


def test_voc_folders_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder Annotations: VOC's layout is"):
        read_voc(tmp_path, VocSettings())


BOMB = "<!DOCTYPE a [<!ENTITY a0 'ha'>{}]>".format(
    "".join(f"<!ENTITY a{i} '&a{i - 1};&a{i - 1};&a{i - 1};&a{i - 1};'>" for i in range(1, 30))
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
@pytest.mark.parametrize(
    "head",
    [
        BOMB,
        "<!DOCTYPE a [<!ENTITY secret SYSTEM 'file:///etc/passwd'>]>",
        "<!DOCTYPE a SYSTEM 'http://127.0.0.1:9/a.dtd'>",
        "<!DOCTYPE annotation>",
    ],
)
def test_xml_with_a_document_type_is_refused(tmp_path: Path, head: str, encoding: str) -> None:
    text = f"<?xml version='1.0' encoding='{encoding}'?>\n{head}<annotation>&a29;&secret;</annotation>"
    path = tmp_path / "a.xml"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=r"a.xml:2: a document type \(<!DOCTYPE ...>\) is refused"):
        parse_xml(path)


def test_xml_entities_without_a_document_type_stand_for_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xml", "<a>\n&secret;</a>")
    with pytest.raises(DataError, match="a.xml:2: not XML: undefined entity"):
        parse_xml(path)


def test_xml_of_any_encoding_and_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes("<?xml version='1.0' encoding='latin-1'?><a><name>Käfer &amp; Co</name></a>".encode("latin-1"))
    name = parse_xml(path).first("name")
    assert name is not None and name.text == "Käfer & Co"
    write(path, "<a>" * 100_000 + "</a>" * 100_000)
    assert parse_xml(path).name == "a"
    write(path, "<?xml version='1.0' encoding='klingon'?><a/>")
    with pytest.raises(DataError, match="a.xml"):
        parse_xml(path)


# -- YOLO -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    root = tmp_path / "yolo set"
    picture(root / "images" / "train" / "a.jpg", (100, 50))
    picture(root / "images" / "train" / "sub" / "b.png", (40, 40))
    picture(root / "images" / "val" / "c.jpg", (64, 32))
    write(root / "labels" / "train" / "a.txt", "0 0.5 0.5 0.2 0.4\n2 0.05 0.1 0.1 0.2\n\n")
    write(root / "labels" / "val" / "c.txt", "2 0.25 0.25 0.5 0.5\n")
    write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames: [bus, car, 'no']\nnc: 3\n")
    return root


def yolo_yaml(root: Path, old: str, new: str) -> None:
    text = (root / "data.yaml").read_text()
    assert old in text
    write(root / "data.yaml", text.replace(old, new))


def test_yolo_boxes_are_centres_and_sides_relative_to_the_image(yolo: Path) -> None:
    imported = read_yolo(yolo)
    assert imported.categories == {"bus": 0, "car": 1, "no": 2}
    train, val = imported.coco("train"), imported.coco("val")
    assert [(one["id"], one["file_name"], one["width"], one["height"]) for one in train["images"] + val["images"]] == [
        (1, "images/train/a.jpg", 100, 50),
        (2, "images/train/sub/b.png", 40, 40),
        (3, "images/val/c.jpg", 64, 32),
    ]
    assert of(train, "images/train/a.jpg") == [
        {"id": 1, "image_id": 1, "category_id": 0, "bbox": [40, 15, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
    ]
    assert of(train, "images/train/sub/b.png") == []
    assert [one["bbox"] for one in of(val, "images/val/c.jpg")] == [[0, 0, 32, 16]]
    assert [one["id"] for one in val["annotations"]] == [3]
    assert [remark for remark in imported.remarks if "1 images have no label file" in remark and "b.png" in remark]


@pytest.mark.parametrize(
    "names", ["{0: bus, 1: car, 2: 'no'}", "{'0': bus, '1': car, '2': 'no'}", "\n  0: bus\n  1: car\n  2: 'no'"]
)
def test_yolo_names_as_a_map(yolo: Path, names: str) -> None:
    yolo_yaml(yolo, "[bus, car, 'no']", names)
    assert read_yolo(yolo).categories == {"bus": 0, "car": 1, "no": 2}


@pytest.mark.parametrize(
    ("train", "count"),
    [
        ("[images/train/sub, images/val]", 2),
        ("lists/train.txt", 2),
        ("../images/train", 2),  # one ../ too much, as some exporters write
        ("images/train/sub", 1),
    ],
)
def test_yolo_places_are_folders_lists_or_several(yolo: Path, train: str, count: int) -> None:
    lines = ["images/train/a.jpg", "", f"{yolo}/images/train/sub/b.png"]
    write(yolo / "lists" / "train.txt", "\n".join(lines))
    yolo_yaml(yolo, "train: images/train", f"train: {train}")
    assert len(read_yolo(yolo).splits["train"]) == count


def test_yolo_lists_may_start_from_their_own_folder(yolo: Path) -> None:
    write(yolo / "images" / "train.txt", "./train/a.jpg\n")
    yolo_yaml(yolo, "train: images/train", "train: images/train.txt")
    assert [one.path.name for one in read_yolo(yolo).splits["train"]] == ["a.jpg"]


def test_yolo_a_path_of_another_machine_is_ignored(yolo: Path) -> None:
    yolo_yaml(yolo, "path: .", "path: /home/somebody/datasets/set")
    assert read_yolo(yolo).file_name(yolo / "images" / "val" / "c.jpg") == "images/val/c.jpg"


def test_yolo_polygons_become_the_boxes_around_them(yolo: Path) -> None:
    write(yolo / "labels" / "val" / "c.txt", "1 0.25 0.5 0.5 0.25 0.75 0.5 0.5 1.0\n")
    imported = read_yolo(yolo)
    assert imported.coco("val")["annotations"][0]["bbox"] == [16, 8, 32, 24]
    assert [remark for remark in imported.remarks if remark.startswith("1 polygons became")]


def test_yolo_remarks_on_labels_without_images_and_turned_images(yolo: Path) -> None:
    write(yolo / "labels" / "train" / "z.txt", "0 0.5 0.5 0.1 0.1\n")
    write(yolo / "labels" / "train" / "classes.txt", "bus\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(yolo / "images" / "val" / "c.jpg", (64, 32), exif=exif)
    imported = read_yolo(yolo)
    assert [remark for remark in imported.remarks if "1 label files have no image" in remark and "z.txt" in remark]
    assert [remark for remark in imported.remarks if "EXIF orientation" in remark and "c.jpg" in remark]
    assert imported.coco("val")["images"][0]["width"] == 64


YOLO_BROKEN: list[tuple[str, str]] = [
    ("0 0.5 0.5 0.2 0.4\n0 0.5 0.5 0.2", "a.txt:2: 4 numbers; expected class cx cy w h"),
    ("0 0.5 0.5 0.2 0.4 0.9", "a.txt:1: 6 numbers"),
    ("car 0.5 0.5 0.2 0.4", "a.txt:1: expected numbers, not 'car 0.5"),
    ("3 0.5 0.5 0.2 0.4", "a.txt:1: the class 3 has no name; known are 0 .. 2"),
    ("1.5 0.5 0.5 0.2 0.4", "a.txt:1: the class 1.5 has no name"),
    ("0 50 25 20 20", "a.txt:1: 50 is not between 0 and 1: coordinates are relative"),
    ("0 0.5 nan 0.2 0.4", "a.txt:1: nan is not between"),
    ("0 0.5 0.5 -0.005 0.4", "a.txt:1: the box has a negative width or height"),
]


@pytest.mark.parametrize(("text", "message"), YOLO_BROKEN)
def test_yolo_problems_name_file_and_line(yolo: Path, text: str, message: str) -> None:
    write(yolo / "labels" / "train" / "a.txt", text)
    with pytest.raises(DataError, match=message):
        read_yolo(yolo)


YAML_BROKEN: list[tuple[str, str, str]] = [
    ("names: [bus, car, 'no']", "", "data.yaml has no class names"),
    ("[bus, car, 'no']", "[bus, car]", "nc is 3, but there are 2 names"),
    ("[bus, car, 'no']", "[bus, bus, car]", "class name 'bus' occurs twice"),
    ("[bus, car, 'no']", "{a: bus, 1: car, 2: z}", "class number 'a'"),
    ("[bus, car, 'no']", "[bus, car, 'no'", "data.yaml:[0-9]: not YAML"),
    ("train: images/train", "train: images/trian", "train names 'images/trian', which is not in"),
    ("train: images/train\nval: images/val", "", "data.yaml names no images"),
    ("val: images/val", "val: labels/val", "labels/val: has no images"),
]


@pytest.mark.parametrize(("old", "new", "message"), YAML_BROKEN)
def test_yolo_problems_of_the_yaml_file(yolo: Path, old: str, new: str, message: str) -> None:
    yolo_yaml(yolo, old, new)
    with pytest.raises(DataError, match=message):
        read_yolo(yolo)


def test_yolo_files_that_are_missing_or_broken(yolo: Path) -> None:
    (yolo / "images" / "val" / "c.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="c.jpg: is not an image"):
        read_yolo(yolo)
    for path in (yolo / "labels").rglob("*.txt"):
        path.unlink()
    picture(yolo / "images" / "val" / "c.jpg", (64, 32))
    with pytest.raises(DataError, match=r"no image has a label file; the first would be in .*labels/train"):
        read_yolo(yolo)
    (yolo / "data.yaml").unlink()
    with pytest.raises(DataError, match="yolo set has none"):
        read_yolo(yolo)
    for name in ("a.yaml", "b.yaml"):
        write(yolo / name, "names: [x]")
    with pytest.raises(DataError, match=r"has several: a.yaml, b.yaml. Give it as root"):
        read_yolo(yolo)


def test_where_labels_lie() -> None:
    assert labels_of(Path("/data/images/set/images/train/a.b.jpg")) == Path("/data/images/set/labels/train/a.b.txt")
    assert labels_of(Path("/images/flat/a.jpg")) == Path("/labels/flat/a.txt")
    assert labels_of(Path("/flat/a.jpg")) == Path("/flat/a.txt")


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_what_is_imported_passes_the_check_that_is_printed(
    layout: str, voc: Path, yolo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = {"voc": voc, "yolo": yolo}[layout]
    if layout == "voc":
        voc_xml(voc, "2007_000027", voc_object("dog", (3, 3, 20, 20)))
    assert main(["import-data", f"format={layout}", f"root={root}"]) == 0
    said = capsys.readouterr().out
    assert (root / "annotations" / "instances_train.json").is_file() and "instances_val.json: 1 images" in said
    command = shlex.split(said.splitlines()[-1])
    assert command[:2] == ["detfamily", "check-data"]
    assert main([*command[1:], "check.workers=0"]) == 0
    assert "no errors" in capsys.readouterr().out


def test_nothing_is_overwritten_unless_asked(yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["import-data", "format=yolo", f"root={yolo}/data.yaml", f"output={tmp_path / 'out'}"]
    assert main(words) == 0
    target = tmp_path / "out" / "instances_val.json"
    target.write_text("mine")
    (tmp_path / "out" / "instances_train.json").unlink()
    assert main(words) == 2
    assert "instances_val.json exists already; overwrite=true" in capsys.readouterr().err
    assert target.read_text() == "mine" and not (tmp_path / "out" / "instances_train.json").exists()
    assert main([*words, "overwrite=true"]) == 0
    assert json.loads(target.read_text())["images"]


def test_a_set_without_validation_says_so(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-data", "format=voc", f"root={voc}", "voc.splits=[train]"]) == 0
    said = capsys.readouterr().out
    assert "remark: nothing to validate on" in said
    assert main([*shlex.split(said.splitlines()[-1])[1:], "check.workers=0"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=coco"], "format=coco does not exist"),
        (["format=yolov8"], "did you mean 'yolo'"),
        (["format=voc", "voc.boxes=edge"], "voc.boxes=edge does not exist; did you mean 'edges'"),
        (["format=voc", "voc.difficult=none"], "voc.difficult=none does not exist"),
        (["format=voc", "voc.names=dog"], "voc.names is 'dog', expected a list"),
        (["format=voc", "voc.names=[dog,dog]"], "occurs twice"),
        (["format=voc", "rot=x"], "did you mean 'root'"),
        (["format=voc", "root=nowhere"], "root=nowhere does not exist"),
        ([], "format is missing"),
    ],
)
def test_settings_that_make_no_sense(
    voc: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-data", f"root={voc}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (voc / "annotations").exists()
