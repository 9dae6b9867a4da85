"""Every row of the ablation tables and every choice of every config group: composed, built small, one step."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from omegaconf import DictConfig

from detfamily.attention import MSDeformAttention, SplitDenseAttention
from detfamily.blocks.proposals import ProposalQueries
from detfamily.build import build_criterion, build_detector, build_postprocess
from detfamily.config import build, compose, configs_dir, groups, groups_of, to_container, validate
from detfamily.data.copy_paste import CopyPaste
from detfamily.data.transforms import Sample
from detfamily.detector import Detector
from detfamily.engine.optim import AdamW, clip_gradients
from detfamily.engine.runtime import plan
from detfamily.experiments.scale import Variant, identity, variants
from detfamily.experiments.table import read_table, table_files
from detfamily.structures import Images, Targets

ROOT = Path(__file__).resolve().parents[1]
TABLES = [file for file in table_files(ROOT / "experiments") if "task" not in yaml.safe_load(file.read_text())]
"""Those of detectors; ``tests/classification/test_tables.py`` has the others."""

SMALL = (
    "model.embed_dim=32",
    "model.num_heads=4",
    "model.ffn_dim=32",
    "model.num_queries=10",
    "model.num_one_to_many=10",
    "model.anchor_scale=0.25",
    "model.num_regions=16",
    "model.region_dim=32",
    "encoder.num_layers=2",
    "decoder.num_layers=2",
)
CLASSES = 5
SIZES = ((96, 64), (64, 96))


class Step(NamedTuple):
    """What came out of one optimiser step: tells whether two configurations compute the same."""

    loss: float
    norm: float


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are many times slower with more threads where other processes want the cores, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def table(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def rows() -> list[Any]:
    return [
        pytest.param(file, row, id=f"{file.parent.name}/{file.stem}/{row['label']}")
        for file in TABLES
        for row in table(file)["rows"]
    ]


# The form of the tables


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_table_is_well_formed(file):
    one = table(file)
    assert set(one) - {"not_expressed", "tradeoff"} == {"title", "claim", "source", "base", "baseline", "rows"}
    assert one["base"] in groups()["experiment"]
    labels = [row["label"] for row in one["rows"]]
    assert len(set(labels)) == len(labels) > 1 and one["baseline"] in labels
    trained = [row["label"] for row in one["rows"] if "weights_of" not in row]
    for row in one["rows"]:
        assert set(row) <= {"label", "overrides", "published", "difference", "against", "weights_of", "note"}
        assert row.get("weights_of", trained[0]) in trained
        assert set(row.get("published", {})) <= {"AP", "AP50", "AP75", "APs", "APm", "APl", "params_m", "gflops"}
        assert set(row.get("difference", {})) <= {"AP", "AP50"}
        assert any(key in row for key in ("published", "difference", "note"))
        if "weights_of" in row:  # Evaluated only, so nothing may change what is trained.
            assert all(override.startswith(("postprocess.", "evaluation.branch=")) for override in row["overrides"])
    for row in one.get("not_expressed", []):
        assert {"label", "reason"} <= set(row) <= {"label", "reason", "published"}


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_baseline_is_the_published_recipe(file):
    one = table(file)
    baseline = next(row for row in one["rows"] if row["label"] == one["baseline"])
    if any("against" in row for row in one["rows"]):  # There are several baselines, and the recipe may be none of them.
        baseline = next(row for row in one["rows"] if not row["overrides"])
    if baseline["overrides"]:  # The source has a setting of its own for this table.
        assert all(set(baseline["overrides"]) <= set(row["overrides"]) for row in one["rows"])
        return
    recipe = yaml.safe_load((ROOT / "configs/experiment" / f"{one['base']}.yaml").read_text())
    assert any(baseline["published"].items() <= entry.items() for entry in recipe["published"])


def test_every_table_of_the_papers_is_there():
    """DETR: tables 2 to 4 and the numbers of section 4. Deformable DETR: tables 1 and 2, and what its README adds.

    Conditional DETR: tables 3 and 4, figure 5, section 4.3. DAB-DETR: tables 2, 3, 5 to 8. DN-DETR: tables 2, 4 and 5,
    figure 6, table 3 of the journal version. DINO: tables 1, 2, 4, 6 and 7, appendix D.2, and what another code adds.
    H-DETR: the tables of its README. Co-DETR: tables 2, 3 and 7 to 13.
    """
    assert {f"{file.parent.name}/{file.stem}": len(table(file)["rows"]) for file in TABLES} == {
        "detr/encoder_depth": 4,
        "detr/decoder_layers": 8,
        "detr/ffn": 2,
        "detr/positions": 5,
        "detr/losses": 3,
        "detr/details": 4,
        "deformable_detr/against_detr": 5,
        "deformable_detr/epochs": 3,
        "deformable_detr/attention": 6,
        "deformable_detr/variants": 3,
        "deformable_detr/scales": 3,
        "conditional_detr/reference_points": 3,
        "conditional_detr/spatial_query": 5,
        "conditional_detr/loss_parts": 5,
        "conditional_detr/projection": 5,
        "dab_detr/components": 5,
        "dab_detr/temperature": 7,
        "dab_detr/decoder_layers": 5,
        "dab_detr/query_form": 2,
        "dab_detr/patterns_r50": 3,
        "dab_detr/patterns_r50_dc5": 4,
        "dab_detr/patterns_r101": 3,
        "dab_detr/patterns_r101_dc5": 3,
        "dn_detr/parts": 4,
        "dn_detr/groups_r50": 3,
        "dn_detr/groups_r50_dc5": 3,
        "dn_detr/groups_r101": 3,
        "dn_detr/groups_r101_dc5": 3,
        "dn_detr/noise": 7,
        "dn_detr/other_detectors": 2,
        "dn_detr/twelve_epochs_r50_dc5": 2,
        "dn_detr/twelve_epochs_r101_dc5": 2,
        "dn_detr/twelve_epochs_deformable": 4,
        "families/dense": 4,  # Ours: the papers side by side.
        "families/deformable": 5,
        "families/two_stage": 5,
        "attention_swap/encoder": 12,
        "dino/components": 6,
        "dino/layers": 8,
        "dino/denoising_queries": 7,
        "dino/scales": 6,
        "dino/image_scale": 2,
        "dino/extras": 7,
        "h_deformable_detr/hybrid": 6,
        "h_deformable_detr/weight_decay": 4,
        "co_detr/heads": 24,
        "co_detr/kinds": 9,
        "co_detr/single_head": 7,
        "co_detr/parts": 8,
        "co_detr/longer": 4,
        "co_detr/branches": 6,
        "co_detr/lambdas": 7,
        "co_detr/convolutions": 6,
    }


OTHER_RECIPES = {
    # (table, row): the recipe that its overrides arrive at
    ("conditional_detr/loss_parts", "none"): "detr_r50_50ep",
    ("dab_detr/patterns_r50", "no patterns"): "dab_detr_r50",
    ("dab_detr/patterns_r50_dc5", "no patterns"): "dab_detr_r50_dc5",
    ("dab_detr/patterns_r50_dc5", "no patterns, fixed centres"): "dab_detr_r50_dc5_fixed_xy",
    ("dab_detr/patterns_r101", "no patterns"): "dab_detr_r101",
    ("dab_detr/patterns_r101_dc5", "no patterns"): "dab_detr_r101_dc5",
    ("dn_detr/groups_r50", "5 groups"): "dn_detr_r50",
    ("dn_detr/groups_r50_dc5", "5 groups"): "dn_detr_r50_dc5",
    ("dn_detr/groups_r101", "5 groups"): "dn_detr_r101",
    ("dn_detr/groups_r101_dc5", "5 groups"): "dn_detr_r101_dc5",
    ("dn_detr/twelve_epochs_r50_dc5", "denoising"): "dn_detr_r50_dc5_3pat_12ep",
    ("dn_detr/twelve_epochs_r101_dc5", "denoising"): "dn_detr_r101_dc5_3pat_12ep",
    ("dino/scales", "5 levels, 12 epochs"): "dino_r50_5scale_12ep",
    ("dino/scales", "4 levels, 24 epochs"): "dino_r50_4scale_24ep",
    ("dino/scales", "5 levels, 24 epochs"): "dino_r50_5scale_24ep",
    ("dino/scales", "4 levels, 36 epochs"): "dino_r50_4scale_36ep",
    ("dino/scales", "5 levels, 36 epochs"): "dino_r50_5scale_36ep",
    ("h_deformable_detr/hybrid", "hybrid, 36 epochs"): "h_deformable_detr_r50_36ep",
    ("h_deformable_detr/weight_decay", "0.0001, 36 epochs"): "h_deformable_detr_swin_t_36ep",
}


@pytest.mark.parametrize(("name", "label"), OTHER_RECIPES)
def test_rows_that_are_other_recipes_are_these(name, label):
    file = ROOT / "experiments" / f"{name}.yaml"
    row = next(row for row in table(file)["rows"] if row["label"] == label)
    ours, theirs = (
        to_container(compose("train", [f"experiment={base}", "data.root=.", *overrides]))
        for base, overrides in ((table(file)["base"], row["overrides"]), (OTHER_RECIPES[name, label], []))
    )
    for field in ("name", "family_name", "published", "runtime"):
        del ours[field], theirs[field]
    assert ours == theirs


# The rows


def small_row(file: Path, row: dict[str, Any]) -> DictConfig:
    """The row's config with what the table varies as published, and all else small."""
    return small(*key(file, row))


