"""The whole command: with a stand-in for the training, and once with the real one."""

from __future__ import annotations

import os
import re
import sys

import pytest
import yaml

from detfamily import cli
from detfamily.config import compose, validate
from detfamily.errors import ConfigError
from detfamily.sweeps import command, wandb_sweep
from detfamily.sweeps.command import go
from detfamily.sweeps.request import read_request

WITHOUT_LOG = {"decoder": {"choice": ["plain", "refine"]}, "optimizer.lr": {"choice": [0.01, 0.02]}}
SMALL = (
    "data.train_size=16",
    "data.val_size=4",
    "data.image_size=64",
    "data.sides=[10,40]",
    "schedule.epochs=1",
    "schedule.images_per_epoch=8",
    "schedule.total_batch_size=4",
    "runtime.num_workers=0",
    "runtime.threads=1",
)


@pytest.fixture
def asked(write_sweep, tmp_path):
    def asked(*words, **changes):
        return read_request([str(write_sweep(**changes)), f"output_dir={tmp_path / 'out'}", *words])

    return asked


def test_a_grid_is_gone_through_once(asked, launch, tmp_path, capsys):
    assert go(asked("method=grid", parameters=WITHOUT_LOG), launch) == 0
    said = capsys.readouterr().out
    assert "method grid, 0 trials of 4 are done" in said and "best        trial 1, AP 8.0" in said
    text = (tmp_path / "out/trials.md").read_text()
    assert "| 3 | refine | 0.02 | 8.0 | finished | 4 |" in text and (tmp_path / "out/trials.png").is_file()
    assert go(asked("method=grid", parameters=WITHOUT_LOG), launch) == 0
    said = capsys.readouterr().out
    assert "4 trials of 4 are done" in said and "starts" not in said


def test_optuna_goes_on_until_there_are_enough(asked, launch, tmp_path, capsys, monkeypatch):
    pytest.importorskip("optuna")
    assert go(asked("trials=2"), launch) == 0
    assert (tmp_path / "out/study.db").is_file()
    monkeypatch.setenv("STAND_IN", "fail")
    capsys.readouterr()
    assert go(asked("trials=3"), launch) == 1
    said = capsys.readouterr().out
    assert "FAILED: trial 2: exit status 3; ValueError: the planted fault" in said
    monkeypatch.delenv("STAND_IN")
    assert go(asked("trials=3"), launch) == 0
    text = (tmp_path / "out/trials.md").read_text()
    assert [len(re.findall(rf"\| {state}", text)) for state in ("finished", "failed")] == [3, 3]


def test_a_folder_holds_one_sweep_and_one_call(asked, launch, tmp_path):
    go(asked("method=grid", "trials=1", parameters=WITHOUT_LOG), launch)
    with pytest.raises(ConfigError, match="holds a sweep with method=grid"):
        go(asked("method=wandb", parameters=WITHOUT_LOG, wandb_method="grid"), launch)
    with pytest.raises(ConfigError, match="other settings, ranges or metric"):
        go(asked("method=grid", "model.dropout=0.5", parameters=WITHOUT_LOG), launch)
    pytest.importorskip("fcntl")
    request = asked("method=grid", parameters=WITHOUT_LOG)
    recipe = command.Recipe(request.sweep)
    with command.hold(request, recipe), pytest.raises(ConfigError, match="another call is at the sweep"):
        go(request, launch)


