from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detfamily.cli import main
from detfamily.data.images import read_image
from detfamily.predict import Predictor
from detfamily.predict.command import image_ids, own_fields, picture_names

from .conftest import photo


@pytest.fixture
def run(checkpoints: Callable[..., Path], photos: Path, tmp_path: Path) -> Callable[..., int]:
    """The command on the photos, with more words; results in ``out``."""

    def command(*words: str, output_dir: Path | None = tmp_path / "out", source: str | None = str(photos)) -> int:
        given = [f"checkpoint={checkpoints('deformable_detr')}"]
        given += [] if source is None else [f"source={source}"]
        given += [] if output_dir is None else [f"output_dir={output_dir}"]
        try:
            return main(["predict", *given, *words])
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code

    return command


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_drawn_and_written_down(
    run: Callable[..., int], predictors: Callable[..., Predictor], photos: Path, tmp_path: Path, capsys
) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    assert run("threshold=0.3", "max_detections=5") == 0
    pictures = ["images/a.jpg", "images/a.png.jpg", "images/below/a.jpg", "images/below/b.JPG"]
    assert listed(tmp_path / "out") == sorted([*pictures, "predictions.json"])
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert written["names"] == {"0": "cat", "1": "dog", "2": "eel"} and written["threshold"] == 0.3
    assert written["failed"] == [] and written["complete"] is True
    assert [one["image"] for one in written["images"]] == ["a.jpg", "a.png", "below/a.jpg", "below/b.JPG"]
    assert [one["picture"] for one in written["images"]] == pictures

    predictor, objects = replace(predictors("deformable_detr"), threshold=0.3), 0
    for one in written["images"]:
        found = predictor.predict(photos / one["image"])
        assert (one["height"], one["width"]) == found.size
        assert len(one["objects"]) == min(5, len(found)) > 0
        objects += len(one["objects"])
        rows = one["objects"]
        torch.testing.assert_close(torch.tensor([row["box"] for row in rows]), found.boxes[:5])
        torch.testing.assert_close(torch.tensor([row["score"] for row in rows]), found.scores[:5])
        assert [row["label"] for row in rows] == found.labels[:5].tolist()
        assert [row["name"] for row in rows] == list(found.names[:5])
        assert [row["category_id"] for row in rows] == [(3, 5, 9)[row["label"]] for row in rows]
        expected = np.asarray(replace(predictor, max_detections=5).predict(photos / one["image"]).draw()).astype(int)
        drawn = read_image(tmp_path / "out" / one["picture"]).permute(1, 2, 0).numpy().astype(int)
        assert drawn.shape == expected.shape and max(drawn.shape) == 384  # small images are enlarged to be read
        assert np.abs(drawn - expected).mean() < 6  # JPEG
    out = capsys.readouterr().out
    assert f"{objects} objects in 4 images; results in {tmp_path / 'out'}" in out
    assert "13 batch norms folded" in out and "score >= 0.3, at most 5 of an image" in out
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_boxes_are_drawn_on_the_upright_image(run: Callable[..., int], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(photo(400, 640))).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert run(source=str(tmp_path / "turned.jpg")) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"][0]
    assert (written["width"], written["height"]) == (640, 400)
    assert read_image(tmp_path / "out" / "images" / "turned.jpg").shape == (3, 400, 640)


def test_broken_images_are_named_and_all_others_done(
    run: Callable[..., int], photos: Path, tmp_path: Path, capsys
) -> None:
    whole = (photos / "a.png").read_bytes()
    for name, content in (("cut.png", whole[:200]), ("none.jpg", b""), ("text.png", b"hello")):
        (photos / name).write_bytes(content)
    assert run("batch_size=3") == 1
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["image"] for one in written["images"]] == ["a.jpg", "a.png", "below/a.jpg", "below/b.JPG"]
    assert [one["image"] for one in written["failed"]] == ["cut.png", "none.jpg", "text.png"]
    assert written["complete"] and len(listed(tmp_path / "out")) == 5
    said = capsys.readouterr().err
    assert re.search(r"broken: .*cut.png is damaged or cut off", said)
    assert re.search(r"broken: .*none.jpg is not an image: the file is empty", said)
    assert "3 of 7 images are broken and were left out" in said and "Traceback" not in said