Key = tuple[str, tuple[str, ...], tuple[str, ...]]


def key(file: Path, row: dict[str, Any]) -> Key:
    """Base, what is made small, and overrides."""
    varied = {one.partition("=")[0] for other in table(file)["rows"] for one in other["overrides"]}
    reduced = tuple(one for one in SMALL if one.partition("=")[0] not in varied)
    return table(file)["base"], reduced, tuple(row["overrides"])


@functools.cache
def small(base: str, reduced: tuple[str, ...], overrides: tuple[str, ...]) -> DictConfig:
    first = [f"experiment={base}", "data.root=.", *reduced]
    if not any("dc5" in one or "dilation" in one for one in overrides):
        first.append("backbone=small")  # The small one cannot be dilated.
        first += ["~backbone.dilation"] if "dc5" in base else []
    if any(one.startswith("postprocess.layer") for one in overrides):
        first.append("decoder.num_layers=6")
    cfg = compose("train", [*first, *overrides])
    # What recipes with Swin say of their backbone goes with it.
    left = [f"~backbone.{key}" for key in ("drop_path", "gradient_checkpointing") if key in cfg.backbone]
    return compose("train", [*first, *overrides, *left]) if left and "backbone=small" in first else cfg


@pytest.mark.parametrize(("file", "row"), rows())
def test_a_row_composes_builds_and_steps(file, row):
    stepped(file, row)


