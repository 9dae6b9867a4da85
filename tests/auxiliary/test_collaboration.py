from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from detfamily.auxiliary.collaboration import PositiveEmbedding
from detfamily.auxiliary.structures import Positives
from detfamily.blocks.denoising import Draws
from detfamily.build import build_criterion, build_detector
from detfamily.config import compose
from detfamily.detector import Detector
from detfamily.structures import Images, Predictions, Targets

TINY = (
    *("backbone=small", "backbone.stem_width=4", "backbone.widths=[8,8,8,8]"),
    *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=24", "model.num_queries=6", "model.dropout=0"),
    *("encoder.num_layers=2", "decoder.num_layers=3", "model.anchor_scale=0.25"),
)
FEW = (
    *("auxiliary.0.rpn.proposals=20", "auxiliary.0.rpn.per_level=30", "auxiliary.0.rpn.sampler.count=16"),
    *("auxiliary.0.roi.sampler.count=12", "auxiliary.0.roi.hidden_dim=8"),
)
BOTH = ("auxiliary=[faster_rcnn,atss]", *FEW)
KINDS = {
    "detr": ("family=detr", *BOTH),
    "conditional": ("family=conditional_detr", *BOTH),
    "dab": ("family=dab_detr", *BOTH),
    "deformable": ("family=deformable_detr", *BOTH),
    "deformable, features": ("family=deformable_detr", *BOTH, "collaboration.features=true"),
    "dino": ("family=dino", *BOTH),
    "h-deformable": ("family=h_deformable_detr", *BOTH, "model.num_one_to_many=9"),
    "co-deformable": ("family=co_deformable_detr", *FEW),
    "co-dino": ("family=co_dino", *FEW),
}
CLASSES = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def composed(*overrides: str) -> DictConfig:
    return compose("train", [*overrides[:1], *TINY, *overrides[1:]])


def detector_of(*overrides: str) -> Detector:
    """In training, away from its start, with draws that are the same each time."""
    torch.manual_seed(0)
    detector = build_detector(composed(*overrides), CLASSES).train()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert detector.auxiliary is not None
    detector.auxiliary.draws = Draws(torch.Generator().manual_seed(5))
    if detector.denoising is not None:
        detector.denoising.draws = Draws(torch.Generator().manual_seed(6))
    return detector


def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 56:], mask[1, :, 64:] = True, True
    pixels = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    sizes = ((64, 96), (56, 64))
    return Images(pixels.masked_fill(mask[:, None], 0), mask, sizes, sizes, (0, 1))


def objects(*counts: int) -> Targets:
    generator = torch.Generator().manual_seed(3)
    boxes = [0.3 + 0.3 * torch.rand(count, 4, generator=generator) for count in counts]
    return Targets.from_lists([torch.arange(count) % CLASSES for count in counts], boxes)


def heads_of(said: dict[str, Predictions]) -> dict[str, Predictions]:
    return {name: one for name, one in said.items() if name.startswith("auxiliary.")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_a_step_of_training_reaches_every_parameter_of_the_heads(kind: str, counts: tuple[int, int]) -> None:
    detector, targets = detector_of(*KINDS[kind]), objects(*counts)
    said = detector(images(), targets)
    heads = heads_of(said)
    assert list(heads) == ["auxiliary.faster_rcnn", "auxiliary.atss"]
    for name, one in heads.items():
        assert one.given is not None and one.logits.shape[:2] == (3, 2) and one.logits.shape[2] >= 8
        found = one.given.matched.any(1).tolist()
        # objects are regions themselves; of anchors none may be near enough
        assert found == [count > 0 for count in counts] or (name.endswith("atss") and found[0] == (counts[0] > 0))
        answered = one.given.answered
        assert answered is not None and answered == one.given.matched.sum()
    losses = build_criterion(composed(*KINDS[kind]))(said, targets)
    assert losses.total.isfinite() and all(part.isfinite() for part in losses.parts.values())
    losses.total.backward()
    assert detector.auxiliary is not None
    for name, parameter in detector.auxiliary.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # the logits' side of an empty batch learns, too: all is background
        unread = not any(counts) and ("box_head" in name or "scales" in name or "centerness" in name)
        unread |= not any(counts) and ("box_tower" in name or name.endswith("downsample.0.bias"))
        unread |= name.startswith("heads.atss.scales") or name.endswith("downsample.0.bias")
        assert unread or parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["deformable", "co-dino"])
