from __future__ import annotations

from pathlib import Path

import pytest

from detfamily.config import groups_for
from detfamily.errors import ConfigError
from detfamily.experiments.task import CLASSIFICATION
from detfamily.sweeps.distribution import Choice, LogUniform
from detfamily.sweeps.request import read_request
from detfamily.sweeps.sweep import Pruner, read_sweep

HERE = Path(__file__).resolve().parents[2] / "experiments" / "sweeps"


def test_a_file_says_what_is_varied(write_sweep):
    found = read_sweep(write_sweep())
    assert found.parameters == {"optimizer.lr": LogUniform(0.001, 0.1), "decoder": Choice(("plain", "refine"))}
    assert (found.name, found.metric, found.direction, found.trials) == ("two_settings", "AP", "maximize", 20)
    assert found.pruner == Pruner(1, 1) and found.overrides == ("schedule.epochs=4",)
    assert read_sweep(write_sweep(metric="loss")).direction == "minimize"
    assert read_sweep(write_sweep(pruner=None)).pruner == Pruner()
    file = write_sweep(pruner=None)
    file.write_text(file.read_text() + "pruner: null\n")
    assert read_sweep(file).pruner is None


def test_classifiers_are_swept_too(write_sweep):
    names = groups_for("classify")
    file = write_sweep(
        task="classification",
        base=names["experiment"][0],
        scale=names["scale"][0],
        parameters={"optimizer.lr": {"uniform": [0, 1]}},
    )
    found = read_sweep(file)
    assert found.task is CLASSIFICATION and found.metric == "top1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bse": 1}, "unknown key 'bse': did you mean 'base'"),
        ({"base": None}, "base is missing; a sweep needs title, base, scale, parameters"),
        ({"base": "deformable_detr_r5"}, "base: there is no 'deformable_detr_r5': did you mean 'deformable_detr_r50"),
        ({"scale": "minni"}, "scale: there is no 'minni': did you mean 'mini"),
        ({"metric": "APP"}, "metric: there is no 'APP': did you mean 'AP"),
        ({"direction": "up"}, "direction: there is no 'up'"),
        ({"task": "detect"}, "task: there is no 'detect': did you mean 'detection'"),
        ({"trials": 0}, "trials: expected a whole number of at least 1, not 0"),
        ({"seed": "x"}, "seed: expected a whole number"),
        ({"overrides": "a=1"}, "overrides: expected a list"),
        ({"parameters": {}}, "parameters: expected a mapping"),
        ({"parameters": {"optimizer.lr=1": {"int": [1, 2]}}}, "is not the key of an override"),
        ({"parameters": {"tracking": {"choice": ["wandb"]}}}, "tracking cannot be swept"),
        ({"parameters": {"optimizer.lr": {"normal": [1, 2]}}}, "parameters: optimizer.lr: there is no distribution"),
        ({"pruner": 3}, "pruner: expected null or a mapping"),
        ({"pruner": {"warmup": 1}}, "pruner: unknown key 'warmup': did you mean 'warmup_"),
        ({"pruner": {"warmup_trials": -1}}, "pruner.warmup_trials: expected a whole number of at least 0"),
        ({"wandb_method": "bayes"}, "wandb_method: there is no 'bayes'"),
    ],
)
def test_mistakes_name_the_file_and_the_key(write_sweep, changes, message):
    file = write_sweep(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        read_sweep(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_not_there_is_named_with_the_nearest(write_sweep):
    file = write_sweep()
    with pytest.raises(ConfigError, match=f"there is no sweep .*did you mean '{file}'"):
        read_sweep(file.with_name("two_setting.yaml"))
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_sweep(file)
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_sweep(file)


@pytest.mark.parametrize("file", sorted(HERE.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_sweeps_of_the_repository_can_be_read(file):
    method = "grid" if "grid" in file.stem else "optuna"
    assert read_request([str(file), f"method={method}"]).sweep.title
