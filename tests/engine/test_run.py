from __future__ import annotations

import re

import pytest
import yaml
from omegaconf import OmegaConf
from torch import nn

from detfamily.engine.distributed import World
from detfamily.engine.run import (
    check_plan,
    concerns,
    find_start,
    frozen_at_random,
    label_words,
    listing,
    parameter_words,
    write_config,
)
from detfamily.errors import CheckpointError, ConfigError


def start(**settings):
    cfg = OmegaConf.create({"name": "toy", "output_dir": None, "resume": None, **settings})
    return find_start(cfg, World())


def make_run(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "last.pt").write_bytes(b"")
    return folder


def test_a_new_run_gets_a_folder_named_after_it_and_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = start()
    assert re.fullmatch(r"runs/toy-\d{8}-\d{6}", found.folder.as_posix())
    assert found.checkpoint is None and not found.resumed and not found.folder.exists()


def test_the_folder_of_another_run_is_never_taken(tmp_path):
    folder = make_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds a run already; .*resume=auto"):
        start(output_dir=str(folder))
    (tmp_path / "notes").mkdir()
    assert start(output_dir=str(tmp_path / "notes")).folder == tmp_path / "notes"


def test_auto_goes_on_from_the_last_checkpoint_or_starts(tmp_path):
    folder = make_run(tmp_path / "a")
    assert start(output_dir=str(folder), resume="auto").checkpoint == folder / "last.pt"
    (folder / "last.pt").unlink()
    again = start(output_dir=str(folder), resume="auto")
    assert again.checkpoint is None and again.resumed
    assert not start(output_dir=str(tmp_path / "new"), resume="auto").resumed
    with pytest.raises(ConfigError, match="say which, output_dir="):
        start(resume="auto")


def test_a_checkpoint_by_name_goes_on_in_its_own_folder_or_in_a_free_one(tmp_path):
    folder = make_run(tmp_path / "a")
    for name in (folder / "last.pt", folder):
        found = start(resume=str(name))
        assert (found.folder, found.checkpoint, found.resumed) == (folder, folder / "last.pt", True)
    elsewhere = start(resume=str(folder), output_dir=str(tmp_path / "b"))
    assert elsewhere.folder == tmp_path / "b" and not elsewhere.resumed
    with pytest.raises(ConfigError, match="holds a run already"):
        start(resume=str(folder), output_dir=str(make_run(tmp_path / "c")))


def test_another_batch_or_epoch_cannot_go_on():
    state = {"plan": {"total_batch_size": 16, "steps_per_epoch": 10}}
    check_plan(state, {"total_batch_size": 16, "steps_per_epoch": 10}, "x.pt")
    with pytest.raises(CheckpointError, match=r"total_batch_size=16, now it would be 8.*init_from=x.pt"):
        check_plan(state, {"total_batch_size": 8, "steps_per_epoch": 10}, "x.pt")


def test_the_config_is_stored_as_plain_yaml(tmp_path):
    config = {"seed": 1, "model": {"stages": [3, 4]}, "name": "ünï"}
    write_config(tmp_path, config)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == config


def test_what_silently_ruins_runs_is_said():
    assert concerns(100, 63, 10_000) == []
    assert "image of the training set has 63 objects" in concerns(50, 63, 10_000)[0]
    assert "20 optimiser steps are few" in concerns(100, 63, 20)[0]
    assert "resnet50_scratch" in concerns(100, 63, 10_000, frozen_random=True)[0]


def test_frozen_stages_without_weights_are_noticed():
    assert frozen_at_random({"weights": None, "frozen_stages": 2}, starts_from_weights=False)
    assert not frozen_at_random({"weights": None, "frozen_stages": 2}, starts_from_weights=True)
    assert not frozen_at_random({"weights": "imagenet", "frozen_stages": 2}, starts_from_weights=False)
    assert not frozen_at_random({"weights": None, "frozen_stages": 0}, starts_from_weights=False)
    assert not frozen_at_random({"widths": [8]}, starts_from_weights=False)


def test_words_about_a_run():
    model = nn.Linear(1000, 1000)
    assert parameter_words(model) == "1.00 M parameters"
    model.bias.requires_grad_(False)
    assert parameter_words(model) == "1.00 M parameters, 1.00 M trained"
    assert label_words(["a", None, "b"]) == "a, b"
    assert label_words([str(i) for i in range(20)], most=2) == "0, 1, ... (20 in all)"
    assert listing([("a", "x"), ("long", "y")]) == "  a     x\n  long  y"