def test_evaluation_knows_nothing_of_the_heads(kind: str) -> None:
    detector = detector_of(*KINDS[kind]).eval()
    without = build_detector(composed(*KINDS[kind][:1], "auxiliary=none"), CLASSES).eval()
    state = {name: one for name, one in detector.state_dict().items() if not name.startswith("auxiliary.")}
    without.load_state_dict(state)
    with torch.no_grad():
        ours, plain = detector(images(), objects(2, 1)), without(images())
    assert ours.keys() == plain.keys() and not heads_of(ours)
    for name in ours:
        assert torch.equal(ours[name].logits, plain[name].logits) and torch.equal(ours[name].boxes, plain[name].boxes)


def test_the_other_groups_say_what_they_say_without_heads() -> None:
    detector = detector_of(*KINDS["deformable"])
    said = detector(images(), objects(2, 1))
    detector.auxiliary = None
    plain = detector(images(), objects(2, 1))
    assert torch.equal(said["match"].boxes, plain["match"].boxes)


def test_the_same_draws_give_the_same_and_others_do_not() -> None:
    def step(seed: int) -> tuple[float, Tensor]:
        detector = detector_of(*KINDS["co-deformable"])
        assert detector.auxiliary is not None
        detector.auxiliary.draws = Draws(torch.Generator().manual_seed(seed))
        said = detector(images(), objects(3, 2))
        losses = build_criterion(composed(*KINDS["co-deformable"]))(said, objects(3, 2))
        return float(losses.total.detach()), said["auxiliary.atss"].boxes.detach()

    first, again, other = step(5), step(5), step(6)
    assert first[0] == again[0] and torch.equal(first[1], again[1])
    assert first[0] != other[0]


def test_training_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="auxiliary heads need the targets"):
        detector_of(*KINDS["deformable"])(images())


def test_without_positive_queries_only_the_heads_own_losses_are_left() -> None:
    overrides = (*KINDS["deformable"], "collaboration.positive_queries=false")
    detector, targets = detector_of(*overrides), objects(3, 1)
    assert detector.auxiliary is not None and detector.auxiliary.queries is None
    said = detector(images(), targets)
    criterion = build_criterion(composed(*overrides))
    losses = criterion(said, targets)
    parts = {name for name in losses.parts if name.startswith("auxiliary.")}
    assert parts == {
        *(f"auxiliary.faster_rcnn/{name}" for name in ("rpn/class", "rpn/l1", "roi/class", "roi/giou")),
        *(f"auxiliary.atss/head/{name}" for name in ("class", "giou", "centerness")),
    }
    plain = criterion({name: one for name, one in said.items() if not name.startswith("auxiliary.")}, targets)
    weights = {f"auxiliary.{head}/{part}": 1.0 for head, part in (one[10:].split("/", 1) for one in parts)}
    weights |= {"auxiliary.faster_rcnn/roi/giou": 10.0, "auxiliary.atss/head/giou": 2.0}
    # lambda_2 = 2, three decoder layers
    expected = plain.total + sum(6 * weights[name] * losses.parts[name] for name in parts)
    torch.testing.assert_close(losses.total, expected)


def test_heads_of_a_kind_are_told_apart_and_one_alone_needs_no_list() -> None:
    twice = build_detector(composed("family=deformable_detr", "auxiliary=[atss,atss]"), CLASSES)
    alone = build_detector(composed("family=deformable_detr", "auxiliary=atss"), CLASSES)
    assert twice.auxiliary is not None and alone.auxiliary is not None
    assert list(twice.auxiliary.heads) == ["atss", "atss_2"] and list(alone.auxiliary.heads) == ["atss"]