def test_wandb_without_a_network_runs_the_trials_and_leaves_its_file(asked, launch, tmp_path, capsys, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert go(asked("method=wandb", "trials=2", "tracking.wandb.project=shapes"), launch) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert f"wandb sweep --project shapes {out / 'sweep.yaml'}" in said
    assert "wandb agent --count 2 ENTITY/shapes/SWEEP_ID" in said
    assert f"wandb sync {out}/trials/*/wandb/offline-run-*" in said
    words = (out / "trials/0001/log.txt").read_text().splitlines()[0]
    assert "tracking=wandb" in words and "tracking.wandb.mode=offline" in words
    assert "tracking.wandb.group='two_settings' tracking.wandb.tags=['trial 1','seed 0','mini']" in words
    content = yaml.safe_load((out / "sweep.yaml").read_text())
    assert (content["method"], content["metric"]) == ("random", {"name": "AP", "goal": "maximize"})
    assert content["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1},
        "decoder": {"values": ["plain", "refine"]},
    }
    assert not any("mode=offline" in word for word in content["command"])


def test_what_an_agent_makes_of_the_file_is_a_training(asked, launch, tmp_path, monkeypatch):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    monkeypatch.setenv("WANDB_MODE", "offline")
    go(asked("method=wandb", "trials=1"), launch)
    content = yaml.safe_load((tmp_path / "out/sweep.yaml").read_text())
    # as wandb's agent puts a command together
    drawn = {"optimizer.lr": {"value": 0.0123}, "decoder": {"value": "refine"}}
    parts = utils.create_sweep_command_args({"args": drawn}) | {"env": ["/usr/bin/env"]}
    words = []
    for one in utils.create_sweep_command(content["command"]):
        words += parts[one[2:-1]] if one.startswith("${") and one.endswith("}") else [one]
    assert words[: 2 + len(launch)] == ["/usr/bin/env", *launch, "train"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    cfg = compose("train", words[2 + len(launch) :])
    validate(cfg)
    assert (cfg.optimizer.lr, cfg.schedule.epochs, cfg.tracking.wandb.group) == (0.0123, 4, "two_settings")
    assert cfg.output_dir == str(tmp_path / "out/trials/abc123") and cfg.resume == "auto"


AGENT = """
import json, os, sys, yaml
count, path = int(sys.argv[2]), sys.argv[3]
assert path == "me/shapes/s1" and sys.argv[1] == "--count"
folder = os.environ["WANDB_DIR"]
for number in range(count):
    run = f"{os.getpid()}x{number}"
    os.makedirs(f"{folder}/wandb/sweep-s1", exist_ok=True)
    os.makedirs(f"{folder}/trials/{run}", exist_ok=True)
    given = {"optimizer.lr": {"value": 0.01 * (number + 1)}, "decoder": {"value": "plain"}}
    yaml.safe_dump(given, open(f"{folder}/wandb/sweep-s1/config-{run}.yaml", "w"))
    if os.environ.get("STAND_IN") == "fail" and number == 1:
        sys.exit(1)
    row = {"epoch": 1, "AP": given["optimizer.lr"]["value"]}
    open(f"{folder}/trials/{run}/metrics.jsonl", "w").write(json.dumps(row))
    open(f"{folder}/trials/{run}/metrics.json", "w").write("{}")
"""


def test_where_there_is_a_server_agents_run_what_is_lacking(asked, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    script = tmp_path / "agent.py"
    script.write_text(AGENT)
    created = []
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "sweep", lambda *given, **place: created.append((given, place)) or "s1")
    run_agents = wandb_sweep.run_agents
    agent = (sys.executable, str(script))
    monkeypatch.setattr(wandb_sweep, "run_agents", lambda *given: run_agents(*given, agent=agent))
    words = ("method=wandb", "trials=3", "tracking.wandb.project=shapes", "tracking.wandb.entity=me")
    monkeypatch.setenv("STAND_IN", "fail")
    assert go(asked(*words)) == 1
    assert "2 trials have not finished" in capsys.readouterr().out
    monkeypatch.delenv("STAND_IN")
    assert go(asked(*words, "jobs=2")) == 0
    said = capsys.readouterr().out
    assert "me/shapes/s1: 1 trials of 3 are done" in said and "best        trial" in said
    assert len(created) == 1 and created[0][1] == {"project": "shapes", "entity": "me"}
    assert len(list((tmp_path / "out/trials").glob("*/metrics.json"))) == 3


def test_what_wandb_cannot_do_is_said_before_any_work(asked, launch, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ConfigError, match="W&B is disabled: unset WANDB_MODE"):
        go(asked("method=wandb"), launch)
    with pytest.raises(ConfigError, match="needs a tracker of W&B"):
        go(asked("method=wandb", "tracking=files"), launch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match="optimizer.clip_norm: W&B hands null on as None"):
        go(asked("method=wandb", parameters={"optimizer.clip_norm": {"choice": [0.1, None]}}), launch)
    assert not (tmp_path / "out/trials").exists()


def test_multirun_is_a_grid(capsys):
    assert cli.main(["train", "-m", "optimizer.lr=0.1,0.2"]) == 2
    assert "are a sweep, method=grid" in capsys.readouterr().err


def test_the_real_training_is_swept_and_its_values_arrive(write_sweep, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parameters = {"optimizer.lr": {"log_uniform": [1e-5, 1e-4]}}
    file = write_sweep(parameters=parameters, overrides=list(SMALL), metric="loss")
    out = tmp_path / "out"
    words = ["sweep", str(file), "trials=1", f"output_dir={out}", f"data.root={tmp_path / 'shapes'}"]
    assert cli.main(words) == 0
    (row,) = [line for line in (out / "trials.md").read_text().splitlines() if line.startswith("| 0 |")]
    lr, loss = (float(row.split(" | ")[place].strip("*")) for place in (1, 2))
    config = yaml.safe_load((out / "trials/0000/config.yaml").read_text())
    assert config["optimizer"]["lr"] == pytest.approx(lr, rel=1e-3) and 1e-5 <= lr <= 1e-4 and loss > 0
    assert os.path.getsize(out / "trials/0000/last.pt") > 1000
