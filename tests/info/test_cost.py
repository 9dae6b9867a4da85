"""Parameters and multiply-adds against counts by hand, and against those of the official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from detfamily.build import build_detector
from detfamily.config import compose
from detfamily.detector import Detector
from detfamily.errors import DataError
from detfamily.info.cost import Cost, count_multiply_adds, count_parameters, shapes_only

TINY = (
    "backbone=small backbone.stem_width=4 backbone.widths=[8,8,8,8] model.embed_dim=32 model.num_heads=4 "
    "model.ffn_dim=24 model.num_queries=6 encoder.num_layers=2 decoder.num_layers=3"
).split()
SIZE = (64, 96)
TOKENS, WIDTH, HIDDEN, QUERIES, ENCODER, DECODER, CLASSES = 2 * 3, 32, 24, 6, 2, 3, 5

OFFICIAL = {
    # recipe: height, width, billions of multiply-adds of the official model, counted with DETR's authors' script
    "detr_r50_500ep": (800, 1110, 84.37),
    "detr_r101_dc5_500ep": (800, 1110, 248.68),
    "conditional_detr_r50_dc5": (800, 1110, 190.28),
    "dab_detr_r50_3pat": (800, 1333, 120.78),
    "deformable_detr_r50": (800, 1110, 170.28),
}


def tiny(*overrides: str) -> Detector:
    return shapes_only(compose("train", [*TINY, *overrides]), CLASSES)


def whole(recipe: str) -> Cost:
    return Cost(shapes_only(compose("train", [f"experiment={recipe}", "data.root=."]), 91))


@pytest.mark.parametrize("recipe", OFFICIAL)
def test_as_many_as_the_official_code(recipe: str) -> None:
    height, width, billions = OFFICIAL[recipe]
    work = whole(recipe).work((height, width))
    # the script does not see the sampling of deformable attention
    assert work.of(("convolution", "linear", "attention")) / 1e9 == pytest.approx(billions, abs=0.0051)


def test_dense_attention_by_hand() -> None:
    work = count_multiply_adds(tiny("family=detr"), SIZE)
    encoder = ENCODER * 2 * TOKENS**2 * WIDTH
    decoder = DECODER * 2 * (QUERIES**2 + QUERIES * TOKENS) * WIDTH
    assert work.kinds["attention"] == encoder + decoder
    layer = 4 * WIDTH**2 + 2 * WIDTH * HIDDEN
    assert work.parts["encoder"] == encoder + ENCODER * TOKENS * layer
    crossing = DECODER * (2 * QUERIES + 2 * TOKENS) * WIDTH**2
    assert work.parts["decoder"] == decoder + DECODER * QUERIES * layer + crossing
    assert work.parts["heads"] == DECODER * QUERIES * WIDTH * (2 * WIDTH + 4 + CLASSES + 1)
    assert "sampling" not in work.kinds and "queries" not in work.parts


def test_conditional_attention_compares_twice_the_width() -> None:
    work = count_multiply_adds(tiny("family=conditional_detr"), SIZE)
    encoder = ENCODER * 2 * TOKENS**2 * WIDTH
    assert work.kinds["attention"] == encoder + DECODER * QUERIES * (2 * QUERIES + 3 * TOKENS) * WIDTH


def test_sampling_by_hand() -> None:
    work = count_multiply_adds(tiny("family=deformable_detr"), SIZE)
    tokens = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert work.kinds["sampling"] == (ENCODER * tokens + DECODER * QUERIES) * WIDTH * 4 * 4 * 5


def test_boxes_that_a_decoder_refines_are_the_decoders() -> None:
    plain, refined = (
        count_multiply_adds(tiny("family=deformable_detr", f"decoder={one}"), SIZE) for one in ("plain", "refine")
    )
    box = QUERIES * WIDTH * (2 * WIDTH + 4)
    assert refined.parts["decoder"] == plain.parts["decoder"] + (DECODER - 1) * box
    assert refined.parts["heads"] == plain.parts["heads"]


@pytest.mark.parametrize("overrides", ["family=detr", "family=dab_detr model.num_patterns=2", "experiment=demo"])
def test_every_part_and_kind_sums_to_the_whole(overrides: str) -> None:
    detector = shapes_only(compose("train", overrides.split()), CLASSES)
    work, parameters = count_multiply_adds(detector, (128, 160)), count_parameters(detector)
    assert sum(work.parts.values()) == work.total == sum(work.kinds.values()) > 0
    assert set(work.kinds) <= {"convolution", "linear", "attention", "sampling"}
    assert parameters.total == sum(one.numel() for one in detector.parameters())
    assert parameters.trained == sum(one.numel() for one in detector.parameters() if one.requires_grad)
    assert set(work.parts) <= set(parameters.parts) | {"backbone"}


def test_the_cpu_and_the_meta_device_count_alike() -> None:
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        pytest.skip("this PyTorch does not count attention on the CPU")
    cfg = compose("train", [*TINY, "family=dab_deformable_detr", "denoising=dn"])
    real = count_multiply_adds(build_detector(cfg, CLASSES).eval(), SIZE)
    assert real == count_multiply_adds(shapes_only(cfg, CLASSES), SIZE)


def test_counting_leaves_the_detector_as_it_was() -> None:
    """Conditional DETR's learned positions go into a module as they are, which the counter cannot follow."""
    detector = tiny("family=conditional_detr")
    before = {name: one.requires_grad for name, one in detector.named_parameters()}
    count_multiply_adds(detector, SIZE)
    assert {name: one.requires_grad for name, one in detector.named_parameters()} == before and any(before.values())


def test_too_small_an_image_is_an_error() -> None:
    detector = tiny("family=deformable_detr", "decoder=refine", "query_source=proposals", "model.num_queries=150")
    with pytest.raises(DataError, match="larger images"):
        count_multiply_adds(detector, SIZE)


@pytest.mark.parametrize(
    ("recipe", "family", "variant"),
    [
        ("detr_r50_500ep", "detr", "detr-r50"),
        (
            "deformable_detr_r50_two_stage",
            "deformable_detr",
            "r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage",
        ),
        ("dab_detr_r50_3pat", "dab_detr", "dab_detr_r50_3pat"),
    ],
)
def test_parameters_are_the_official_ones(goldens: Path, recipe: str, family: str, variant: str) -> None:
    file = goldens / family / "checkpoint_keys.json"
    if not file.is_file():
        pytest.skip("no list of official checkpoint keys beside the golden cases")
    official = json.loads(file.read_text())["variants"][variant]
    found = whole(recipe).parameters
    assert (found.total, found.trained) == (official["num_parameters"], official["num_trainable_parameters"])
    # of ResNet-50's frozen norms, a checkpoint has two statistics for each of 26,560 channels, and weight and bias
    assert found.stored == found.total + 4 * 26560
