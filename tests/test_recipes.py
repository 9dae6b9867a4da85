"""The published recipes: that they are complete, and that they are what was published."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from detfamily.build import build_detector
from detfamily.checkpoints import adapter_for
from detfamily.config import build, compose, groups, validate
from detfamily.detector import Detector
from detfamily.engine.optim import AdamW, assign
from detfamily.engine.runtime import plan
from detfamily.engine.schedule import Schedule
from detfamily.structures import Images, Predictions

ROOT = Path(__file__).resolve().parents[1]
OWN = ("demo", "overfit", "finetune")
"""Experiments that are ours and reproduce nothing."""
RECIPES = [name for name in groups()["experiment"] if name not in OWN]

COCO_TRAIN = 118287
OFFICIAL_COLUMNS = 91

SETTINGS = {
    # name: (epochs, drop, images a step, images per GPU, learning rate), as published
    "detr_r50_500ep": (500, 400, 64, 2, 1e-4),
    "detr_r50_dc5_500ep": (500, 400, 64, 1, 1e-4),
    "detr_r101_500ep": (500, 400, 64, 2, 1e-4),
    "detr_r101_dc5_500ep": (500, 400, 64, 1, 1e-4),
    "detr_r50_300ep": (300, 200, 64, 2, 1e-4),
    "detr_r50_150ep": (150, 100, 16, 2, 1e-4),
    "detr_r50_50ep": (50, 40, 16, 2, 1e-4),
    "detr_r50_dc5_50ep": (50, 40, 16, 1, 1e-4),
    "detr_r50_dc5_plus_50ep": (50, 40, 16, 1, 1e-4),
    "detr_r101_50ep": (50, 40, 16, 2, 1e-4),
    "detr_r101_dc5_50ep": (50, 40, 16, 1, 1e-4),
    "detr_r50_12ep": (12, 11, 16, 2, 1e-4),
    "deformable_detr_r50": (50, 40, 32, 2, 2e-4),
    "deformable_detr_r50_refine": (50, 40, 32, 2, 2e-4),
    "deformable_detr_r50_two_stage": (50, 40, 32, 2, 2e-4),
    "deformable_detr_r50_single_scale": (50, 40, 32, 2, 2e-4),
    "deformable_detr_r50_single_scale_dc5": (50, 40, 32, 2, 2e-4),
    "deformable_detr_r50_12ep": (12, 11, 32, 2, 2e-4),
    "deformable_detr_r101_two_stage": (50, 40, 32, 2, 2e-4),
    "deformable_detr_x101_two_stage": (50, 40, 32, 2, 2e-4),
    "conditional_detr_r50": (50, 40, 16, 2, 1e-4),
    "conditional_detr_r50_75ep": (75, 60, 16, 2, 1e-4),
    "conditional_detr_r50_108ep": (108, 80, 16, 2, 1e-4),
    "conditional_detr_r50_dc5": (50, 40, 8, 1, 1e-4),
    "conditional_detr_r50_dc5_75ep": (75, 60, 8, 1, 1e-4),
    "conditional_detr_r50_dc5_108ep": (108, 80, 8, 1, 1e-4),
    "conditional_detr_r101": (50, 40, 16, 2, 1e-4),
    "conditional_detr_r101_75ep": (75, 60, 16, 2, 1e-4),
    "conditional_detr_r101_108ep": (108, 80, 16, 2, 1e-4),
    "conditional_detr_r101_dc5": (50, 40, 8, 1, 1e-4),
    "conditional_detr_r101_dc5_75ep": (75, 60, 8, 1, 1e-4),
    "conditional_detr_r101_dc5_108ep": (108, 80, 8, 1, 1e-4),
    "dab_detr_r50": (50, 40, 16, 2, 1e-4),
    "dab_detr_r50_3pat": (50, 40, 16, 1, 1e-4),
    "dab_detr_r50_dc5": (50, 40, 16, 1, 1e-4),
    "dab_detr_r50_dc5_fixed_xy": (50, 40, 16, 1, 1e-4),
    "dab_detr_r50_dc5_3pat": (50, 40, 16, 1, 1e-4),
    "dab_detr_r50_dc5_3pat_12ep": (12, 11, 16, 1, 1e-4),
    "dab_detr_r101": (50, 40, 16, 2, 1e-4),
    "dab_detr_r101_3pat": (50, 40, 16, 1, 1e-4),
    "dab_detr_r101_dc5": (50, 40, 16, 1, 1e-4),
    "dab_detr_r101_dc5_3pat": (50, 40, 16, 1, 1e-4),
    "dab_detr_r101_dc5_3pat_12ep": (12, 11, 16, 1, 1e-4),
    "dab_deformable_detr_r50": (50, 40, 16, 2, 1e-4),
    "dab_deformable_detr_r50_v2": (50, 40, 16, 2, 1e-4),
    "dab_deformable_detr_r50_encoder_only": (50, 40, 16, 1, 1e-4),
    "dn_detr_r50": (50, 40, 16, 2, 1e-4),
    "dn_detr_r50_dc5": (50, 40, 16, 1, 1e-4),
    "dn_detr_r50_dc5_3pat_12ep": (12, 11, 16, 1, 1e-4),
    "dn_detr_r101": (50, 40, 16, 2, 1e-4),
    "dn_detr_r101_dc5": (50, 40, 16, 1, 1e-4),
    "dn_detr_r101_dc5_3pat_12ep": (12, 11, 16, 1, 1e-4),
    "dn_deformable_detr_r50": (50, 40, 16, 2, 1e-4),
    "dn_deformable_detr_r50_24ep": (24, 20, 16, 2, 1e-4),
    "dn_deformable_detr_r50_12ep": (12, 11, 16, 2, 1e-4),
    "dn_deformable_detr_r50_encoder_only": (50, 40, 16, 1, 1e-4),
    "dn_deformable_detr_r50_encoder_only_12ep": (12, 11, 16, 1, 1e-4),
    "dn_deformable_detr_r101_encoder_only_12ep": (12, 11, 16, 1, 1e-4),
    "dino_r50_4scale_12ep": (12, 11, 16, 2, 1e-4),
    "dino_r50_4scale_24ep": (24, 20, 16, 2, 1e-4),
    "dino_r50_4scale_36ep": (36, 30, 16, 2, 1e-4),
    "dino_r50_4scale_noise04_12ep": (12, 11, 16, 2, 1e-4),
    "dino_r50_5scale_12ep": (12, 11, 16, 1, 1e-4),
    "dino_r50_5scale_24ep": (24, 20, 16, 1, 1e-4),
    "dino_r50_5scale_36ep": (36, 30, 16, 1, 1e-4),
    "dino_swin_l_4scale_12ep": (12, 11, 16, 2, 1e-4),
    "dino_swin_l_4scale_36ep": (36, 30, 16, 2, 1e-4),
    "dino_swin_l_5scale_12ep": (12, 11, 16, 1, 1e-4),
    "dino_swin_l_5scale_36ep": (36, 30, 16, 1, 1e-4),
    "h_deformable_detr_r50_12ep": (12, 11, 16, 2, 2e-4),
    "h_deformable_detr_r50_36ep": (36, 30, 16, 2, 2e-4),
    "h_deformable_detr_swin_t_12ep": (12, 11, 16, 2, 2e-4),
    "h_deformable_detr_swin_t_36ep": (36, 30, 16, 2, 2e-4),
    "h_deformable_detr_swin_l_12ep": (12, 11, 16, 2, 2e-4),
    "h_deformable_detr_swin_l_36ep": (36, 30, 16, 2, 2e-4),
    "h_deformable_detr_swin_l_900q_12ep": (12, 11, 16, 2, 2e-4),
    "h_deformable_detr_swin_l_900q_36ep": (36, 30, 16, 2, 2e-4),
    "co_deformable_detr_r50_12ep": (12, 11, 16, 2, 2e-4),
    "co_deformable_detr_swin_t_12ep": (12, 11, 16, 2, 2e-4),
    "co_deformable_detr_swin_t_36ep": (36, 30, 16, 2, 2e-4),
    "co_deformable_detr_swin_s_12ep": (12, 11, 16, 2, 2e-4),
    "co_deformable_detr_swin_s_36ep": (36, 30, 16, 2, 2e-4),
    "co_deformable_detr_swin_b_12ep": (12, 11, 16, 2, 2e-4),
    "co_deformable_detr_swin_b_36ep": (36, 30, 16, 2, 2e-4),
    "co_deformable_detr_swin_l_12ep": (12, 11, 16, 2, 2e-4),
    "co_deformable_detr_swin_l_900q_36ep": (36, 30, 16, 2, 2e-4),
    "co_dino_r50_5scale_12ep": (12, 11, 16, 2, 2e-4),
    "co_dino_r50_5scale_lsj_12ep": (12, 11, 16, 2, 2e-4),
    "co_dino_r50_5scale_lsj_36ep": (36, 30, 16, 2, 2e-4),
    "co_dino_r50_5scale_9enc_lsj_12ep": (12, 11, 16, 2, 2e-4),
    "co_dino_r50_5scale_9enc_lsj_36ep": (36, 30, 16, 2, 2e-4),
    "co_dino_swin_l_5scale_12ep": (12, 11, 16, 1, 2e-4),
    "co_dino_swin_l_5scale_24ep": (24, 20, 16, 1, 2e-4),
    "co_dino_swin_l_5scale_36ep": (36, 30, 16, 1, 2e-4),
    "co_dino_swin_l_5scale_lsj_12ep": (12, 11, 16, 1, 2e-4),
    "co_dino_swin_l_5scale_lsj_24ep": (24, 20, 16, 1, 2e-4),
    "co_dino_swin_l_5scale_lsj_36ep": (36, 30, 16, 1, 2e-4),
    "co_dino_swin_l_5scale_o365_16ep": (16, 8, 16, 1, 1e-4),
}

CO_DROP_PATH = {
    # of Co-DETR's configurations with a Swin, as released
    "co_deformable_detr_swin_t_12ep": 0.2,
    "co_deformable_detr_swin_t_36ep": 0.3,
    "co_deformable_detr_swin_s_12ep": 0.2,
    "co_deformable_detr_swin_s_36ep": 0.4,
    "co_deformable_detr_swin_b_12ep": 0.2,
    "co_deformable_detr_swin_b_36ep": 0.4,
    "co_deformable_detr_swin_l_12ep": 0.3,
    "co_deformable_detr_swin_l_900q_36ep": 0.6,
    "co_dino_swin_l_5scale_12ep": 0.3,
    "co_dino_swin_l_5scale_24ep": 0.5,
    "co_dino_swin_l_5scale_36ep": 0.6,
    "co_dino_swin_l_5scale_lsj_12ep": 0.3,
    "co_dino_swin_l_5scale_lsj_24ep": 0.5,
    "co_dino_swin_l_5scale_lsj_36ep": 0.5,
    "co_dino_swin_l_5scale_o365_16ep": 0.3,
}
CO_SWINS = {
    "swin_t": (96, 6, 7, "swin_tiny_patch4_window7_224"),
    "swin_s": (96, 18, 7, "swin_small_patch4_window7_224"),
    "swin_b": (128, 18, 12, "swin_base_patch4_window12_384_22k"),
    "swin_l": (192, 18, 12, "swin_large_patch4_window12_384_22k"),
}

OFFICIAL = {
    # recipe: the official configuration among the golden checkpoint keys, and its number of trainable parameters
    "detr_r50_500ep": ("detr/detr-r50", 41302368),
    "detr_r50_dc5_500ep": ("detr/detr-r50-dc5", 41302368),
    "detr_r101_500ep": ("detr/detr-r101", 60242272),
    "detr_r101_dc5_500ep": ("detr/detr-r101-dc5", 60242272),
    "deformable_detr_r50": ("deformable_detr/r50_deformable_detr", 39847265),
    "deformable_detr_r50_refine": (
        "deformable_detr/r50_deformable_detr_plus_iterative_bbox_refinement",
        40627260,
    ),
    "deformable_detr_r50_two_stage": (
        "deformable_detr/r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage",
        40959129,
    ),
    "deformable_detr_r50_single_scale": ("deformable_detr/r50_deformable_detr_single_scale", 33844193),
    "deformable_detr_r50_single_scale_dc5": ("deformable_detr/r50_deformable_detr_single_scale_dc5", 33844193),
    "dab_detr_r50": ("dab_detr/dab_detr_r50", 43449117),
    "dab_detr_r50_3pat": ("dab_detr/dab_detr_r50_3pat", 43449885),
    "dab_detr_r50_dc5": ("dab_detr/dab_detr_r50_dc5", 43449117),
    "dab_deformable_detr_r50_v2": ("dab_detr/dab_deformable_detr_r50", 47183594),
    "dn_detr_r50": ("dn_dab_detr/base", 43472577),
    "dino_r50_4scale_12ep": ("dino/4scale_r50", 46670782),
    "dino_r50_5scale_12ep": ("dino/5scale_r50", 47033406),
    "dino_swin_l_4scale_12ep": ("dino/4scale_swin_L_384_22k", 217230066),
    "co_dino_r50_5scale_12ep": ("co_detr/co_dino_5scale_r50", 64928485),
    "co_dino_swin_l_5scale_12ep": ("co_detr/co_dino_5scale_swin_large", 235471769),
    "co_deformable_detr_r50_12ep": ("co_detr/co_deformable_detr_r50", 64854374),
}
CO = [name for name in OFFICIAL if name.startswith("co_d")]

OFFICIAL_COUNTS = {name: count for name, (_, count) in OFFICIAL.items()} | {
    # of the official models that no list of keys is there for: what their code builds
    "conditional_detr_r50": 43196001,
    "conditional_detr_r101": 62135905,
    "dab_detr_r101": 62389021,
    "dab_deformable_detr_r50": 47183594,
    "dn_detr_r50_dc5_3pat_12ep": 43473345,
    "dn_detr_r101": 62412481,
    "dn_deformable_detr_r50": 47206754,
    "dn_deformable_detr_r50_encoder_only": 48266189,
    "dn_deformable_detr_r101_encoder_only_12ep": 67206093,
    "h_deformable_detr_r50_12ep": 47723673,
    "h_deformable_detr_swin_t_12ep": 48489107,
    "h_deformable_detr_swin_l_12ep": 218079917,
}

OTHER_COUNTS = {
    # (recipe, source) whose published number of parameters is not that of the model; docs/recipes.md says why
    ("deformable_detr_r50_refine", "arXiv 2010.04159, table 1"),
    ("deformable_detr_r50_two_stage", "arXiv 2010.04159, table 1"),
}


def official_columns(name: str) -> int:
    """Of the class head: Co-DETR counts categories, the others have a column for each category id."""
    return 80 if name.startswith("co_d") else OFFICIAL_COLUMNS


FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@functools.cache
def composed(name: str) -> DictConfig:
    return compose("train", [f"experiment={name}", "data.root=."])


BUILT: dict[str, Detector] = {}
"""Recipes that differ in their schedules alone share a detector."""


@functools.cache
def full_size(name: str) -> Detector:
    """The detector of the recipe with the official columns, without memory for its parameters."""
    cfg = composed(name)
    model = OmegaConf.to_yaml(cfg.detector, resolve=True)
    if model not in BUILT:
        with torch.device("meta"):
            BUILT[model] = build_detector(cfg, official_columns(name), pretrained=False).eval()
    return BUILT[model]


@functools.cache
def said(detector: Detector) -> dict[str, Predictions]:
    """What it says of two images of different size; shapes only."""
    sizes = ((256, 320), (192, 320))
    with torch.device("meta"), torch.no_grad():
        pixels, mask = torch.zeros(2, 3, 256, 320, dtype=torch.uint8), torch.zeros(2, 256, 320, dtype=torch.bool)
        predictions: dict[str, Predictions] = detector(Images(pixels, mask, sizes, sizes, (1, 2)))
    return predictions


def trainable(detector: Detector) -> int:
    return sum(one.numel() for one in detector.parameters() if one.requires_grad)


def family(name: str) -> str:
    """The family that a recipe is named after; with deformable attention in the encoder alone, it is DAB-DETR's."""
    prefix = re.split(r"_[rx]\d|_swin", name)[0]
    return prefix.replace("_deformable", "") if "encoder_only" in name else prefix


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_experiment_composes_and_is_valid(name):
    cfg = composed(name)
    validate(cfg)
    assert cfg.name == name


