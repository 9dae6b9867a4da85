"""The published recipes: that they are complete, and that they are what was published."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig

from detfamily.build import build_detector
from detfamily.checkpoints import adapter_for
from detfamily.config import build, compose, groups, validate
from detfamily.detector import Detector
from detfamily.engine.optim import AdamW, assign
from detfamily.engine.runtime import plan
from detfamily.engine.schedule import Schedule
from detfamily.structures import Images

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
}

OTHER_COUNTS = {
    # (recipe, source) whose published number of parameters is not that of the model; docs/recipes.md says why
    ("deformable_detr_r50_refine", "arXiv 2010.04159, table 1"),
    ("deformable_detr_r50_two_stage", "arXiv 2010.04159, table 1"),
}

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@functools.cache
def composed(name: str) -> DictConfig:
    return compose("train", [f"experiment={name}", "data.root=."])


@functools.cache
def full_size(name: str) -> Detector:
    """The detector of the recipe with the official 91 columns, without memory for its parameters."""
    with torch.device("meta"):
        return build_detector(composed(name), OFFICIAL_COLUMNS, pretrained=False).eval()


def trainable(detector: Detector) -> int:
    return sum(one.numel() for one in detector.parameters() if one.requires_grad)


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


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_is_what_the_name_says(name):
    cfg = composed(name)
    backbone = {"r50": "resnet50", "r101": "resnet101", "x101": "resnext101_64x4d"}
    assert cfg.family_name == name.split("_r")[0].split("_x")[0]
    assert cfg.backbone.name == backbone[re.search(r"_([rx]\d+)", name)[1]]
    assert cfg.backbone.weights == "imagenet"
    assert cfg.backbone.dilation == ("_dc5" in name)
    assert cfg.data._target_.endswith("CocoData")
    single = cfg.family_name == "detr" or "single_scale" in name
    assert (list(cfg.model.stages), cfg.model.num_levels) == (([5], 1) if single else ([3, 4, 5], 4))
    assert cfg.decoder.refine == ("refine" in name or "two_stage" in name)
    assert cfg.query_source._target_.endswith("ProposalQueries") == ("two_stage" in name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_full_size_model_runs(name):
    """Shapes only: two images of different size, on the meta device."""
    sizes = ((256, 320), (192, 320))
    with torch.device("meta"), torch.no_grad():
        pixels, mask = torch.zeros(2, 3, 256, 320, dtype=torch.uint8), torch.zeros(2, 256, 320, dtype=torch.bool)
        predictions = full_size(name)(Images(pixels, mask, sizes, sizes, (1, 2)))
    queries = 100 if name.startswith("detr") and "plus" not in name else 300
    columns = OFFICIAL_COLUMNS + (name.startswith("detr") and "plus" not in name)
    assert predictions["match"].logits.shape == (6, 2, queries, columns)
    assert predictions["match"].boxes.shape == (6, 2, queries, 4)
    assert ("proposals" in predictions) == ("two_stage" in name)


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_follow_the_official_rule_on_official_names(name):
    detector, recipe = full_size(name), build(composed(name).optimizer)
    assert_official_rates(detector, recipe, composed(name).family_name)


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_learned_positions_have_the_rate_of_the_backbone_in_detr_only(family):
    small = [f"family={family}", "position=learned", "model.embed_dim=32", "encoder.num_layers=1"]
    cfg = compose("train", [*small, "decoder.num_layers=1", "backbone=small"])
    detector = build_detector(cfg, 3)
    recipe: AdamW = build(cfg.optimizer)
    members = assign(detector, recipe.groups)
    group = "backbone" if family == "detr" else "default"
    assert {"position.row_embed.weight", "position.col_embed.weight"} <= set(members[group])


def assert_official_rates(detector: Detector, recipe: AdamW, family: str) -> None:
    """Compare with the rule as the official code states it, on the names that it is stated for."""
    rates = {name: torch.tensor(-1.0) for name, _ in detector.named_parameters()}
    for group, members in assign(detector, recipe.groups).items():
        rates |= {name: torch.tensor(recipe.settings_of(group)[0]) for name in members}
    shaped = {name: rates[name].reshape([1] * one.ndim) for name, one in detector.named_parameters()}
    official = adapter_for(family, detector).to_official(shaped)
    frozen = {name for name, rate in official.items() if (rate == -1).all()}
    stem = "backbone.0.body."
    assert frozen == {name for name in official if name.startswith((stem + "conv1", stem + "layer1"))}
    for name in set(official) - frozen:
        expected = 1e-5 if "backbone" in name else 1e-4
        if family == "deformable_detr":
            slow = "backbone.0" in name or "reference_points" in name or "sampling_offsets" in name
            expected = 2e-5 if slow else 2e-4
        assert torch.allclose(official[name], torch.tensor(expected), rtol=1e-5), name
    assert recipe.weight_decay == 1e-4 and recipe.clip_norm == 0.1 and recipe.ema_decay is None
    assert all(recipe.settings_of(group)[1] == 1e-4 for group in recipe.groups)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_number_of_trainable_parameters_is_the_official_one(name):
    assert trainable(full_size(name)) == OFFICIAL[name][1]


@pytest.mark.parametrize("name", RECIPES)
def test_the_number_of_parameters_rounds_to_the_published_one(name):
    millions = trainable(full_size(name)) / 1e6
    for entry in composed(name).published:
        if "params_m" in entry:
            agrees = round(millions, 1 if isinstance(entry.params_m, float) else None) == entry.params_m
            assert agrees != ((name, entry.source) in OTHER_COUNTS), (millions, entry)


def official(goldens: Path, name: str) -> dict:
    family, _, variant = OFFICIAL[name][0].partition("/")
    file = goldens / family / "checkpoint_keys.json"
    if not file.is_file():
        pytest.skip("no list of official checkpoint keys beside the golden cases")
    return json.loads(file.read_text())["variants"][variant]


@pytest.mark.parametrize("name", OFFICIAL)
def test_settings_are_those_of_the_official_arguments(goldens, name):
    cfg, args = composed(name), official(goldens, name)["args"]
    ours = {
        "lr": cfg.optimizer.lr,
        "lr_backbone": cfg.optimizer.lr * cfg.optimizer.groups.backbone.lr_factor,
        "weight_decay": cfg.optimizer.weight_decay,
        "clip_max_norm": cfg.optimizer.clip_norm,
        "backbone": cfg.backbone.name,
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
    theirs = {key: args[key] for key in ours}
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_tensor_has_an_official_name_and_shape(goldens, name):
    detector = full_size(name)
    ours = adapter_for(composed(name).family_name, detector).to_official(detector.state_dict())
    theirs = {key: tuple(shape) for key, shape, _ in official(goldens, name)["keys"]}
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
