from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from detfamily.cli import main
from detfamily.predict.restore import restore
from detfamily.visualize.command import untrained


@pytest.fixture
def run(checkpoints: Callable[[str], Path], photos: Path, tmp_path: Path) -> Callable[..., int]:
    """The command on the photos, with more words; results in ``out``."""

    def command(*words: str, detector: str = "two_stages", output_dir: bool = True) -> int:
        given = [f"checkpoint={checkpoints(detector)}", "device=cpu"]
        given += [f"output_dir={tmp_path / 'out'}"] if output_dir else []
        given += [] if any(word.startswith("source=") for word in words) else [f"source={photos / 'a.png'}"]
        try:
            return main(["visualize", *given, *words])
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code

    return command


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_pictures_of_each_image_and_a_sheet(
    run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.jpg").write_bytes((photos / "a.png").read_bytes())
    assert run(f"source={photos}", "what=[boxes,cross_attention]", "layer=-1", "query=3", "untrained=false") == 0
    names = ["boxes.png", "cross_attention-layer2-query3.png", "sheet.jpg"]
    assert listed(tmp_path / "out") == [f"{image}/{name}" for image in ("a.jpg", "a.png", "b") for name in names]
    sheet = Image.open(tmp_path / "out" / "b" / "sheet.jpg")
    assert sheet.format == "JPEG" and min(sheet.size) > 200
    assert f"pictures of 3 images in {tmp_path / 'out'}" in capsys.readouterr().out


def test_the_untrained_detector_stands_below_the_trained_one(run: Callable[..., int], tmp_path: Path) -> None:
    words = ("what=cross_attention", "layer=0", "query=3")
    assert run(*words) == 0
    both = Image.open(tmp_path / "out/a/cross_attention-layer0-query3.png").size
    assert run(*words, "untrained=false") == 0
    one = Image.open(tmp_path / "out/a/cross_attention-layer0-query3.png").size
    assert both[0] == one[0] and both[1] > 1.5 * one[1]


def test_untrained_is_what_training_starts_from(checkpoints: Callable[[str], Path]) -> None:
    restored = restore(checkpoints("deformable_detr"), "cpu", [])
    state = torch.get_rng_state()
    first, second = untrained(restored), untrained(restored)
    assert torch.equal(torch.get_rng_state(), state)
    for name, one in first.state_dict().items():
        assert torch.equal(one, second.state_dict()[name]), name
    for module in (first.encoder, first.decoder):
        offsets = [one for name, one in module.named_parameters() if name.endswith("sampling_offsets.weight")]
        assert offsets and not any(one.any() for one in offsets)


def test_a_place_in_pixels(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("what=encoder_attention", "layer=all", "place=[40,20]", "level=1", "untrained=false") == 0
    names = [f"a/encoder_attention-layer{layer}-at-42-32.png" for layer in (0, 1)]
    assert listed(tmp_path / "out") == [*names, "a/sheet.jpg"]


def test_a_place_in_pixels_of_an_image_that_is_padded(run: Callable[..., int], tmp_path: Path) -> None:
    words = ["what=encoder_attention", "layer=0", "place=[40,20]", "level=0", "untrained=false"]
    assert run(*words, "augmentation=lsj", "augmentation.image_size=192") == 0
    (name, _) = listed(tmp_path / "out")
    assert name == "a/encoder_attention-layer0-at-42-21.png"  # the cell of columns 40 to 43, rows 20 to 23


def test_by_default_pictures_go_beside_the_checkpoint(
    run: Callable[..., int], checkpoints: Callable[[str], Path]
) -> None:
    assert run("what=boxes", "untrained=false", output_dir=False) == 0
    (folder,) = checkpoints("two_stages").parent.glob("visualize-two_stages-*")
    assert listed(folder) == ["a/boxes.png", "a/sheet.jpg"]


def test_broken_images_are_named_and_all_others_done(
    run: Callable[..., int], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "text.png").write_text("hello")
    assert run(f"source={photos}", "what=boxes", "untrained=false") == 1
    assert listed(tmp_path / "out") == [f"{image}/{name}" for image in "ab" for name in ("boxes.png", "sheet.jpg")]
    said = capsys.readouterr()
    assert re.search("broken: .*text.png", said.err) and "1 of 3 images are broken" in said.err
    assert "pictures of 2 images" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["what=[boxes,crossattention]"], "what='crossattention': did you mean 'cross_attention'"),
        (["what=backbone"], "this detector has no attention there"),
        (["layer=first"], "layer='first': expected a number, a list of numbers, ends or all"),
        (["layer=7"], "layer=7: cross_attention has layers 0 to 2"),
        (["query=x"], "query='x': expected a number or a list of numbers"),
        (["query=99"], "query=99: this detector has queries 0 to 11"),
        (["queries=0"], "queries=0: expected 1 or more"),
        (["level=[1,2]"], "level=[1, 2]: expected a number"),
        (["level=9"], "level=9: the encoder has levels 0 to 3"),
        (["place=[96,0]"], "expected [x,y] in pixels of the image, which has 96x64"),
        (["place=5"], "expected [x,y]"),
        (["untrained=1"], "untrained=1: expected true or false"),
        (["sorce=a.png"], "sorce"),
        (["source=none.png"], "there is no image or folder none.png"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["visualize", "source=a.png"]) == 2
    assert "say what looks at what: checkpoint=" in capsys.readouterr().err
