from __future__ import annotations

import errno
import os
import pickle
import random
import signal

import pytest
import torch
from torch import nn

import detfamily
from detfamily.engine import checkpoint
from detfamily.errors import CheckpointError

CONFIG = {"seed": 0, "model": {"width": 8, "depths": [1, 2]}, "optimizer": {"lr": 0.1}}


def state(**more):
    model = nn.Linear(2, 3)
    return {
        "config": CONFIG,
        "template": CONFIG,
        "label_map": {"category_ids": [7], "names": ["cat"]},
        "model": model.state_dict(),
        "ema": None,
        **more,
    }


def test_a_checkpoint_comes_back_as_it_was_and_names_its_version(tmp_path):
    saved = state(step=3, rng=[{"python": [3, list(random.getstate()[1]), None]}])
    checkpoint.save(tmp_path / "a.pt", saved)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["version"] == detfamily.__version__
    assert loaded["config"] == CONFIG and loaded["rng"] == saved["rng"] and loaded["step"] == 3
    assert all(torch.equal(loaded["model"][name], value) for name, value in saved["model"].items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_averaged_weights_are_those_to_evaluate(tmp_path):
    averaged = nn.Linear(2, 3).state_dict()
    checkpoint.save(tmp_path / "a.pt", state(ema={"updates": 2, "model": averaged}))
    checkpoint.save(tmp_path / "b.pt", state())
    assert torch.equal(checkpoint.load_model(tmp_path / "a.pt").weights["weight"], averaged["weight"])
    assert checkpoint.load_model(tmp_path / "b.pt").label_map["names"] == ["cat"]


class FullDisk:
    """Takes some bytes, then none."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 100, 1500])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, room):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state(step=1))
    before = path.read_bytes()
    write = checkpoint.write_atomically
    monkeypatch.setattr(
        checkpoint, "write_atomically", lambda path, fill: write(path, lambda file: fill(FullDisk(file, room)))
    )
    with pytest.raises(
        CheckpointError, match="cannot write .*last.pt: No space left on device; last.pt of before is intact"
    ):
        checkpoint.save(path, state(step=2))
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["last.pt"]


class Disturbed:
    """Word of an ended child process comes with every write."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        os.kill(os.getpid(), signal.SIGCHLD)
        return self.file.write(data)


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="there are no signals of children here")
def test_a_reading_process_that_dies_during_a_write_is_said_after_it(tmp_path, monkeypatch):
    def loader_handler(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Disturbed(file)))
    before = signal.signal(signal.SIGCHLD, loader_handler)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            checkpoint.save(tmp_path / "a.pt", state(step=3))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert checkpoint.load(tmp_path / "a.pt")["step"] == 3


def test_a_missing_file_names_those_nearby(tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "best.pt", state())
    with pytest.raises(CheckpointError, match=r"no checkpoint .*bset.pt; did you mean .*best.pt"):
        checkpoint.load(tmp_path / "run" / "bset.pt")
    with pytest.raises(CheckpointError, match=r"no \.pt file"):
        checkpoint.load(tmp_path / "other" / "deep" / "x.pt")


@pytest.mark.parametrize("keep", [0, 20, 700])
def test_a_truncated_file_is_called_broken(tmp_path, keep):
    checkpoint.save(tmp_path / "a.pt", state())
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        checkpoint.load(tmp_path / "a.pt")


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_file_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save(state(extra=Harmful()), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harmful()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_a_foreign_file_is_refused_by_what_it_lacks(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of detfamily: it has no config, template, label_map"):
        checkpoint.load(tmp_path / "a.pt")
    checkpoint.save(tmp_path / "b.pt", state(format=checkpoint.FORMAT + 1))
    with pytest.raises(CheckpointError, match="newer"):
        checkpoint.load(tmp_path / "b.pt")


def test_weights_that_do_not_fit_are_listed_by_name():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    weights = model.state_dict()
    del weights["0.bias"]
    weights["extra"] = torch.zeros(1)
    weights["1.weight"] = torch.zeros(2, 3)
    with pytest.raises(CheckpointError, match="missing: 0.bias; not in this model: extra; of another shape: 1.weight"):
        checkpoint.load_weights(model, weights, "x.pt")


def test_another_model_is_refused_setting_by_setting_and_another_run_is_not():
    other = {"seed": 1, "model": {"width": 16, "depths": [1, 3], "new": None}, "optimizer": {"lr": 0.2}}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_same_model(CONFIG, other, "x.pt")
    text = str(caught.value)
    assert "model.width: 8 in the checkpoint, 16 now" in text
    assert "model.depths: [1, 2] in the checkpoint, [1, 3] now" in text
    assert "model.new: absent in the checkpoint, None now" in text
    assert "lr" not in text and "seed" not in text
    checkpoint.check_same_model(CONFIG, {**CONFIG, "seed": 5, "optimizer": {}}, "x.pt")


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    """Its encoder's attention stood in the layers, and windows had no number of their own."""
    attention = {"_target_": "a.B", "_partial_": True}
    old = {**CONFIG, "encoder": {"num_layers": 2, "layer": {"_target_": "a.C", "attention": attention}}}
    old["model"] = {"embed_dim": 8}
    checkpoint.save(tmp_path / "a.pt", state(config=old, template=old, format=1))
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["config"] == loaded["template"]
    assert loaded["config"]["encoder"] == {"num_layers": 2, "layer": {"_target_": "a.C"}, "attention": attention}
    assert loaded["config"]["model"] == {"embed_dim": 8, "window_size": 7}