@pytest.mark.parametrize("name", RECIPES)
def test_published_figures_are_named_with_their_source(name):
    own = yaml.safe_load((ROOT / "configs/experiment" / f"{name}.yaml").read_text())["published"]
    assert composed(name).published == own, "each recipe states its own figures instead of inheriting others"
    assert own
    for entry in own:
        assert set(entry) <= {"split", *FIGURES, "params_m", "gflops", "source", "note"}
        assert entry["split"] in ("val2017", "test-dev")
        assert re.match(r"arXiv \d{4}\.\d{5}, table \d+$|README of [\w-]+/[\w-]+$", entry["source"])
        assert 10 < entry["AP"] < entry.get("AP50", 100) < 101
        if "AP75" in entry:
            assert entry["AP75"] < entry["AP50"]
        if "APs" in entry:
            assert entry["APs"] < entry["APm"] < entry["APl"]
    assert len({(entry["split"], entry["source"]) for entry in own}) == len(own)


def test_every_recipe_has_its_settings_here():
    assert set(SETTINGS) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_schedule_is_the_published_one(name):
    cfg = composed(name)
    epochs, drop, images_a_step, per_gpu, lr = SETTINGS[name]
    in_name = re.search(r"_(\d+)ep$", name)
    assert epochs == (int(in_name[1]) if in_name else 50)
    assert cfg.optimizer.lr == lr
    schedule: Schedule = build(cfg.schedule)
    gpus = images_a_step // per_gpu
    made = plan(schedule, build(cfg.runtime), gpus, COCO_TRAIN)
    assert (made.batch_size_per_device, made.accumulation) == (per_gpu, 1)
    assert made.total_steps == epochs * (COCO_TRAIN // images_a_step)
    at_drop = drop * made.steps_per_epoch
    factors = [
        schedule.factor(step, made.steps_per_epoch, made.total_steps)
        for step in (0, at_drop - 1, at_drop, made.total_steps - 1)
    ]
    assert factors == pytest.approx([1, 1, 0.1, 0.1])


def official_backbone(name: str) -> dict[str, object]:
    """What a recipe's backbone is, as far as its name and the official code say."""
    resnet = re.search(r"_(r\d+|x\d+)", name)
    if resnet:
        names = {"r50": "resnet50", "r101": "resnet101", "x101": "resnext101_64x4d"}
        dilation = "_dc5" in name
        return {"name": names[resnet[1]], "weights": "imagenet", "frozen_stages": 2, "dilation": dilation}
    nothing = {"frozen_stages": 0, "dilation": False}
    if name.startswith("co_d"):
        width, depth, window, weights = next(one for key, one in CO_SWINS.items() if key in name)
        files = {"weights": weights, "window_size": window, "embed_dim": width, "depths": [2, 2, depth, 2]}
        return {**nothing, **files, "drop_path": CO_DROP_PATH[name], "gradient_checkpointing": "o365" in name}
    if "swin_t" in name:
        files = {"weights": "swin_tiny_patch4_window7_224", "window_size": 7}
        return {**nothing, **files, "embed_dim": 96, "drop_path": 0.2, "gradient_checkpointing": False}
    files = {"weights": "swin_large_patch4_window7_224_22k", "window_size": 7}
    if name.startswith("dino"):
        files = {"weights": "swin_large_patch4_window12_384_22k", "window_size": 12}
    drop_path = 0.5 if name.startswith("h_") and name.endswith("36ep") else 0.2
    return {**nothing, **files, "embed_dim": 192, "drop_path": drop_path, "gradient_checkpointing": True}


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_is_what_the_name_says(name):
    cfg = composed(name)
    assert cfg.family_name == family(name)
    assert official_backbone(name).items() <= cfg.backbone.items()
    assert cfg.data._target_.endswith("CocoData")
    augmentation = "detr_large" if "o365" in name else "detr"
    if "lsj" in name:
        augmentation = "lsj_1280" if "swin" in name else "lsj"
    assert (
        cfg.augmentation == compose("train", [f"augmentation={augmentation}", "data=coco", "data.root=."]).augmentation
    )
    assert cfg.encoder.num_layers == (9 if "9enc" in name else 6)
    single = ("deformable" not in name and "dino" not in name) or "single_scale" in name
    levels = ([5], 1) if single else ([2, 3, 4, 5], 5) if "5scale" in name else ([3, 4, 5], 4)
    assert (list(cfg.model.stages), cfg.model.num_levels) == levels
    anchors, late = name.startswith(("dab_", "dn_")), name.startswith(("dino", "h_", "co_d"))
    assert cfg.decoder.refine == ("refine" in name or "two_stage" in name or anchors or late)
    assert cfg.decoder.look_forward == (late or (anchors and ("deformable" not in name or "encoder_only" in name)))
    assert cfg.query_source._target_.endswith("ProposalQueries") == ("two_stage" in name or late)
    assert cfg.model.num_patterns == (3 if "3pat" in name or "encoder_only" in name else 0)
    assert cfg.one_to_many.num_queries == (1500 if name.startswith("h_") else 0)
    own_head = cfg.cross_attention._target_.endswith(("ConditionalAttention", "LevelConditionalAttention"))
    assert own_head == (name.startswith("conditional") or (anchors and cfg.decoder.look_forward))


@pytest.mark.parametrize("name", RECIPES)
def test_denoising_is_the_published_one(name):
    denoising = composed(name).denoising
    assert (denoising is not None) == name.startswith(("dn_", "dino", "co_dino"))
    if name.startswith("dn_"):
        assert (denoising.label_noise, denoising.center_noise, denoising.size_noise) == (0.2, 0.4, 0.4)
        assert denoising.num_groups == (10 if "encoder_only" in name else 5)
    elif name.startswith(("dino", "co_dino")):
        few = "noise04" in name or "o365" in name
        assert (denoising.label_noise, denoising.corner_noise) == (0.25, 0.4 if few else 1.0)
        copies = 1000 if "o365" in name else 200
        assert (denoising.num_queries, denoising.num_groups, denoising.contrastive) == (copies, None, True)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("dino", "h_", "co_d"))])
