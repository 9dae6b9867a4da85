"""The published recipes of classifiers: their numbers, parameters, and which parameters decay."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from omegaconf import DictConfig

from detfamily.classification.build import build_classifier
from detfamily.classification.classifier import Classifier
from detfamily.config import build, compose, groups, validate
from detfamily.engine.optim import DEFAULT_GROUP, AdamW, assign
from detfamily.engine.runtime import plan

RECIPES = {
    # name: (epochs, epochs of warm-up, learning rate for 512 images, weight decay, clipping, drop path, parameters, M)
    "swin_t": (300, 20, 5e-4, 0.05, 5.0, 0.2, 28.29),
    "swin_s": (300, 20, 5e-4, 0.05, 5.0, 0.3, 49.61),
    "swin_b": (300, 20, 5e-4, 0.05, 5.0, 0.5, 87.77),
    "dat_t": (300, 20, 5e-4, 0.05, 5.0, 0.2, 28.32),
    "dat_s": (300, 20, 5e-4, 0.05, 5.0, 0.3, 49.70),
    "dat_b": (300, 50, 4e-4, 0.05, 1.0, 0.5, 87.88),
    "dat_b_384": (30, 0, 2e-6, 1e-8, 5.0, 0.5, None),
    "dat_plus": (300, 20, 5e-4, 0.05, 5.0, 0.2, 22.77),
    "datpp_t": (300, 20, 5e-4, 0.05, 5.0, 0.2, 23.96),
    "datpp_s": (300, 20, 5e-4, 0.05, 5.0, 0.4, 53.13),
    "datpp_b": (300, 20, 5e-4, 0.05, 5.0, 0.7, 93.69),
    "datpp_b_384": (30, 0, 2e-5, 1e-8, 5.0, 0.6, 93.69),
}
IMAGENET = 1_281_167


@functools.cache
def composed(name: str) -> DictConfig:
    return compose("classify", [f"experiment={name}", "data.root=."])


@functools.cache
def on_meta(name: str) -> Classifier:
    with torch.device("meta"):
        return build_classifier(composed(name), 1000, pretrained=False)


def test_every_recipe_is_here():
    assert set(RECIPES) == set(groups()["classify/experiment"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_numbers(name):
    epochs, warmup, lr, decay, clip, drop_path, _ = RECIPES[name]
    cfg = composed(name)
    validate(cfg)
    schedule, recipe = build(cfg.schedule), build(cfg.optimizer)
    made = plan(schedule, build(cfg.runtime, device="cpu"), 1, IMAGENET)
    assert cfg.name == name and schedule.epochs == epochs and cfg.backbone.drop_path == drop_path
    assert schedule.warmup_length(made.total_steps) == pytest.approx(warmup * made.steps_per_epoch, abs=1)
    assert (recipe.lr * 512 / schedule.total_batch_size, recipe.weight_decay) == (pytest.approx(lr), decay)
    assert recipe.clip_norm == clip
    size, test_size = cfg.augmentation.size, cfg.augmentation.test_size
    assert test_size == (size if name == "datpp_b_384" else int(256 / 224 * size))
    figures = [one["top1"] for one in cfg.published]
    assert name == "dat_plus" or (figures and all(81 < one < 86 for one in figures))


@pytest.mark.parametrize("name", [name for name, numbers in RECIPES.items() if numbers[-1]])
def test_a_recipe_has_the_published_number_of_parameters(name):
    count = sum(one.numel() for one in on_meta(name).parameters())
    assert round(count / 1e6, 2) == RECIPES[name][-1]


@pytest.mark.parametrize("name", ["swin_t", "dat_t", "datpp_t", "dat_plus"])
def test_what_decays_is_what_officially_decays(name):
    """Not: parameters of one axis, biases, tables of windows and of deformable attention. Officially, those of
    neighborhood attention do.
    """
    groups_of_recipe = assign(on_meta(name), build(composed(name).optimizer).groups)
    assert set(groups_of_recipe) == {DEFAULT_GROUP, "no_decay"}
    for group, parameters in groups_of_recipe.items():
        for full, one in parameters.items():
            table = re.search(r"position_bias", full) is not None
            rpb = table and one.ndim == 3 and full.endswith("attention.position_bias")
            free = one.ndim == 1 or full.endswith(".bias") or (table and not rpb)
            assert (group == "no_decay") == free, full


def test_the_default_groups_take_every_scale_and_bias_of_a_convolutional_network():
    cfg = compose("classify", ["backbone=small", "data=shapes"])
    recipe: AdamW = build(cfg.optimizer)
    free = assign(build_classifier(cfg, 5), recipe.groups)["no_decay"]
    assert free and all(one.ndim == 1 for one in free.values())
    decayed = assign(build_classifier(cfg, 5), recipe.groups)[DEFAULT_GROUP]
    assert all(one.ndim > 1 for one in decayed.values())
