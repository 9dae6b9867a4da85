from __future__ import annotations

import contextlib
import io
import json
import re

import pytest
import torch

from detfamily.config import compose
from detfamily.data.labels import LabelMap
from detfamily.engine import checkpoint
from detfamily.engine.distributed import World
from detfamily.engine.evaluate import by_name, evaluate, on_top_of, split_overrides
from detfamily.engine.train import train
from detfamily.errors import CheckpointError, ConfigError, DataError
from detfamily.predict import load


@pytest.fixture(scope="module")
def run(composed, tmp_path_factory):
    """The folder of a trained run."""
    folder = tmp_path_factory.mktemp("run") / "toy"
    cfg = composed.copy()
    cfg.output_dir, cfg.schedule.epochs, cfg.optimizer.lr = str(folder), 6, 2e-3
    cfg.evaluation.every, cfg.evaluation.pictures, cfg.optimizer.ema_decay = 6, 0, 0.5
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg)
    return folder


def numbers_of(run):
    return json.loads((run / "metrics.json").read_text())


def test_a_checkpoint_gives_the_numbers_of_its_training(run, tmp_path, capsys):
    numbers = evaluate([f"checkpoint={run / 'last.pt'}", f"output_dir={tmp_path / 'out'}"])
    trained = numbers_of(run)
    assert json.loads((run / "results_val.json").read_text())
    assert numbers == {name: value for name, value in trained.items() if name != "batch_size"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == trained
    assert (tmp_path / "out" / "results_val.json").read_text() == (run / "results_val.json").read_text()
    out = capsys.readouterr().out
    assert "(evaluated in batches of 4)" in out and out.count(" Average ") == 12


def test_by_default_results_go_beside_the_checkpoint_and_overwrite_nothing(run, capsys):
    evaluate([f"checkpoint={run / 'best.pt'}"])
    folders = [path.name for path in run.iterdir() if path.is_dir()]
    assert len(folders) == 1 and re.fullmatch(r"evaluate-best-\d{8}-\d{6}", folders[0])
    assert {path.name for path in (run / folders[0]).iterdir()} == {"metrics.json", "results_val.json"}


@pytest.fixture(scope="module")
def run_with_heads(tiny, tmp_path_factory):
    """The folder of a trained run with two auxiliary heads."""
    folder = tmp_path_factory.mktemp("heads") / "toy"
    few = ["auxiliary.0.rpn.proposals=20", "auxiliary.0.roi.hidden_dim=8", "auxiliary.0.roi.sampler.count=16"]
    few += ["collaboration.num_groups=8", "auxiliary.1.num_groups=8"]  # a map may be a single cell
    cfg = compose("train", [*tiny, "auxiliary=[faster_rcnn,atss]", "model.anchor_scale=0.5", *few])
    cfg.output_dir, cfg.schedule.epochs, cfg.evaluation.pictures = str(folder), 1, 0
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg)
    return folder


def test_auxiliary_heads_are_left_aside(run_with_heads, tmp_path, capsys):
    stored = checkpoint.load(run_with_heads / "last.pt")
    assert any(name.startswith("auxiliary.heads.atss.") for name in stored["model"])
    numbers = evaluate([f"checkpoint={run_with_heads / 'last.pt'}", f"output_dir={tmp_path}"])
    trained = numbers_of(run_with_heads)
    assert numbers == {name: value for name, value in trained.items() if name != "batch_size"}
    heads = sum(one.numel() for name, one in stored["model"].items() if name.startswith("auxiliary."))
    assert heads > 10000
    detector = load(run_with_heads / "last.pt", device="cpu").detector
    assert detector.auxiliary is None and not any("auxiliary" in name for name, _ in detector.named_parameters())


@pytest.mark.parametrize("name", ["atss", "faster_rcnn"])
def test_an_auxiliary_head_answers_instead_of_the_decoder(run_with_heads, tmp_path, capsys, name):
    file = run_with_heads / "last.pt"
    numbers = evaluate([f"checkpoint={file}", f"output_dir={tmp_path}", f"evaluation.branch={name}"])
    assert "AP" in numbers and "query_spread" not in numbers
    own = json.loads((tmp_path / "results_val.json").read_text())
    decoders = json.loads((run_with_heads / "results_val.json").read_text())
    assert own and [row["bbox"] for row in own] != [row["bbox"] for row in decoders]


def test_a_branch_that_is_not_there_is_refused_by_name(run, run_with_heads, tmp_path):
    with pytest.raises(ConfigError, match="evaluation.branch=ats is no auxiliary head.*'atss'"):
        evaluate([f"checkpoint={run_with_heads / 'last.pt'}", f"output_dir={tmp_path}", "evaluation.branch=ats"])
    with pytest.raises(ConfigError, match="wants an auxiliary head, and this model has none"):
        evaluate([f"checkpoint={run / 'last.pt'}", f"output_dir={tmp_path}", "evaluation.branch=atss"])