def test_proposals_are_the_published_ones(name):
    """DINO answers for classes where tokens become queries, H-DETR for "object" at all tokens; both learn content."""
    cfg = composed(name)
    source, dino = cfg.query_source, name.startswith(("dino", "co_dino"))
    assert source.content == "learned" and not source.learn_size
    assert (source.class_agnostic, source.answer_all) == ((False, False) if dino else (True, True))
    assert cfg.criterion.groups.proposals.class_agnostic == source.class_agnostic
    assert cfg.heads.shared == name.startswith("dino") and source.class_head is not None and source.box_head is not None
    repeats = 6 if name.startswith("h_") else 1
    assert (cfg.criterion.groups.one_to_many.repeats, cfg.one_to_many.weight) == (repeats, 1.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("co_d")])
def test_auxiliary_heads_are_the_published_ones(name):
    """Both of Co-DETR's models have Faster R-CNN and ATSS; with positions, queries have what the heads read, too."""
    cfg, dino = composed(name), "dino" in name
    faster_rcnn, atss = cfg.auxiliary
    assert faster_rcnn._target_.endswith("FasterRCNN") and atss._target_.endswith("ATSS")
    assert cfg.model.anchor_scale == 1 and faster_rcnn.roi.finest_scale == (56 if dino else 112)
    assert (faster_rcnn.roi.sampler.count, faster_rcnn.roi.hidden_dim) == (512, 1024)
    assert (atss.depth, cfg.collaboration.most, cfg.collaboration.positive_queries) == (1, 300, True)
    assert cfg.collaboration.features != dino
    assert cfg.collaboration.head_code == ("scalar" if name == "co_deformable_detr_r50_12ep" else "vector")
    losses = {**faster_rcnn.weights, **{f"atss/{key}": value for key, value in atss.weights.items()}}
    ones = dict.fromkeys(["rpn/class", "rpn/l1", "roi/class", "atss/class", "atss/centerness"], 1)
    assert losses == {**ones, "roi/giou": 10, "atss/giou": 2}
    select, most, soft = (cfg.postprocess.get(key) for key in ("num_select", "max_detections", "soft_nms_iou"))
    assert (select, most, soft) == ((900, 300, 0.8) if dino else (300 if "900q" in name else 100, None, None))


