"""``detfamily info``: what it prints, and what it never does."""

from __future__ import annotations

import re

import pytest
import torch

from detfamily import cli
from detfamily.backbones import resnet
from detfamily.data import shapes

SMALL = "backbone=small model.embed_dim=32 model.ffn_dim=32 encoder.num_layers=1 info.size=[64,96]"


@pytest.fixture(autouse=True)
def neither_data_nor_weights(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("info reads no data and no weights")

    monkeypatch.setattr(shapes, "prepare", refuse)
    monkeypatch.setattr(resnet, "_read_weights", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.chdir(tmp_path)


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["info", *words.split()]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def test_a_published_recipe(capsys) -> None:
    text = printed("experiment=dab_detr_r50", capsys)
    assert text.startswith("dab_detr_r50, of the family dab_detr\n")
    assert re.search(r"^ +cross_attention +ConditionalAttention embed_dim=256 num_heads=8", text, re.MULTILINE)
    assert "class head has 91 columns" in text
    assert re.search(r"^  all +43\.672, 43\.449 of them trained$", text, re.MULTILINE)
    assert re.search(r"^  backbone +23\.455, 23\.233 of them trained$", text, re.MULTILINE)
    assert re.search(r"GFLOPs for an image of 800 x 1110.*\n  all +89\.75$", text, re.MULTILINE)
    assert "AP 42.2  AP50 63.1" in text and "arXiv 2201.12329, table 2" in text
    assert "parameters  44 M; here 43.45 trained, 43.67 in all (counts the frozen parameters, too)" in text
    assert "GFLOPs      94; here 93.0 at 800 x 1333, convolution and attention only (their script misses" in text
    assert max(map(len, text.splitlines())) < 200


def test_a_family_alone(capsys) -> None:
    text = printed(f"family=deformable_detr denoising=dn {SMALL}", capsys)
    assert "class head has 8 columns: one for each class of data=shapes" in text
    for part in ("neck", "queries", "denoising", "decoder", "heads", "in sampling"):
        assert re.search(rf"^  {part} ", text, re.MULTILINE), part
    assert "experiment=NAME chooses a recipe" in text


def test_a_list_of_attentions_is_shown_one_by_one(capsys) -> None:
    text = printed(f"family=deformable_detr encoder_attention=[ms_deform,dense] {SMALL} encoder.num_layers=2", capsys)
    assert re.search(r"^ +attention\.0 +MSDeformAttention embed_dim=32", text, re.MULTILINE)
    assert re.search(r"^ +attention\.1 +DenseAttention embed_dim=32", text, re.MULTILINE)
    assert "_target_" not in text


def test_a_recipe_that_was_changed_is_not_compared(capsys) -> None:
    text = printed(f"experiment=detr_r50_500ep {SMALL}", capsys)
    assert "41 M parameters, 86 GFLOPs" in text and "here its model was changed" in text
    assert "elements" not in text


def test_what_is_no_matter_of_the_model_changes_nothing(capsys) -> None:
    words = "experiment=deformable_detr_r50_single_scale info.size=[64,96] schedule.epochs=3 data.root=/nowhere"
    assert "78; here 79.3 at 800 x 1110 (not explained)" in printed(words, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("experiment=detr_r51_500ep", "did you mean 'detr_r50_500ep'"),
        ("family=dert", "did you mean 'detr'"),
        ("info.sise=[1,2]", "did you mean 'size'"),
        ("info.size=[800]", "info.size is [800]; expected [height, width] in pixels"),
        ("info.size=[800,1.5]", "expected [height, width] in pixels"),
        ("info.size=[0,64]", "info.size is 0; expected at least 32"),
        (f"{SMALL} decoder=refine query_source=proposals", "larger images"),
        (f"{SMALL} query_source=proposals", "two stages need decoder=refine"),
        ("info.table=true experiment=detr_r50_500ep", "leave out everything but info.size"),
        ("info.table=true info.num_classes=80", "leave out everything but info.size"),
    ],
)
def test_mistakes(words: str, message: str, capsys) -> None:
    assert cli.main(["info", *words.split()]) == cli.FAILED
    out, err = capsys.readouterr()
    assert err.startswith("detfamily: ") and message in err and not out


def test_the_config_of_a_command_that_needs_no_data(capsys) -> None:
    assert cli.main(["info", "--cfg", "experiment=detr_r50_500ep"]) == 0
    assert "root: ." in capsys.readouterr().out
    assert cli.main(["train", "--cfg", "experiment=detr_r50_500ep"]) == cli.FAILED
    assert "data.root is missing" in capsys.readouterr().err
