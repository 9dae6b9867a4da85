"""Training of classifiers from end to end: what a run leaves, that it learns, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from detfamily.classification.train import ClassifierTrainer, classify
from detfamily.engine import checkpoint
from detfamily.errors import CheckpointError, ConfigError, DataError
from detfamily.tracking.files import read_rows

MIXED = ("augmentation=imagenet", "augmentation.size=32", "augmentation.test_size=36")
CLOCKS = ("seconds", "images_per_second", "seconds_left")


def same(one, other) -> bool:
    """Whether nested containers of tensors are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_run_leaves_everything_that_it_promises(config, tmp_path, capsys):
    folder = tmp_path / "run"
    numbers = classify(config("checkpoint.every=2", "optimizer.ema_decay=0.9"))
    out = capsys.readouterr().out
    assert numbers["images_seen"] == 24 and 0 <= numbers["top1"] <= numbers["top5"] <= 1 and numbers["loss"] > 0
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "last.pt", "best.pt", "epoch_0002.pt"),
        *("metrics.jsonl", "metrics.csv", "train_steps.jsonl", "metrics.json", "curves.png"),
    } - {"train_steps.jsonl"}
    rows = read_rows(folder / "metrics.jsonl")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)] and rows[1]["top1"] == numbers["top1"]
    assert json.loads((folder / "metrics.json").read_text())["images"] == 5
    state = checkpoint.load(folder / "last.pt")
    assert state["label_map"]["names"][0] == "circle" and state["model"]["head.weight"].shape == (8, 16)
    assert state["best"] == max(row["top1"] for row in rows)
    assert "epoch 2/2  top1 " in out and f"best top1 {100 * state['best']:.1f}" in out


def test_it_learns_a_few_shapes_by_heart(config):
    overrides = ("data.validate_on=train", "schedule.epochs=30", "evaluation.every=30", "optimizer.lr=5e-3")
    numbers = classify(config(*overrides, "data.difficulty=0", "runtime.precision=fp32"))
    assert numbers["top1"] >= 0.75  # of 12 images in 8 classes


@pytest.fixture
def undisturbed(config, tmp_path):
    classify(config(*MIXED, f"output_dir={tmp_path / 'whole'}", "tracking.log_every=1"))
    return checkpoint.load(tmp_path / "whole" / "last.pt")


@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_an_interrupted_run_ends_as_an_undisturbed_one_bit_for_bit(
    config, tmp_path, monkeypatch, undisturbed, stop_after
):
    step = ClassifierTrainer.train_step

    def interrupted(trainer, batches):
        if trainer.step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        step(trainer, batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ClassifierTrainer, "train_step", interrupted)
        classify(config(*MIXED, "tracking.log_every=1"))
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == stop_after
    classify(config(*MIXED, "tracking.log_every=1", "resume=auto"))
    again = checkpoint.load(tmp_path / "run" / "last.pt")
    for key in ("model", "optimizer", "epoch", "steps_done", "rng", "best", "meter"):
        assert same(again[key], undisturbed[key]), key
    ours, theirs = (read_rows(tmp_path / which / "metrics.jsonl") for which in ("run", "whole"))
    plain = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in rows] for rows in (ours, theirs)]
    assert plain[0] == plain[1]


def test_micro_batches_add_up_to_the_same_step(config, tmp_path):
    """Of a network without batch norm, which would see other batches."""
    frozen = ("backbone=swin_t", "backbone.embed_dim=12", "backbone.depths=[1,1,1,1]", "backbone.drop_path=0.0")
    small = ("backbone.num_heads=[1,1,2,2]", "schedule.epochs=1", "optimizer.clip_norm=null")
    losses = []
    for size in ("null", "2"):
        folder = f"output_dir={tmp_path / size}"
        losses.append(classify(config(*frozen, *small, f"runtime.batch_size_per_device={size}", folder))["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_weights_are_evaluated_without_training(config, tmp_path, capsys):
    numbers = classify(config())
    given = f"init_from={tmp_path / 'run' / 'last.pt'}"
    found = classify(config("evaluate_only=true", given, f"output_dir={tmp_path / 'found'}"))
    assert found == {name: numbers[name] for name in ("top1", "top5", "val_loss")}
    assert "8 of 8 by name" in capsys.readouterr().out
    assert json.loads((tmp_path / "found" / "metrics.json").read_text())["top1"] == numbers["top1"]
    with pytest.raises(ConfigError, match="needs weights: init_from="):
        classify(config("evaluate_only=true"))


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["model.num_classes=5"], ConfigError, "model.num_classes=5 contradicts the data set, which has 8"),
        (["model.stages=[4,5]"], ConfigError, "model.stages has 2 maps"),
        (["criterion.label_smoothing=1.0"], ConfigError, "label_smoothing=1.0: expected at least 0"),
        (["evaluation.every=0"], ConfigError, "evaluation.every is 0"),
        (["init_from=nowhere.pt"], CheckpointError, "there is no checkpoint nowhere.pt"),
        (["data=imagenet", "data.root=nowhere"], DataError, "data.root=nowhere is not a folder"),
    ],
)
def test_mistakes_are_named_before_any_work(config, tmp_path, overrides, error, words):
    with pytest.raises(error, match=words.replace("[", r"\[")):
        classify(config(*overrides))
    assert not (tmp_path / "run").exists()


def test_frozen_stages_that_nothing_was_loaded_into_are_warned_of(config, capsys):
    small = ("schedule.epochs=1", "data.image_size=64")
    classify(config("backbone=resnet18", *small))
    assert "leaves the frozen stages and norms of the backbone as they were drawn" in capsys.readouterr().out