@pytest.mark.parametrize("name", RECIPES)
def test_losses_have_the_published_weights(name):
    weights = {"l1": 5, "giou": 2}
    softmax = name.startswith("detr") and "plus" not in name
    ones = name.startswith(("dab_", "dn_", "dino", "co_dino")) and name != "dab_deformable_detr_r50"
    cfg = composed(name)
    assert cfg.criterion.weights == {"class": 1 if softmax or ones else 2, **weights}
    assert cfg.criterion.matcher.weights == {"class": 1 if softmax else 2, **weights}
    collaborative = cfg.criterion.groups.auxiliary
    assert (collaborative.lambda_1, collaborative.lambda_2, collaborative.num_layers) == (1, 2, 6)
    rules = [rule for key, rule in cfg.criterion.groups.items() if key != "auxiliary"]
    assert cfg.criterion.aux_loss and all(rule.weight == 1 for rule in rules)
    quality = cfg.classification.loss._target_.endswith("QualityFocalClassLoss")
    assert quality == name.startswith("co_dino") and cfg.classification.loss.get("beta", 2) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_the_full_size_model_runs(name):
    predictions = said(full_size(name))
    queries = 100 if name.startswith("detr") and "plus" not in name else 300
    queries *= 3 if "3pat" in name or "encoder_only" in name or "dino" in name or "900q" in name else 1
    columns = official_columns(name) + (name.startswith("detr") and "plus" not in name)
    assert predictions["match"].logits.shape == (6, 2, queries, columns)
    assert predictions["match"].boxes.shape == (6, 2, queries, 4)
    assert ("proposals" in predictions) == ("two_stage" in name or name.startswith(("dino", "h_", "co_d")))


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_follow_the_official_rule_on_official_names(name):
    assert_official_rates(name, full_size(name), build(composed(name).optimizer))


