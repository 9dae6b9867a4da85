"""A sweep of our own, and a stand-in for ``detfamily`` whose trials take no time and whose results are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from detfamily.experiments import runner
from detfamily.experiments.scale import Variant
from detfamily.experiments.table import Row
from detfamily.experiments.version import Code
from detfamily.sweeps import conductor
from detfamily.sweeps.distribution import override_words
from detfamily.sweeps.sweep import Sweep, read_sweep
from detfamily.sweeps.trial import TrialRun, key, label

SWEEP = {
    "title": "Two settings",
    "base": "deformable_detr_r50",
    "scale": "mini",
    "overrides": ["schedule.epochs=4"],
    "parameters": {"optimizer.lr": {"log_uniform": [0.001, 0.1]}, "decoder": {"choice": ["plain", "refine"]}},
    "random_trials": 3,
    "pruner": {"warmup_trials": 1, "warmup_epochs": 1},
}

STAND_IN = r"""
import json, os, sys, time
command, *words = sys.argv[1:]
given = dict(word.split("=", 1) for word in words)
folder, lr = given["output_dir"].strip("'"), float(given["optimizer.lr"])
folder = folder.replace("${oc.env:WANDB_RUN_ID}", os.environ.get("WANDB_RUN_ID", ""))
os.makedirs(folder, exist_ok=True)
print("called:", *sys.argv[1:], flush=True)
mode = os.environ.get("STAND_IN", "")
if mode == "fail" or mode == "fail refine" and given["decoder"] == "refine":
    print("ValueError: the planted fault")
    sys.exit(3)
file = f"{folder}/metrics.jsonl"
done = len(open(file).readlines()) if os.path.exists(file) else 0
for epoch in range(done + 1, 5):
    row = {"epoch": epoch, "step": epoch, "images_seen": 100 * epoch, "loss": 5 / epoch}
    if mode != "blind":
        row["AP"] = lr * epoch
    with open(file, "a") as log:
        log.write(json.dumps(row) + "\n")
    if mode == "hang" and epoch == 2 or mode == "hang if bad" and lr < 0.05:
        open(f"{folder}/ready", "w").close()
        time.sleep(300)
json.dump({"AP": row.get("AP", -1)}, open(f"{folder}/metrics.json", "w"))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (conductor, runner):
        monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.delenv("STAND_IN", raising=False)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write_sweep(tmp_path):
    """Write the file of a sweep, with changes of its top level; None takes a key out."""

    def write(**changes) -> Path:
        file = tmp_path / "two_settings.yaml"
        content = {name: value for name, value in {**SWEEP, **changes}.items() if value is not None}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    return write


@pytest.fixture
def sweep(write_sweep) -> Sweep:
    return read_sweep(write_sweep())


@pytest.fixture
def launch(tmp_path) -> list[str]:
    """How the stand-in is called."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return [sys.executable, "-S", str(script)]


@pytest.fixture
def make(tmp_path):
    """The run of a trial, without a config that would have to be composed."""
    config = {"schedule": {"epochs": 4}, "runtime": {"device": "cpu"}, "tracking": {}, "seed": 0}

    def make(proposal) -> TrialRun:
        variant = Variant(Row(label(proposal.number), ()), override_words(proposal.point), config, "identity")
        number = key(proposal.number)
        return TrialRun("two_settings", "mini", variant, 0, Code("one", "commit"), tmp_path / "runs", key=number)

    (tmp_path / "runs").mkdir()
    return make