@pytest.mark.parametrize(
    ("overrides", "strides"),
    [
        (("family=detr",), [32, 64]),
        (("family=deformable_detr",), [8, 16, 32, 64, 128]),
        (("family=co_dino",), [4, 8, 16, 32, 64, 128]),
        (("family=detr", "backbone=resnet50", "backbone.dilation=true", "backbone.weights=null"), [16, 32]),
        (("family=detr", "backbone=swin_t", "backbone.weights=null", "model.stages=[3,4]", "model.num_levels=2"), None),
    ],
)
def test_heads_know_the_pixels_between_cells(overrides: tuple[str, ...], strides: list[int] | None) -> None:
    tiny = [one for one in TINY if not one.startswith("backbone") or len(overrides) == 1]
    if strides is None:
        overrides, strides = ("family=deformable_detr", *overrides[1:]), [8, 16, 32]
    detector = build_detector(compose("train", [overrides[0], *tiny, *overrides[1:], "auxiliary=atss"]), CLASSES)
    assert detector.auxiliary is not None
    assert list(detector.auxiliary.heads["atss"].anchors.strides) == strides  # type: ignore[union-attr]


def test_maps_are_the_memory_of_each_level_and_one_level_more() -> None:
    detector = detector_of(*KINDS["deformable"]).eval()
    assert detector.auxiliary is not None
    with torch.no_grad():
        memory = detector.encode(images())
        maps = detector.auxiliary.maps(memory)
    assert [tuple(one.shape[-2:]) for one in maps] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert torch.equal(maps[1][1, :, 2, 5], memory.content[1, 8 * 12 + 2 * 6 + 5])


def some_positives(count: int = 4, width: int = 8) -> Positives:
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(2, count, 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    features = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    index = torch.zeros(2, count, dtype=torch.int64)
    return Positives(boxes, features, index, boxes, index, index.bool(), index.bool())


def code_of(boxes: Tensor, width: int) -> Tensor:
    """x, y, w, h, each in width / 2 numbers, sines and cosines in turn."""
    rows = []
    for box in boxes:
        numbers: list[float] = []
        for value in box.tolist():
            inside = min(max(value, 0.0), 1.0)
            odds = max(inside, 1e-5) / max(1 - inside, 1e-5)
            angle = 2 * math.pi * odds / (1 + odds)
            for step in range(width // 4):
                frequency = 10000.0 ** (2 * step / (width // 2))
                numbers += [math.sin(angle / frequency), math.cos(angle / frequency)]
        rows.append(numbers)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("needs_pos", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_queries_are_made_of_the_code_of_their_boxes(needs_pos: bool, features: bool) -> None:
    torch.manual_seed(0)
    embedding = PositiveEmbedding(8, needs_pos, features, "vector", 2).double()
    positives = some_positives()
    queries = embedding(positives, 4)
    projected = embedding.box_norm(embedding.box_proj(code_of(positives.boxes[1], 8)))
    pos, content = (projected[:, :8], projected[:, 8:]) if needs_pos else (None, projected)
    if features:
        assert embedding.feature_norm is not None and embedding.feature_proj is not None
        content = content + embedding.feature_norm(embedding.feature_proj(positives.features[1]))
    torch.testing.assert_close(queries.content[1], content)
    if pos is None:
        assert queries.pos is None and embedding.code is None
    else:
        assert queries.pos is not None
        torch.testing.assert_close(queries.pos[1], pos if embedding.code is None else pos + embedding.code)
        assert (embedding.code is not None) == features
    assert torch.equal(queries.reference_points, positives.boxes)


def test_references_have_as_many_numbers_as_the_decoder_wants() -> None:
    embedding, positives = PositiveEmbedding(8, True, False, "vector", 1).double(), some_positives()
    assert torch.equal(embedding(positives, 2).reference_points, positives.boxes[..., :2])
    assert embedding(positives, None).reference_points is None


def test_the_official_weights_have_a_number_for_each_head() -> None:
    """The same for all channels; the paper's form is a vector."""
    torch.manual_seed(0)
    scalar = PositiveEmbedding(8, True, True, "scalar", 2)
    assert scalar.code is not None and scalar.code.shape == (1,) and scalar.code.abs() <= math.sqrt(2)
    vector = PositiveEmbedding(8, True, True, "vector", 2)
    assert vector.code is not None and vector.code.shape == (8,) and vector.code.abs().max() <= math.sqrt(6 / 10)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("collaboration.num_groups=5", "num_groups=5 does not divide embed_dim=32"),
        ("criterion.groups.auxiliary.lambda_1=-1", "lambda_1=-1"),
        ("collaboration.least=400", "positives.least=400"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, words: str) -> None:
    cfg = composed("family=deformable_detr", "auxiliary=atss", override)
    with pytest.raises(Exception, match=words):
        build_criterion(cfg)
        build_detector(cfg, CLASSES)