def test_fixed_centers_are_not_trained_and_all_else_is():
    fixed, learned = full_size("dab_detr_r50_dc5_fixed_xy"), full_size("dab_detr_r50_dc5")
    centers = "query_source.reference.center_logit"
    assert {name for name, _ in learned.named_parameters()} - {name for name, _ in fixed.named_parameters()} == {
        centers
    }
    assert fixed.state_dict().keys() == learned.state_dict().keys()


@pytest.mark.parametrize(
    "family", ["detr", "deformable_detr", "conditional_detr", "dab_detr", "dab_deformable_detr", "dn_detr", "dino"]
)
def test_learned_positions_have_the_rate_of_the_backbone_but_in_deformable_detr(family):
    small = [f"family={family}", "position=learned", "model.embed_dim=32", "encoder.num_layers=1"]
    cfg = compose("train", [*small, "decoder.num_layers=1", "backbone=small"])
    detector = build_detector(cfg, 3)
    recipe: AdamW = build(cfg.optimizer)
    members = assign(detector, recipe.groups)
    group = "default" if family == "deformable_detr" else "backbone"
    assert {"position.row_embed.weight", "position.col_embed.weight"} <= set(members[group])


def rates_of(name: str, detector: Detector, recipe: AdamW) -> dict[str, Tensor]:
    """The learning rates, -1 where nothing is trained, under official names; of the encoder-only models, under ours."""
    rates = {parameter: torch.tensor(-1.0) for parameter, _ in detector.named_parameters()}
    for group, members in assign(detector, recipe.groups).items():
        rates |= {member: torch.tensor(recipe.settings_of(group)[0]) for member in members}
    shaped = {parameter: rates[parameter].reshape([1] * one.ndim) for parameter, one in detector.named_parameters()}
    if "fixed_xy" in name:  # one official tensor, of which a half is trained here
        shaped["query_source.reference.center_logit"] = shaped["query_source.reference.size_logit"]
    if "encoder_only" in name:
        return {parameter.replace("backbone.", "backbone.0."): rate for parameter, rate in shaped.items()}
    official: dict[str, Tensor] = adapter_for(composed(name).family_name, detector).to_official(shaped)
    return official


