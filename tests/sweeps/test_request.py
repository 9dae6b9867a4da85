from __future__ import annotations

from pathlib import Path

import pytest

from detfamily.errors import ConfigError
from detfamily.sweeps.request import Recipe, read_request
from detfamily.sweeps.sweep import read_sweep


def test_words_are_understood(write_sweep):
    file = str(write_sweep())
    asked = read_request([file])
    assert (asked.method, asked.count, asked.jobs) == ("optuna", 20, 1)
    assert asked.folder == Path("runs/sweep/two-settings")
    asked = read_request([file, "method=grid", "trials=3", "jobs=2", "data.root=/data", "output_dir=x"])
    assert (asked.method, asked.count, asked.jobs, asked.folder) == ("grid", 3, 2, Path("x"))
    assert asked.further == ("data.root=/data",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected the file of one sweep, and none is given"),
        (["", "other.yaml"], "2 are given"),
        (["", "method=grit"], "method=grit: did you mean 'grid'"),
        (["", "trials=0"], "trials=0: expected a whole number"),
        (["", "jobs=many"], "jobs=many: expected a whole number"),
        (["", "optimizer.lr=0.1"], "'optimizer.lr=0.1': optimizer.lr is one of the sweep's parameters"),
        (["", "resume=auto"], "each trial has its own"),
        (["", "experiment=detr_r50"], "base: in the sweep's file names the recipe"),
    ],
)
def test_mistakes_end_in_a_message(write_sweep, words, message):
    file = str(write_sweep())
    with pytest.raises(ConfigError, match=message):
        read_request([word or file for word in words])


def test_a_trial_has_the_recipe_the_scale_and_its_values(sweep):
    recipe = Recipe(sweep, ("schedule.images_per_epoch=80",))
    found = recipe.variant(7, {"optimizer.lr": 0.03, "decoder": "refine"})
    assert found.overrides == (
        "experiment=deformable_detr_r50",
        "+scale=mini",
        "schedule.epochs=4",
        "schedule.images_per_epoch=80",
        "optimizer.lr=0.03",
        "decoder=refine",
    )
    config = found.config
    assert (config["optimizer"]["lr"], config["schedule"]["epochs"], config["model"]["embed_dim"]) == (0.03, 4, 64)
    assert found.row.label == "trial 7" and found.identity != recipe.base.identity
    recipe.check()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"optimizer.lrr": {"uniform": [0.0, 1.0]}}, "optimizer.lrr = 0.0: .*did you mean 'lr'"),
        ({"decoder": {"choice": ["plain", "refin"]}}, "decoder = refin: .*did you mean 'refine"),
        ({"schedule.epochs": {"uniform": [1.5, 2.5]}}, "schedule.epochs = 1.5: "),
    ],
)
def test_what_does_not_compose_is_named_before_any_work(write_sweep, parameters, message):
    file = write_sweep(parameters=parameters)
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe(read_sweep(file)).check()
    assert str(file) in str(caught.value)


def test_what_makes_trials_comparable_is_the_identity(write_sweep):
    def identity(*further, **changes):
        return Recipe(read_sweep(write_sweep(**changes)), further).identity

    mine = identity()
    assert mine == identity("tracking=wandb", "runtime.threads=1", trials=3, pruner={"warmup_trials": 9})
    assert mine != identity("optimizer.weight_decay=0.5")
    assert mine != identity(metric="AP50") and mine != identity(seed=1)
    assert mine != identity(parameters={"optimizer.lr": {"log_uniform": [0.001, 0.2]}})
