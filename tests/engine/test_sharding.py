"""Parameters shared out among processes: the same training as with whole ones, and files that do not show it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detfamily.build import build_detector
from detfamily.config import compose
from detfamily.engine.checkpoint import load
from detfamily.engine.sharding import repeated_layers, share_like, whole, whole_state
from detfamily.engine.train import train
from detfamily.errors import ConfigError
from detfamily.files import read_json

LENGTH = ("encoder.num_layers=2", "optimizer.clip_norm=0.1", "schedule.epochs=1", "evaluation.batch_size=1")


def spread(tiny: list[str], folder: Path, *more: str) -> dict[str, Any]:
    """Train in two processes; returns the checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "detfamily"]
    words = ["train", *tiny, *LENGTH, *more, f"output_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return load(folder / "last.pt")


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights and moments, within the rounding of some steps, against the largest number of each."""
    assert one["model"].keys() == other["model"].keys() and one["optimizer"].keys() == other["optimizer"].keys()
    for name, tensor in one["model"].items():
        close(tensor, other["model"][name], name)
    for name, moments in one["optimizer"].items():
        for key, tensor in moments.items():
            close(tensor, other["optimizer"][name][key], f"{key} of {name}")


def close(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    assert type(one) is type(other) is torch.Tensor and one.shape == other.shape, name
    # some gradients are nothing but rounding (of a bias before a norm), and so is what they move
    torch.testing.assert_close(one, other, rtol=0, atol=max(1e-5, 1e-3 * float(one.abs().max())), msg=name)


@pytest.mark.slow
def test_training_is_that_of_whole_parameters(tiny: list[str], tmp_path: Path) -> None:
    """Two micro-batches a step; then a second epoch from the checkpoint, with what the other run left, and alone."""
    split = ("runtime.batch_size_per_device=1", "optimizer.lr=1e-4")
    kept = spread(tiny, tmp_path / "none", *split)
    shared = spread(tiny, tmp_path / "full", *split, "runtime.sharding=full")
    assert_alike(kept, shared)
    numbers = [read_json(tmp_path / name / "metrics.json") for name in ("none", "full")]
    assert numbers[0].keys() == numbers[1].keys()
    for key in ("AP", "AP50"):
        assert numbers[0][key] == pytest.approx(numbers[1][key], abs=1e-3)
    again = ("schedule.epochs=2", "resume=auto")
    assert_alike(
        spread(tiny, tmp_path / "none", *split, *again),
        spread(tiny, tmp_path / "full", *split, *again, "runtime.sharding=full"),
    )
    alone = ["schedule.epochs=3", f"resume={tmp_path / 'full' / 'last.pt'}", f"output_dir={tmp_path / 'alone'}"]
    train(compose("train", [*tiny, *LENGTH, *split, *alone]))
    assert load(tmp_path / "alone" / "last.pt")["epoch"] == 3


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("runtime.sharding=full", "needs several processes"),
        ("runtime.sharding=half", "'half' given, expected 'none' or 'full'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tiny: list[str], tmp_path: Path, setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(compose("train", [*tiny, setting, f"output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backbone", ["resnet50", "swin_t", "datpp_t"])
def test_layers_are_fetched_one_at_a_time(backbone: str) -> None:
    """Blocks of the backbone and layers of the transformer: most of the parameters, each in one of them only."""
    with torch.device("meta"):
        words = ["family=dino", f"backbone={backbone}", "data.root=."]
        net = build_detector(compose("train", words), 80, pretrained=False)
    layers = list(repeated_layers(net))
    inside = [id(one) for layer in layers for one in layer.parameters()]
    assert len(inside) == len(set(inside)), "a parameter that belongs to two layers"
    share = sum(one.numel() for layer in layers for one in layer.parameters())
    assert share > 0.6 * sum(one.numel() for one in net.parameters())
    assert max(sum(one.numel() for one in layer.parameters()) for layer in layers) < 0.25 * share


def test_without_sharing_tensors_are_whole() -> None:
    net = nn.Linear(3, 2)
    assert all(torch.equal(whole_state(net)[key], value) for key, value in net.state_dict().items())
    moment = torch.arange(6.0).view(2, 3)
    given = share_like(moment, net.weight)
    assert torch.equal(given, moment) and given.data_ptr() != moment.data_ptr()
    assert whole(moment) is moment