def test_nothing_but_broken_images(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    assert run(source=str(tmp_path / "text.png")) == 1
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["images"] == []


def test_without_pictures_and_in_coco_form(run: Callable[..., int], photos: Path, tmp_path: Path, capsys) -> None:
    for number, name in ((139, "a.jpg"), (285, "a.png")):
        (photos / name).rename(photos / f"{number:012}{Path(name).suffix}")
    assert run("draw=false", "coco=true", "threshold=0", source=f"{photos}/*") == 0
    assert listed(tmp_path / "out") == ["predictions.json", "results.json"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    images = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [one["image_id"] for one in images] == [139, 285] and images[0]["picture"] is None
    assert len(results) == sum(len(one["objects"]) for one in images) == 2 * 36
    (x1, y1, x2, y2), first = images[0]["objects"][0]["box"], results[0]
    assert first["image_id"] == 139 and first["category_id"] == images[0]["objects"][0]["category_id"]
    assert first["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert "lacks" not in capsys.readouterr().out
    run("draw=false", "coco=true")
    assert "results.json lacks what is below the threshold" in capsys.readouterr().out


def test_an_empty_result_says_why(run: Callable[..., int], capsys) -> None:
    assert run("threshold=1", "draw=false") == 0
    out = capsys.readouterr().out
    assert "0 objects in 4 images" in out
    assert re.search(r"no score reaches threshold=1; the best is 0\.\d{3}, in (below/)?[ab]\.", out)


def test_by_default_results_go_beside_the_checkpoint_and_into_a_new_folder(
    run: Callable[..., int], checkpoints: Callable[..., Path]
) -> None:
    place = checkpoints("deformable_detr").parent
    for _ in range(2):
        assert run("draw=false", output_dir=None) == 0
    folders = [path for path in place.iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert all(re.fullmatch(r"predict-deformable_detr-\d+-\d{8}-\d{6}(-\d)?", folder.name) for folder in folders)


def test_results_inside_the_source_are_no_images_of_it(run: Callable[..., int], photos: Path) -> None:
    for _ in range(2):
        assert run(output_dir=photos / "out") == 0
    assert len(json.loads((photos / "out" / "predictions.json").read_text())["images"]) == 4


def test_no_input_is_ever_overwritten(run: Callable[..., int], photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "images").mkdir()
    (photos / "a.jpg").rename(photos / "images" / "a.jpg")
    before = (photos / "images" / "a.jpg").read_bytes()
    assert run(source=str(photos / "images" / "a.jpg"), output_dir=photos) == 2
    assert "would overwrite an image of the source" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(photos)
    assert run(source=str(photos / "images" / "a.jpg"), output_dir=tmp_path / "link") == 2
    assert (photos / "images" / "a.jpg").read_bytes() == before and not (photos / "predictions.json").exists()


def test_overrides_reach_the_config_of_the_checkpoint(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("threshold=0", "draw=false", "postprocess.num_select=2", "augmentation.short_side=48") == 0
    images = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [len(one["objects"]) for one in images] == [2] * 4


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        ([], {"source": None}, "say with what and in what"),
        ([], {"source": ""}, "the source is empty"),
        ([], {"source": "/no/such/place.jpg"}, "there is no image or folder /no/such/place.jpg; in /"),
        (["source=again"], {}, "source is given 2 times"),
        (["threshold=2"], {}, "threshold=2: expected a score between 0"),
        (["threshold=null"], {}, "threshold=None"),
        (["max_detections=many"], {}, "max_detections='many'"),
        (["batch_size=0"], {}, "batch_size=0"),
        (["draw=maybe"], {}, "draw='maybe': expected true or false"),
        (["device=gpu"], {}, "device='gpu' does not exist"),
        (["treshold=0.3"], {}, "treshold"),
        (["postprocess.num_selct=3"], {}, "did you mean 'num_select'"),
        (["--threshold"], {}, "unknown option"),
    ],
)
def test_mistakes_end_in_one_message_before_any_work(
    run: Callable[..., int], tmp_path: Path, capsys, words: list[str], more: dict[str, str], said: str
) -> None:
    assert run(*words, **more) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_wrong_checkpoint_shows_before_anything_is_read(photos: Path, tmp_path: Path, capsys) -> None:
    assert main(["predict", f"checkpoint={tmp_path / 'best.pt'}", f"source={photos}"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_no_half_file(
    run: Callable[..., int], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run() == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(tmp_path / "out") in said
    assert listed(tmp_path / "out") == []


def test_what_was_done_before_an_interruption_is_written(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    def draw(*arguments: object) -> None:
        done.append(arguments)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("detfamily.predict.command._draw", draw)
    assert run() == 130
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(written["images"]) == 2 and written["complete"] is False


def test_pictures_never_meet() -> None:
    names = ["a.jpg", "a.JPG", "a.png", "a.png.jpg", "a.PNG", "sub/a.jpg", "a", "a.jpeg", "a.png.jpg.jpg", ".jpg"]
    pictures = [one.as_posix() for one in picture_names([Path(name) for name in names])]
    assert len({one.casefold() for one in pictures}) == len(names)
    assert pictures[0] == "images/a.jpg" and pictures[3] == "images/a.png.jpg" and pictures[5] == "images/sub/a.jpg"
    assert all(one.casefold().endswith((".jpg", ".jpeg")) for one in pictures)
    assert picture_names([Path("b.png"), Path("a.tif")]) == [Path("images/b.png.jpg"), Path("images/a.tif.jpg")]


def test_ids_are_the_numbers_that_files_are_named_by() -> None:
    assert image_ids([Path("000000000139.jpg"), Path("sub/000000000007.jpg")]) == [139, 7]
    assert image_ids([Path("7.jpg"), Path("x.jpg")]) == [1, 2]
    assert image_ids([Path("7.jpg"), Path("007.jpg")]) == [1, 2]
    assert image_ids([Path("²³.jpg")]) == [1]


def test_a_source_is_taken_as_it_is_written() -> None:
    for text in ("photos/**/[ab]?.{x}.jpg", "a,b.jpg", "my photo (1).jpg", "k=v.jpg"):
        own, others = own_fields([f"source={text}", "postprocess.num_select=3", "threshold=0.25"])
        assert own["source"] == text and own["threshold"] == 0.25 and others == ["postprocess.num_select=3"]
        assert own_fields([f"source='{text}'"])[0]["source"] == text