def assert_official_rates(recipe_name: str, detector: Detector, recipe: AdamW) -> None:
    """Compare with the rule as the official code states it, on the names that it is stated for."""
    official = rates_of(recipe_name, detector, recipe)
    frozen = {name for name, rate in official.items() if (rate == -1).all()}
    stem = "backbone." if recipe_name.startswith("co_d") else "backbone.0.body."
    assert frozen == {name for name in official if name.startswith((stem + "conv1", stem + "layer1"))}
    for name in set(official) - frozen:
        expected = 1e-5 if "backbone" in name else 1e-4
        if composed(recipe_name).family_name == "co_dino":
            expected *= 1 if "o365" in recipe_name else 2
        if composed(recipe_name).family_name in ("deformable_detr", "h_deformable_detr", "co_deformable_detr"):
            slow = "backbone." in name or "reference_points" in name or "sampling_offsets" in name
            expected = 2e-5 if slow else 2e-4
        assert torch.allclose(official[name], torch.tensor(expected), rtol=1e-5), name
    decay = 0.05 if recipe_name.startswith("co_deformable_detr_swin") else 1e-4
    assert recipe.weight_decay == decay and recipe.clip_norm == 0.1 and recipe.ema_decay is None
    assert all(recipe.settings_of(group)[1] == decay for group in recipe.groups)


@pytest.mark.parametrize("name", OFFICIAL_COUNTS)
def test_the_number_of_trainable_parameters_is_the_official_one(name):
    detector = full_size(name)
    book = detector.denoising is not None and name.startswith("co_d")  # it has a row more than the official one
    assert trainable(detector) - 256 * book == OFFICIAL_COUNTS[name]


