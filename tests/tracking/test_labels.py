from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from detfamily.config import compose
from detfamily.tracking.labels import label_words

ROW = "it's 6 layers, [well]: a=b"


def config(*words):
    return OmegaConf.to_container(compose("train", ["data.root=.", *words]), resolve=True)


def test_runs_at_wandb_are_grouped_and_tagged():
    words = label_words(config("tracking=wandb"), "detr/encoder_depth", (ROW, "seed 0", "mini", "seed 0", "x" * 70))
    found = config("tracking=wandb", *words)["tracking"]["wandb"]
    assert found["group"] == "detr/encoder_depth" and found["tags"] == [ROW, "seed 0", "mini", "x" * 64]


@pytest.mark.parametrize("setting", ["tracking.wandb.group=mine", "tracking.wandb.tags=[mine]"])
def test_what_the_user_says_holds(setting):
    words = label_words(config("tracking=all", setting), "table", ("row",))
    assert len(words) == 1 and not words[0].startswith(setting.partition("=")[0])


def test_runs_elsewhere_get_no_such_words():
    assert label_words(config(), "table", ("row",)) == []