def stepped(file: Path, row: dict[str, Any]) -> Step:
    return small_step(*key(file, row))


@functools.cache
def small_step(base: str, reduced: tuple[str, ...], overrides: tuple[str, ...]) -> Step:
    return check(small(base, reduced, overrides))


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_no_two_rows_are_the_same(file):
    configs = [(to_container(small_row(file, row)), row.get("weights_of")) for row in table(file)["rows"]]
    assert all(one != other for index, one in enumerate(configs) for other in configs[:index])


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_rows_that_change_the_model_or_its_losses_compute_something_else(file):
    """From the same random numbers, a switch that nothing reads would give the same step."""
    found = [(computed(to_container(small_row(file, row))), stepped(file, row)) for row in table(file)["rows"]]
    for index, (parts, step) in enumerate(found):
        for other_parts, other in found[:index]:
            assert parts == other_parts or step != other


def computed(cfg: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and its losses; without auxiliary heads nothing reads what should become of them."""
    detector = cfg["detector"]
    unread = [] if detector["auxiliary"] else ["collaboration"]
    return {key: value for key, value in detector.items() if key not in unread}, cfg["criterion"]


# The rows on the miniature that ``detfamily ablate`` runs


@functools.cache
def on_mini(file: Path) -> dict[str, Variant]:
    return variants(read_table(file), "mini")


@pytest.mark.parametrize(("file", "row"), rows())
def test_a_row_fits_on_the_miniature(file, row):
    variant = on_mini(file)[row["label"]]
    assert variant.images is not None and 15_000 <= variant.images <= 100_000
    if variant.row.weights_of is None:
        cfg = compose("train", variant.overrides)
        assert identity(cfg) == variant.identity
        if variant.identity not in STEPPED_ON_MINI:
            check(cfg)
            STEPPED_ON_MINI.add(variant.identity)


STEPPED_ON_MINI: set[str] = set()
"""Tables that differ in their backbone are the same on the miniature, which has one of its own."""


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_no_two_rows_are_the_same_on_the_miniature(file):
    found = on_mini(file)
    assert len({one.identity for one in found.values()}) == len(found)


def test_images_of_a_step_and_epochs_of_a_whole_table_are_those_of_the_miniature():
    """They go with the learning rate, which is the miniature's, too; on the published scale they are the rows'."""
    for name, epochs in (("dab_detr/temperature", 50), ("dn_detr/noise", 20)):
        file = ROOT / "experiments" / f"{name}.yaml"
        own = compose("train", [f"experiment={table(file)['base']}", "+scale=mini"]).schedule
        for variant in on_mini(file).values():
            assert (variant.config["schedule"]["total_batch_size"], variant.config["schedule"]["epochs"]) == (
                own.total_batch_size,
                own.epochs,
            )
        for variant in variants(read_table(file), "coco", ["data.root=."]).values():
            schedule = variant.config["schedule"]
            assert (schedule["total_batch_size"], schedule["epochs"]) == (64, epochs)
    larger = variants(read_table(file), "mini", ["schedule.total_batch_size=16"])
    assert {one.config["schedule"]["total_batch_size"] for one in larger.values()} == {16}


def counted_rows() -> list[Any]:
    """Rows with a published number of parameters, but for whole recipes, which have tests of their own."""
    return [
        one
        for one in rows()
        if "params_m" in one.values[1].get("published", {})
        and not all(text.startswith("experiment=") for text in one.values[1]["overrides"])
    ]


@pytest.mark.parametrize(("file", "row"), counted_rows())
def test_a_row_has_the_published_number_of_parameters(file, row):
    cfg = compose("train", [f"experiment={table(file)['base']}", "data.root=.", *row["overrides"]])
    with torch.device("meta"):
        detector = build_detector(cfg, 91, pretrained=False)
    millions = sum(one.numel() for one in detector.parameters() if one.requires_grad) / 1e6
    published = row["published"]["params_m"]
    assert round(millions, 1 if isinstance(published, float) else None) == published


# The choices of the config groups

NEEDS = {
    # what a choice needs beside it
    "backbone=timm": ["backbone.name=test_resnet"],
    "query_source=learned": ["cross_attention=dense"],
    "query_source=learned_at_input": ["cross_attention=dense"],
    "query_source=proposals": ["decoder=refine"],
    "query_source=proposals_mixed": ["decoder=refine"],
    "query_source=selected": ["decoder=refine"],
    "query_source=anchors": ["query_position=anchor"],
    "query_source=content_anchors": ["query_position=anchor"],
    "query_position=anchor": ["query_source=content_anchors"],
    "query_position=anchor_valid": ["query_source=content_anchors"],
    "query_position=anchor_modulated": ["query_source=content_anchors", "cross_attention=conditional"],
    "query_position=center": ["cross_attention=conditional"],
    "cross_attention=conditional": ["query_position=center"],
    "cross_attention=conditional_levels": ["query_position=center"],
    "cross_attention=conditional_rescaled": ["query_position=center"],
    "encoder_position=none": ["level_embed=none"],  # Nothing would read it.
    "data=coco": ["data.root=."],
    "data=coco_mini": ["data.root=."],
}

NEEDS |= {f"memory_position={name}": ["cross_attention=dense"] for name in groups()["memory_position"]}
NEEDS |= {
    # what scales a code of place needs one that is read
    f"query_scale={name}": ["query_position=center", "cross_attention=conditional"]
    for name in groups()["query_scale"]
}

NEEDS |= {
    # or a block may be left out for both images, and no gradient reaches it
    f"backbone={name}": ["backbone.drop_path=0"]
    for name in groups()["backbone"]
    if re.match("swin|dat", name)
}

SHAPES_ONLY = (
    *("backbone=resnet101", "backbone=resnext101_64x4d"),
    *(f"backbone={name}" for name in groups()["backbone"] if re.match(r"(swin|dat|datpp)_[sbl]", name)),
)
"""Too large for a step in a quick test: they run without memory or numbers, on the meta device."""


FAMILY = "deformable_detr"


def defaults() -> dict[str, str]:
    """The choice of each group that the family makes."""
    train = yaml.safe_load((configs_dir() / "train.yaml").read_text())["defaults"]
    family = yaml.safe_load((configs_dir() / f"family/{FAMILY}.yaml").read_text())["defaults"]
    made = {group: name for one in train if isinstance(one, dict) for group, name in one.items()}
    made |= {key.removeprefix("override /"): name for one in family for key, name in one.items()}
    made["augmentation"] = made["data"]  # written as an interpolation there
    return {group: made[group] for group in groups_of("train") if group != "experiment"} | {"family": FAMILY}


def choices() -> list[str]:
    """Every choice of every group; experiments are recipes, which have tests of their own, or our two small ones."""
    made = defaults()
    others = [f"{group}={name}" for group in made for name in groups()[group] if name != made[group]]
    return [*others, f"backbone={made['backbone']}", "experiment=demo", "experiment=overfit"]


def test_the_defaults_compose_build_and_step():
    """All choices that the family makes, each named; the backbone has its turn below."""
    named = [f"{group}={name}" for group, name in (defaults() | {"backbone": "small"}).items()]
    check(compose("train", [*named, *SMALL]))


@pytest.mark.parametrize("choice", choices())
def test_a_choice_composes_builds_and_steps(choice):
    if choice == "backbone=timm":
        pytest.importorskip("timm")
    if choice in SHAPES_ONLY:
        cfg = with_choice(choice)
        validate(cfg)
        check_shapes(cfg)
    else:
        step_of_choice(choice)


def with_choice(choice: str) -> DictConfig:
    first = [] if choice.startswith("experiment") else [f"family={FAMILY}", "backbone=small"]
    return compose("train", [*first, *SMALL, choice, *NEEDS.get(choice, [])])


@functools.cache
def step_of_choice(choice: str) -> Step:
    return check(with_choice(choice))


NO_MODEL = "data augmentation optimizer schedule runtime tracking scale postprocess family experiment backbone".split()
"""Groups whose choices a step of the same batch does not show, or which are the model as a whole."""


@pytest.mark.parametrize("group", [group for group in defaults() if group not in NO_MODEL and len(groups()[group]) > 1])
def test_the_choices_of_a_group_compute_different_things(group):
    """From the same random numbers, a choice that nothing reads would give the same step as another one."""
    steps = [step_of_choice(f"{group}={name}") for name in groups()[group]]
    assert len(set(steps)) == len(steps)


# What is checked


def check(cfg: DictConfig) -> Step:
    validate(cfg)
    check_run(cfg)
    return check_step(cfg)


def batch() -> tuple[Images, Targets]:
    """Two images of different size, one of them without objects."""
    height, width = (max(sides) for sides in zip(*SIZES, strict=True))
    padding = torch.ones(2, height, width, dtype=torch.bool)
    for mask, (h, w) in zip(padding, SIZES, strict=True):
        mask[:h, :w] = False
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4], [0.7, 0.7, 0.2, 0.2]])
    targets = Targets.from_lists([torch.tensor([1, 4, 1]), torch.zeros(0).long()], [boxes, boxes[:0]], [7, 8])
    return Images(pixels, padding, SIZES, SIZES, (7, 8)), targets


def check_step(cfg: DictConfig) -> Step:
    """One optimiser step of the recipe: finite, with a gradient for all that learns; then detections."""
    torch.manual_seed(0)
    detector = build_detector(cfg, CLASSES, pretrained=False).train()
    off_zero(detector)
    recipe: AdamW = build(cfg.optimizer)
    optimizer = recipe.build(detector)
    images, targets = batch()
    losses = build_criterion(cfg)(detector(images, targets), targets)
    assert losses.total.isfinite() and losses.total > 0
    losses.total.backward()
    check_gradients(detector, heads_idle=cfg.criterion.groups.auxiliary.lambda_2 == 0)
    norm = clip_gradients(detector.parameters(), recipe.clip_norm)
    assert norm.isfinite() and norm > 0
    optimizer.step()
    check_detections(cfg, detector, images)
    return Step(losses.total.item(), norm.item())


@torch.no_grad()
def off_zero(detector: Detector) -> None:
    """Some weights start at zero, and hide from the first gradient what lies before them.

    One stays there: tokens of the padding look all the same to proposals, and may be the best ones by chance, without
    any gradient.
    """
    for one in detector.parameters():
        one.add_(0.02 * torch.randn_like(one))
    if isinstance(detector.query_source, ProposalQueries):
        detector.query_source.memory_proj.bias.zero_()


def check_gradients(detector: Detector, heads_idle: bool = False) -> None:
    """A gradient for every parameter that is not frozen.

    But for the weight of a single sampled point, which is 1, for what multiplies the content of the first layer, where
    that is zero, for auxiliary heads that are not trained, and for their scales of levels without positives.
    """
    single = [
        name
        for name, module in detector.named_modules()
        if isinstance(module, MSDeformAttention) and module.num_levels * module.num_points == 1
    ]
    idle = tuple(f"{name}.attention_weights." for name in single)
    idle += ("auxiliary.heads.", "auxiliary.downsample.") * heads_idle
    filled = detector.query_source.has_content or detector.denoising is not None or detector.patterns.num_patterns > 0
    if not filled and isinstance(detector.decoder.layers[0].self_attention, SplitDenseAttention):
        parts = ("query_content", "key_content", "value")
        idle += tuple(f"decoder.layers.0.self_attention.{part}_proj.weight" for part in parts)
    for name, one in detector.named_parameters():
        if not one.requires_grad:
            assert one.grad is None, name
        elif not name.startswith(idle) and not re.match(r"auxiliary\.heads\.\w+\.scales\.", name):
            assert one.grad is not None and one.grad.any(), f"no gradient reaches {name}"


@torch.no_grad()
def check_detections(cfg: DictConfig, detector: Detector, images: Images) -> None:
    found = build_postprocess(cfg)(detector.eval()(images), images)
    assert len(found) == len(images)
    for one in found:
        count = len(one.scores)
        assert one.labels.shape == (count,) and one.boxes_xyxy.shape == (count, 4)
        assert ((one.scores >= 0) & (one.scores <= 1)).all() and ((one.labels >= 0) & (one.labels < CLASSES)).all()


@torch.no_grad()
def check_shapes(cfg: DictConfig) -> None:
    with torch.device("meta"):
        detector = build_detector(cfg, CLASSES, pretrained=False).eval()
        pixels, mask = torch.zeros(2, 3, 96, 96, dtype=torch.uint8), torch.zeros(2, 96, 96, dtype=torch.bool)
        predictions = detector(Images(pixels, mask, SIZES, SIZES, (7, 8)))["match"]
    layers, queries = cfg.decoder.num_layers, cfg.model.num_queries
    assert predictions.logits.shape[:3] == predictions.boxes.shape[:3] == (layers, 2, queries)


def check_run(cfg: DictConfig) -> None:
    """What is not the model: a plan can be made, and augmentations take an image with and one without objects."""
    made = plan(build(cfg.schedule), build(cfg.runtime), 1, 100_000)
    assert made.total_batch_size == cfg.schedule.total_batch_size
    transforms = [build(cfg.augmentation.train), build(cfg.augmentation.test)]
    for transform in transforms:
        for count in (2, 0):
            boxes = torch.tensor([[4.0, 6.0, 30.0, 20.0], [10.0, 1.0, 40.0, 30.0]])[:count]
            labels = torch.zeros(count, dtype=torch.int64)
            image = torch.zeros(3, 40, 50, dtype=torch.uint8)
            sample = Sample(image, boxes, labels, torch.ones(count), labels, 7, (40, 50))
            rng, most = torch.Generator().manual_seed(0), count
            if isinstance(transform, CopyPaste):
                result, most = transform(sample, rng, lambda _, same=sample: same), transform.most_objects(count)
            else:
                result = transform(sample, rng)
            assert result.image.dtype == torch.uint8 and result.image.ndim == 3
            assert len(result.boxes) == len(result.labels) <= most