@pytest.mark.parametrize("name", CO)
def test_the_number_of_trainable_parameters_is_that_of_the_official_tensors(goldens, name):
    untrained = re.compile(
        r"running_|num_batches_tracked|relative_position_index|backbone\.(conv1|layer1)|"
        r"backbone\..*(bn\d|downsample\.1)\."
    )
    keys = official(goldens, name)["keys"]
    swin = "swin" in name
    kept = [shape for key, shape in keys if not untrained.search(key) or (swin and "relative" not in key)]
    assert sum(math.prod(shape) for shape in kept) == OFFICIAL_COUNTS[name]


def printed_count(name: str, decimals: int | None) -> float:
    """Parameters in millions, as the papers print them; they do not count alike (docs/recipes.md)."""
    detector = full_size(name)
    if name.startswith("conditional"):
        return math.ceil(trainable(detector) / 1e6)
    with_frozen = name.startswith(("dab_", "dn_"))
    count = sum(one.numel() for one in detector.parameters()) if with_frozen else trainable(detector)
    return round(count / 1e6, decimals)


@pytest.mark.parametrize("name", RECIPES)
def test_the_number_of_parameters_is_the_published_one(name):
    for entry in composed(name).published:
        if "params_m" in entry:
            count = printed_count(name, 1 if isinstance(entry.params_m, float) else None)
            assert (count == entry.params_m) != ((name, entry.source) in OTHER_COUNTS), (count, entry)


def official(goldens: Path, name: str) -> dict:
    """The official arguments ("args"), and names, shapes and whatever follows of all tensors ("keys")."""
    folder, _, variant = OFFICIAL[name][0].partition("/")
    lists, initial = goldens / folder / "checkpoint_keys.json", goldens / folder / variant / "official_r50_init.json"
    if lists.is_file():
        content: dict = json.loads(lists.read_text())
        if folder == "co_detr":
            return {"keys": [(key, one["shape"]) for key, one in content["models"][variant]["keys"].items()]}
        found: dict = content["variants"][variant]
        return found
    if not initial.is_file():
        pytest.skip("no list of official checkpoint keys beside the golden cases")
    found = json.loads(initial.read_text())
    return {"args": found["args"], "keys": [(key, one["shape"]) for key, one in found["tensors"].items()]}


