"""``detfamily convert``, from the command line's point of view: files in, files and words out."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from detfamily.build import build_detector, with_num_classes
from detfamily.checkpoints import adapter_for
from detfamily.cli import FAILED, main
from detfamily.config import compose, to_container
from detfamily.data.labels import LabelMap
from detfamily.engine import checkpoint
from detfamily.structures import Images

SMALL = [
    *("backbone=resnet18", "backbone.weights=null", "model.embed_dim=32", "model.ffn_dim=48", "model.num_queries=20"),
    *("encoder.num_layers=1", "decoder.num_layers=2", "data=shapes"),
]
DETR, PLAIN = ["family=detr"], ["family=deformable_detr"]
TWO_STAGE = ["family=deformable_detr", "decoder=refine", "query_source=proposals"]
CONDITIONAL, DAB, DN = ["family=conditional_detr"], ["family=dab_detr"], ["family=dn_detr"]
DN_DEFORMABLE = ["family=dab_deformable_detr", "denoising=dn"]
DINO, H_DEFORMABLE = ["family=dino"], ["family=h_deformable_detr", "model.num_one_to_many=3"]
CATEGORIES = [{"id": 3, "name": "boat"}, {"id": 7, "name": "buoy"}, {"id": 17, "name": "cat"}]
COCO = LabelMap(tuple(range(91)), tuple(f"c{i}" for i in range(91)))


def model(overrides: list[str], columns: int, seed: int = 1) -> Any:
    cfg = compose("train", [overrides[0], *SMALL, *overrides[1:]])
    torch.manual_seed(seed)
    return build_detector(cfg, columns, pretrained=False).eval(), cfg


def write_official(path: Path, overrides: list[str], columns: int = 91, args: Any = None, **more: Any) -> Any:
    detector, cfg = model(overrides, columns)
    state = adapter_for(cfg.family_name, detector).to_official(detector.state_dict())
    torch.save({"model": {**state, **more}, **({} if args is None else {"args": args})}, path)
    return detector


def write_ours(path: Path, overrides: list[str], labels: LabelMap) -> Any:
    detector, cfg = model(overrides, labels.num_classes)
    config = to_container(with_num_classes(cfg, labels.num_classes))
    state = {"config": config, "template": OmegaConf.to_container(cfg), "label_map": labels.state_dict()}
    checkpoint.save(path, {**state, "model": detector.state_dict()})
    return detector


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images in COCO's layout, under COCO's ids for cat and boat as another data set would have them."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
    for number in range(1, 4):
        name = f"{number}.png"
        pixels = generator.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        for split in ("train2017", "val2017"):
            Image.fromarray(pixels).save(root / split / name)
        content["images"].append({"id": number, "file_name": name, "height": 64, "width": 96})
        for category in CATEGORIES:
            box = [float(one) for one in generator.integers(4, 30, 4)]
            row = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": category["id"]}
            content["annotations"].append({**row, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def quick(root: Path) -> list[str]:
    return [
        *("data=coco", f"data.root={root}", "augmentation=none", "augmentation.short_side=64", "runtime.threads=1"),
        *("augmentation.max_size=96", "runtime.num_workers=0", "runtime.device=cpu", "evaluation.batch_size=1"),
    ]


def outputs(detector: Any) -> Any:
    pixels = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 96, 128, dtype=torch.bool)
    with torch.inference_mode():
        return detector(Images(pixels, mask, ((96, 128),), ((96, 128),), (0,)))["match"]


def rebuilt(path: Path) -> Any:
    loaded = checkpoint.load_model(path)
    cfg = OmegaConf.create(loaded.config)
    assert not isinstance(cfg, list)
    detector = build_detector(cfg, len(loaded.label_map["names"]), pretrained=False)
    checkpoint.load_weights(detector, loaded.weights, path)
    return detector.eval()


@pytest.mark.parametrize(
    ("overrides", "args", "repository"),
    [
        ([*DETR, "model.num_heads=4", "residual=pre_norm"], {"nheads": 4, "dilation": False}, "facebookresearch/detr"),
        ([*PLAIN, "model.num_points=2"], {"nheads": 8}, "fundamentalvision/Deformable-DETR"),
        (
            TWO_STAGE,
            {"nheads": 8, "num_queries": 20, "two_stage": True, "with_box_refine": True, "masks": False},
            "fundamentalvision/Deformable-DETR",
        ),
        (CONDITIONAL, {"nheads": 8, "num_queries": 20, "pre_norm": False}, "Atten4Vis/ConditionalDETR"),
        (
            [*DAB, "position.temperature=5", "position.temperature_x=50", "model.num_patterns=2"],
            {"nheads": 8, "pe_temperatureH": 5, "pe_temperatureW": 50, "num_patterns": 2, "modelname": "dab_detr"},
            "IDEA-Research/DAB-DETR",
        ),
        (
            [*DN, "ffn.activation._target_=torch.nn.GELU"],
            {"nheads": 8, "transformer_activation": "gelu", "use_dn": True, "scalar": 5, "label_noise_scale": 0.2},
            "IDEA-Research/DN-DETR",
        ),
        (
            DN_DEFORMABLE,
            {"nheads": 8, "pe_temperatureH": 20, "transformer_activation": "relu", "two_stage": False, "scalar": 3},
            "IDEA-Research/DN-DETR",
        ),
        (
            [*DINO, "model.stages=[2,3,4,5]", "model.num_levels=5", "position.temperature=10"],
            {"nheads": 8, "pe_temperatureH": 10, "pe_temperatureW": 10, "use_dn": True, "two_stage_type": "standard"},
            "IDEA-Research/DINO",
        ),
        (
            H_DEFORMABLE,
            {"nheads": 8, "num_queries_one2one": 20, "num_queries_one2many": 3, "mixed_selection": True, "topk": 100},
            "HDETR/H-Deformable-DETR",
        ),
    ],
)
def test_a_converted_file_computes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], args: dict[str, Any], repository: str
) -> None:
    detector = write_official(tmp_path / "a.pth", overrides, args=argparse.Namespace(**args))
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.pt")]) == 0
    wanted, found = outputs(detector), outputs(rebuilt(tmp_path / "a.pt"))
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.boxes, wanted.boxes)
    text = capsys.readouterr().out
    assert "91 columns: person, bicycle" in text and "warning" not in text
    assert repository in text


def test_a_converted_file_evaluates_with_the_right_labels(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """COCO's column 17 is its cat, and the data set's category 17 too; COCO's boat has id 9, the data set's 3."""
    write_official(tmp_path / "a.pth", PLAIN)
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.pt")]) == 0
    assert main(["evaluate", f"checkpoint={tmp_path / 'a.pt'}"]) == FAILED
    assert "data.root is not set" in capsys.readouterr().err
    more = [*quick(data), f"output_dir={tmp_path / 'out'}", "postprocess.num_select=1820"]
    assert main(["evaluate", f"checkpoint={tmp_path / 'a.pt'}", *more]) == 0
    assert "which are missed" in (text := capsys.readouterr().out) or "missed: buoy" in text
    results = json.loads((tmp_path / "out" / "results_val.json").read_text())
    assert {one["category_id"] for one in results} == {3, 17} and len(results) == 3 * 2 * 20
    detector = rebuilt(tmp_path / "a.pt")
    assert detector.heads.class_heads[0].out_features == 91


@pytest.mark.parametrize("overrides", [DETR, PLAIN, TWO_STAGE, CONDITIONAL, DAB, DN, DN_DEFORMABLE, DINO, H_DEFORMABLE])
def test_there_and_back_keeps_what_is_detected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    labels = LabelMap.contiguous(CATEGORIES)
    detector = write_ours(tmp_path / "ours.pt", overrides, labels)
    (tmp_path / "labels.json").write_text(json.dumps({"categories": CATEGORIES}))
    ours, official, back = (str(tmp_path / name) for name in ("ours.pt", "official.pth", "back.pt"))
    assert main(["convert", ours, official]) == 0
    assert main(["convert", official, back, f"categories={tmp_path / 'labels.json'}"]) == 0
    text = capsys.readouterr().out
    assert (text.count("IDEA-Research/DN-DETR") == 2) == (overrides in (DN, DN_DEFORMABLE)), text
    content = torch.load(official, weights_only=True)
    assert set(content) == {"model", "args"} and content["args"]["num_classes"] == 18
    wanted, found = outputs(detector), outputs(rebuilt(tmp_path / "back.pt"))
    loaded = LabelMap.from_state_dict(checkpoint.load(back)["label_map"])
    columns = [loaded.label_of(category["id"]) for category in CATEGORIES]
    assert columns == [3, 7, 17] and loaded.num_classes == 18
    scores = [one.softmax(-1) if overrides is DETR else one.sigmoid() for one in (wanted.logits, found.logits)]
    torch.testing.assert_close(scores[1][..., columns], scores[0][..., :3], rtol=1e-6, atol=1e-7)
    others = [column for column in range(18) if column not in columns]
    assert float(scores[1][..., others].max()) < 1e-20
    assert torch.equal(found.boxes, wanted.boxes)


@pytest.mark.parametrize("overrides", [TWO_STAGE, [*DN, "query_source.reference.random_centers=true"]])
def test_there_and_back_of_an_official_file_gives_its_bytes(tmp_path: Path, overrides: list[str]) -> None:
    write_official(tmp_path / "a.pth", overrides, args=argparse.Namespace(num_queries=20, random_refpoints_xy=True))
    for source, target in (("a.pth", "a.pt"), ("a.pt", "b.pth")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
    first, second = (torch.load(tmp_path / name, weights_only=False)["model"] for name in ("a.pth", "b.pth"))
    assert set(first) == set(second) and all(torch.equal(second[name], value) for name, value in first.items())


def test_averaged_weights_are_converted_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_official(tmp_path / "a.pth", DETR)
    content = torch.load(tmp_path / "a.pth")
    torch.save({**content, "ema_model": {k: v + 1 for k, v in content["model"].items()}}, tmp_path / "a.pth")
    name, official = "decoder.norm.bias", content["model"]["transformer.decoder.norm.bias"]
    texts = []
    for words, more in ((["ema=true"], 1), (["ema=false"], 0), ([], 0)):
        target = tmp_path / f"{len(texts)}.pt"
        assert main(["convert", str(tmp_path / "a.pth"), str(target), *words]) == 0
        assert torch.equal(checkpoint.load(target)["model"][name], official + more)
        texts.append(capsys.readouterr().out)
    assert "the averaged ones; the file has trained ones, too" in texts[0]
    assert "the trained ones; the file has averaged ones, too, which ema=true takes" in texts[2]
    for words, message in (
        (["ema=maybe"], "ema=maybe: expected true, the averaged weights, or false"),
        (["ema=true"], "0.pt has no averaged weights"),
    ):
        assert main(["convert", str(tmp_path / "0.pt"), str(tmp_path / "b.pth"), *words]) == FAILED
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b.pth").exists()


def test_one_of_our_two_sets_of_weights_goes_to_the_official_file(tmp_path: Path) -> None:
    write_ours(tmp_path / "a.pt", DETR, COCO)
    state = checkpoint.load(tmp_path / "a.pt")
    key = "decoder.norm.bias"
    averaged = {name: value + 1 for name, value in state["model"].items()}
    checkpoint.save(tmp_path / "a.pt", {**state, "ema": {"updates": 1, "model": averaged}})
    for number, (words, more) in enumerate((([], 1), (["ema=true"], 1), (["ema=false"], 0))):
        assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / f"{number}.pth"), *words]) == 0
        written = torch.load(tmp_path / f"{number}.pth", weights_only=True)["model"]
        assert torch.equal(written["transformer.decoder.norm.bias"], state["model"][key] + more)


def test_heads_of_another_data_set_need_its_categories(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_official(tmp_path / "a.pth", DETR, columns=18)
    source, target = str(tmp_path / "a.pth"), str(tmp_path / "a.pt")
    assert main(["convert", source, target]) == FAILED
    assert "what the 18 columns of its class head stand for (91 would be COCO's)" in capsys.readouterr().err
    names = data / "annotations" / "instances_val2017.json"
    assert main(["convert", source, target, f"categories={names}"]) == 0
    assert checkpoint.load(target)["label_map"]["names"][7] == "buoy"
    assert main(["evaluate", f"checkpoint={target}", *quick(data), f"output_dir={tmp_path / 'out'}"]) == 0
    results = json.loads((tmp_path / "out" / "results_val.json").read_text())
    assert {one["category_id"] for one in results} <= {3, 7, 17}


@pytest.mark.parametrize(
    ("overrides", "fit", "repository"),
    [
        (TWO_STAGE, "decoder=refine", "fundamentalvision/Deformable-DETR"),
        ([*DN, "model.num_patterns=2"], "model.num_patterns=2", "IDEA-Research/DN-DETR"),
    ],
)
def test_training_starts_from_official_weights(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    fit: str,
    repository: str,
) -> None:
    write_official(tmp_path / "a.pth", overrides, args={"num_queries": 20, "nheads": 8})
    run = [
        *("train", "experiment=finetune", f"init_from={tmp_path / 'a.pth'}", *quick(data), "schedule.epochs=1"),
        *("schedule.total_batch_size=3", "runtime.batch_size_per_device=3", "evaluation.pictures=0"),
        f"output_dir={tmp_path / 'run'}",
    ]
    assert main(run) == FAILED
    text = capsys.readouterr().err
    assert "do not fit the model" in text, text
    fits = text.partition("They fit ")[2].partition(". init_partial")[0].split()
    assert fit in fits and not (tmp_path / "run").exists()
    assert main([*run, *fits, "backbone.weights=null"]) == 0
    text = capsys.readouterr().out
    assert "2 of 3 by name (boat, cat); 1 new (buoy); 78 of the checkpoint are not needed" in text
    assert repository in text, text


def test_weights_alone_cannot_be_resumed_and_official_files_not_evaluated(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_official(tmp_path / "a.pth", PLAIN, args=argparse.Namespace(nheads=8))
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.pt")]) == 0
    assert main(["train", *PLAIN, *SMALL, f"resume={tmp_path / 'a.pt'}", f"output_dir={tmp_path / 'run'}"]) == FAILED
    assert "nothing to resume: start a new run from its weights with init_from=" in capsys.readouterr().err
    assert main(["evaluate", f"checkpoint={tmp_path / 'a.pth'}", *quick(data)]) == FAILED
    assert "detfamily convert " in capsys.readouterr().err


def test_a_config_that_is_not_whole_ends_in_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged(lambda state: state.update(template={"a": 1}))(tmp_path / "a.pt")
    for words in (["evaluate", f"checkpoint={tmp_path / 'a.pt'}"], ["convert", str(tmp_path / "a.pt"), "b.pth"]):
        assert main(words) == FAILED
        assert "damaged: its config has no name, family_name, model" in capsys.readouterr().err


def test_the_file_s_name_and_what_the_file_does_not_say_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_official(tmp_path / "detr-r50-e632da11.pth", DETR, args={"hidden_dim": 256}, total_ops=torch.zeros(1))
    assert main(["convert", str(tmp_path / "detr-r50-e632da11.pth"), str(tmp_path / "a.pt")]) == 0
    text = capsys.readouterr().out
    assert "1 ignored (total_ops)" in text and "not with e632da11" in text
    assert "taken as model.num_heads=8 (8 heads, as published), backbone.dilation=false (not DC5)" in text or (
        "backbone.dilation=false (not DC5), model.num_heads=8" in text
    )
    assert "its stored setting hidden_dim is 256, its tensors are of 32" in text


# -- what ends in a message --------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch DETFAMILY_TEST_RAN",)


def damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A checkpoint of ours in which something is of another kind."""

    def write(path: Path) -> None:
        write_ours(path, DETR, LabelMap.contiguous(CATEGORIES))
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return write


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def saved(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


BAD = {
    "nothing there": (lambda path: None, "there is no checkpoint"),
    "a folder": (lambda path: path.mkdir(), "there is no checkpoint"),
    "empty": (raw(b""), "is empty"),
    "web page": (raw(b"<html>Sign in</html>"), "is a web page"),
    "git-lfs pointer": (raw(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "json": (raw(b'{"message": "Not Found"}'), "is json text"),
    "noise": (raw(bytes(range(256)) * 8), "cut off or damaged"),
    "hostile pickle": (raw(pickle.dumps(Hostile())), "would run or make posix.system"),
    "hostile checkpoint": (saved({"model": {}, "args": Hostile()}), "would run or make posix.system"),
    "whole model": (saved({"model": torch.nn.Linear(1, 1)}), "torch.nn.modules.linear.Linear"),
    "a number": (saved(3), "holds a int"),
    "no tensors": (saved({"model": {"a": "b"}}), "no dense tensor"),
    "somebody else's": (saved({"model": {"a.b": torch.zeros(1)}}), "tensors of no known project"),
    "a panoptic model": (saved({"model": {"mask_head.lay1.weight": torch.zeros(1)}}), "panoptic model"),
    "mmdetection": (saved({"meta": {}, "state_dict": {"bbox_head.a": torch.zeros(1)}}), "mmdetection"),
    "ours without weights": (damaged(lambda state: state.pop("model")), "has no model"),
    "ours with a list for weights": (damaged(lambda state: state.update(model=[1])), "is damaged"),
    "ours with texts for weights": (damaged(lambda state: state.update(model={"a": "b"})), "is damaged"),
    "ours with a text for a config": (damaged(lambda state: state.update(template="x")), "is damaged"),
    "ours without a family": (damaged(lambda state: state["template"].pop("family_name")), "family_name"),
    "ours without labels": (damaged(lambda state: state.update(label_map={})), "label map"),
    "ours of a newer version": (damaged(lambda state: state.update(format=99)), "which is newer"),
    "ours with averages that are none": (damaged(lambda state: state.update(ema={"model": 3})), "is damaged"),
    "ours with a head of other columns": (
        damaged(lambda state: state["label_map"].update(category_ids=[1], names=["a"])),
        "its weights do not fit its own config and labels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = BAD[name]
    make(tmp_path / "in.pth")
    before = sorted(os.listdir())
    assert main(["convert", "in.pth", "out.pt"]) == FAILED
    text = capsys.readouterr().err
    assert text.startswith("detfamily: ") and any(word in text for word in words.split("|")), text
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "convert needs two files"),
        (["a.pth"], "convert needs two files"),
        (["a.pth", "categories=x.json"], "convert needs two files"),
        (["a.pth", "b.pt", "c.pt"], "'c.pt' is neither of the two files nor an override"),
        (["a.pth", "a.pth"], "exists already"),
        (["a.pth", "b.pt", "backbone=resnet51"], "backbone has no choice 'resnet51'"),
        (["a.pth", "b.pt", "model.num_head=4"], "did you mean"),
        (["a.pth", "b.pt", "backbone=resnet34"], "missing: backbone.0.body.layer"),
        (["a.pth", "b.pt", "family=detr"], "cannot become one of detr"),
        (["a.pth", "b.pt", "categories=none.json"], "none.json does not exist"),
        (["a.pth", "b.pt", "categories=a.pth"], "not a json file"),
        (["a.pth", "b.pt", "categories=bad.json"], "has no list 'categories'"),
        (["a.pth", "a.pth/b.pt"], "b.pt"),
    ],
)
def test_bad_words_end_in_a_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path / "a.pth", PLAIN)
    (tmp_path / "bad.json").write_text('{"categories": [3]}')
    assert main(["convert", *words]) == FAILED
    text = capsys.readouterr().err
    assert text.startswith("detfamily: ") and message in text, text
    assert sorted(os.listdir()) == ["a.pth", "bad.json"]


@pytest.mark.parametrize("name", ["hostile checkpoint", "git-lfs pointer", "somebody else's", "a panoptic model"])
def test_training_refuses_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path, name: str
) -> None:
    make, words = BAD[name]
    make(tmp_path / "in.pth")
    run = ["train", *DETR, *SMALL, *quick(data), f"init_from={tmp_path / 'in.pth'}", f"output_dir={tmp_path / 'run'}"]
    assert main(run) == FAILED
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