def test_a_results_file_is_evaluated_without_a_model(run, tiny, tmp_path, capsys):
    data = [one for one in tiny if one.startswith(("data=", "data."))]
    numbers = evaluate([f"results={run / 'results_val.json'}", f"output_dir={tmp_path}", *data])
    trained = numbers_of(run)
    assert numbers == {name: trained[name] for name in numbers} and "AP50" in numbers
    assert json.loads((tmp_path / "metrics.json").read_text()) == numbers


def test_overrides_are_applied_on_top_of_the_stored_config(run, tmp_path, capsys):
    evaluate(
        [
            *(f"checkpoint={run / 'last.pt'}", f"output_dir={tmp_path}", "evaluation.batch_size=1"),
            *("postprocess.num_select=3", "evaluation.backend=pycocotools", "data.limit_val=2"),
        ]
    )
    results = json.loads((tmp_path / "results_val.json").read_text())
    assert len(results) == 6 and len({row["image_id"] for row in results}) == 2
    assert "(evaluated in batches of 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ([], ConfigError, "say what to evaluate"),
        (["checkpoint=a.pt", "results=b.json"], ConfigError, "one of the two"),
        (["results=b.json"], ConfigError, "needs the data set"),
        (["checkpoint=RUN/lats.pt"], CheckpointError, "did you mean .*last.pt"),
        (["checkpoint=RUN/last.pt", "postprocess.num_selct=3"], ConfigError, "did you mean 'num_select'"),
        (["checkpoint=RUN/last.pt", "postprocess=topk"], ConfigError, "did you mean 'top_k'"),
        (["checkpoint=RUN/last.pt", "postproces.nms_iou=0.5"], ConfigError, "did you mean 'postprocess'"),
        (["checkpoint=RUN/last.pt", "postprocess.num_select=many"], ConfigError, "expected an integer"),
        (["checkpoint=RUN/last.pt", "decoder.num_layers=3"], CheckpointError, "do not fit .*missing: .*layers.2"),
        (["checkpoint=RUN/last.pt", "family=detr"], ConfigError, "which the checkpoint has settled"),
        (["checkpoint=RUN/last.pt", "evaluation.batch_size=0"], ConfigError, "batch_size is 0"),
    ],
)
def test_mistakes_are_named(run, overrides, error, words):
    with pytest.raises(error, match=words):
        evaluate([one.replace("RUN", str(run)) for one in overrides])


def test_a_chosen_group_replaces_the_stored_node_and_fields_reach_what_refers_to_them():
    stored = checkpoint_like(compose("train", ["augmentation=detr", "postprocess.nms_iou=0.7"]))
    cfg = on_top_of(stored, ["augmentation.test_short_side=320", "postprocess=per_query", "runtime=cpu"])
    assert cfg.augmentation.test.short_side == 320
    assert cfg.postprocess._target_.endswith("PerQuery") and cfg.postprocess.nms_iou is None
    assert cfg.runtime.device == "cpu"
    assert cfg.decoder == compose("train", []).decoder
    assert on_top_of(stored, []).postprocess.nms_iou == 0.7


def checkpoint_like(cfg):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=False)


def test_own_fields_are_told_apart_and_parsed_as_elsewhere(tmp_path):
    own, others = split_overrides(["checkpoint='a b.pt'", "data.root=/x", "data=coco"], ("checkpoint", "results"))
    assert own == {"checkpoint": "a b.pt", "results": None}
    assert others == ["data.root=/x", "data=coco"]


def classes(**ids):
    return LabelMap.contiguous([{"id": one, "name": name} for name, one in ids.items()])


def test_classes_are_found_by_name_in_another_data_set(capsys):
    trained = classes(cat=1, dog=2, eel=3)
    assert by_name(trained, classes(cat=1, dog=2, eel=3), World()) is trained
    found = by_name(trained, classes(dog=10, cat=70, fox=80), World())
    assert found.category_ids == (70, 10, None)
    out = capsys.readouterr().out
    assert "the data set does not have, so they are left out: eel" in out
    assert "the checkpoint does not know, so they are missed: fox" in out
    with pytest.raises(DataError, match="not one class in common"):
        by_name(trained, classes(fox=1, gnu=2), World())


def test_the_averaged_weights_are_evaluated(run):
    state = checkpoint.load(run / "last.pt")
    used = checkpoint.load_model(run / "last.pt").weights
    assert any(not torch.equal(used[name], value) for name, value in state["model"].items())
    assert all(torch.equal(used[name], value) for name, value in state["ema"]["model"].items())