def official_dino(cfg: DictConfig) -> dict[str, object]:
    """DINO's further arguments. Nothing reads ``lr_linear_proj_mult``; scripts replace ``dn_box_noise_scale``."""
    source, denoising = cfg.query_source, cfg.denoising
    return {
        "epochs": cfg.schedule.epochs,
        "lr_drop": cfg.schedule.drop_epochs[0],
        "batch_size": cfg.runtime.batch_size_per_device,
        "param_dict_type": "ddetr_in_mmdet" if cfg.optimizer.groups.sampling else "default",
        "use_ema": cfg.optimizer.ema_decay is not None,
        "use_checkpoint": cfg.backbone.get("gradient_checkpointing", False),
        "return_interm_indices": str([stage - 2 for stage in cfg.model.stages]),
        "num_feature_levels": cfg.model.num_levels,
        "pe_temperatureH": cfg.position.temperature,
        "pe_temperatureW": cfg.position.temperature_x or cfg.position.temperature,
        "transformer_activation": cfg.ffn.activation._target_.removeprefix("torch.nn.").lower(),
        "pre_norm": cfg.residual.sublayer._target_.endswith("PreNorm"),
        "num_patterns": cfg.model.num_patterns,
        "enc_n_points": cfg.encoder_attention.num_points,
        "dec_n_points": cfg.cross_attention.num_points,
        "two_stage_type": "standard" if source._target_.endswith("ProposalQueries") else "no",
        "two_stage_bbox_embed_share": source.box_head is None,
        "two_stage_class_embed_share": source.class_head is None,
        "two_stage_learn_wh": source.learn_size,
        "embed_init_tgt": source.content == "learned",
        "dec_pred_class_embed_share": cfg.heads.shared,
        "dec_pred_bbox_embed_share": cfg.heads.shared,
        "num_select": cfg.postprocess.num_select,
        "nms_iou_threshold": -1 if cfg.postprocess.nms_iou is None else cfg.postprocess.nms_iou,
        "cls_loss_coef": cfg.criterion.weights["class"],
        "interm_loss_coef": cfg.criterion.groups.proposals.weight,
        "focal_alpha": cfg.classification.loss.alpha,
        "use_dn": denoising is not None,
        "dn_number": denoising.num_queries / 2,
        "dn_label_noise_ratio": 2 * denoising.label_noise,
    }


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name not in CO])
def test_settings_are_those_of_the_official_arguments(goldens, name):
    cfg, args = composed(name), official(goldens, name)["args"]
    ours = {
        "lr": cfg.optimizer.lr,
        "lr_backbone": cfg.optimizer.lr * cfg.optimizer.groups.backbone.lr_factor,
        "weight_decay": cfg.optimizer.weight_decay,
        "clip_max_norm": cfg.optimizer.clip_norm,
        "backbone": cfg.backbone.get("name", "swin_L_384_22k"),
        "dilation": cfg.backbone.dilation,
        "position_embedding": "sine" if cfg.position._target_.endswith("SinePosition") else "learned",
        "enc_layers": cfg.encoder.num_layers,
        "dec_layers": cfg.decoder.num_layers,
        "dim_feedforward": cfg.model.ffn_dim,
        "hidden_dim": cfg.model.embed_dim,
        "dropout": cfg.model.dropout,
        "nheads": cfg.model.num_heads,
        "num_queries": cfg.model.num_queries,
        "aux_loss": cfg.criterion.aux_loss,
        "set_cost_class": cfg.criterion.matcher.weights["class"],
        "set_cost_bbox": cfg.criterion.matcher.weights.l1,
        "set_cost_giou": cfg.criterion.matcher.weights.giou,
        "bbox_loss_coef": cfg.criterion.weights.l1,
        "giou_loss_coef": cfg.criterion.weights.giou,
    }
    if cfg.family_name == "detr":
        ours |= {
            "pre_norm": cfg.residual.sublayer._target_.endswith("PreNorm"),
            "eos_coef": cfg.classification.loss.no_object_weight,
        }
    elif name.startswith("dino"):
        ours |= official_dino(cfg)
    elif name.startswith(("dab_", "dn_")):
        ours |= {
            "pre_norm": cfg.residual.sublayer._target_.endswith("PreNorm"),
            "transformer_activation": cfg.ffn.activation._target_.removeprefix("torch.nn.").lower(),
            "num_patterns": cfg.model.num_patterns,
            "random_refpoints_xy": cfg.query_source.reference.random_centers,
            "cls_loss_coef": cfg.criterion.weights["class"],
            "focal_alpha": cfg.classification.loss.alpha,
            "two_stage": cfg.query_source._target_.endswith("ProposalQueries"),
        }
        if "deformable" in name:  # elsewhere nothing reads the first three, and here nothing reads the last ones
            ours |= {
                "num_feature_levels": cfg.model.num_levels,
                "enc_n_points": cfg.encoder_attention.num_points,
                "dec_n_points": cfg.cross_attention.num_points,
            }
        else:
            ours |= {
                "pe_temperatureH": cfg.position.temperature,
                "pe_temperatureW": cfg.position.temperature_x or cfg.position.temperature,
                "num_select": cfg.postprocess.num_select,
            }
    else:
        ours |= {
            "epochs": cfg.schedule.epochs,
            "lr_drop": cfg.schedule.drop_epochs[0],
            "batch_size": cfg.runtime.batch_size_per_device,
            "lr_linear_proj_mult": cfg.optimizer.groups.sampling.lr_factor,
            "num_feature_levels": cfg.model.num_levels,
            "enc_n_points": cfg.encoder_attention.num_points,
            "dec_n_points": cfg.cross_attention.num_points,
            "with_box_refine": cfg.decoder.refine,
            "two_stage": cfg.query_source._target_.endswith("ProposalQueries"),
            "cls_loss_coef": cfg.criterion.weights["class"],
            "focal_alpha": cfg.classification.loss.alpha,
        }
    if name == "dn_detr_r50":  # a list of those arguments that the model is made of
        ours = {key: value for key, value in ours.items() if key in args}
        assert len(ours) == 16
    theirs = {key: str(args[key]) if isinstance(args[key], list) else args[key] for key in ours}
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_tensor_has_an_official_name_and_shape(goldens, name):
    detector = full_size(name)
    ours = adapter_for(composed(name).family_name, detector).to_official(detector.state_dict(), computed=True)
    theirs = {key: tuple(shape) for key, shape, *_ in official(goldens, name)["keys"]}
    theirs = {key: shape for key, shape in theirs.items() if not key.endswith("num_batches_tracked")}
    assert {key: tuple(tensor.shape) for key, tensor in ours.items()} == theirs


# docs/recipes.md holds the same figures, as tables for people


def figures_row(name: str, entry: DictConfig) -> str:
    figures = [f"{entry[key]:.1f}" if key in entry else "-" for key in FIGURES]
    costs = [str(entry.get(key, "-")) for key in ("params_m", "gflops")]
    source = entry.source + (f" ({entry.note})" if "note" in entry else "")
    return "| " + " | ".join([f"`{name}`", entry.split, *figures, *costs, source]) + " |"


def settings_row(name: str) -> str:
    epochs, drop, images_a_step, per_gpu, lr = SETTINGS[name]
    return f"| `{name}` | {epochs} | {drop} | {images_a_step} | {per_gpu} | {lr:g} |"


def test_the_docs_have_all_recipes_as_they_are():
    rows = {line for line in (ROOT / "docs/recipes.md").read_text().splitlines() if re.match(r"\| `\w+` \|", line)}
    expected = {settings_row(name) for name in RECIPES}
    expected |= {figures_row(name, entry) for name in RECIPES for entry in composed(name).published}
    assert rows == expected
