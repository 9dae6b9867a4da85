"""Properties of whole detectors, small ones of both families and of every way to make queries."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from detfamily.build import build_criterion, build_detector, build_postprocess
from detfamily.config import compose
from detfamily.detector import Detector
from detfamily.structures import Images, Predictions, Size, Targets

TINY = (
    *("backbone=small", "backbone.stem_width=4", "backbone.widths=[8,8,8,8]"),
    *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=24", "model.num_queries=6", "model.dropout=0"),
    *("encoder.num_layers=2", "decoder.num_layers=3"),
)
KINDS = {
    "detr": ("family=detr",),
    "detr, pre-norm, learned positions": ("family=detr", "residual=pre_norm", "position=learned"),
    "deformable": ("family=deformable_detr",),
    "deformable, own levels, BiFPN": ("family=deformable_detr", "encoder_attention=ms_deform_own_level", "neck=bifpn"),
    "refined": ("family=deformable_detr", "decoder=refine"),
    "two-stage": ("family=deformable_detr", "decoder=refine", "query_source=proposals"),
}
LEARNED = [kind for kind in KINDS if kind != "two-stage"]
CLASSES = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size spend more time on waking threads than on their numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def composed(kind: str) -> DictConfig:
    return compose("train", [*KINDS[kind], *TINY])


@cache
def built(kind: str) -> Detector:
    """A detector away from its start, where boxes and offsets would not depend on the content."""
    torch.manual_seed(0)
    detector = build_detector(composed(kind), CLASSES)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return detector.eval()


def detector_of(kind: str) -> Detector:
    return deepcopy(built(kind))


def batch(sizes: tuple[Size, ...] = ((64, 96), (56, 64)), whole: Size = (64, 96)) -> Images:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(len(sizes), *whole, dtype=torch.bool)
    pixels = torch.zeros(len(sizes), 3, *whole, dtype=torch.uint8)
    for index, (h, w) in enumerate(sizes):
        mask[index, :h, :w] = False
        pixels[index, :, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    return Images(pixels, mask, sizes, sizes, tuple(range(len(sizes))))


def targets() -> Targets:
    boxes = [torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.4, 0.2]]), torch.zeros(0, 4)]
    return Targets.from_lists([torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64)], boxes)


def assert_same(a: dict[str, Predictions], b: dict[str, Predictions], atol: float = 0.0) -> None:
    assert set(a) == set(b)
    for group in a:
        torch.testing.assert_close(a[group].logits, b[group].logits, rtol=0, atol=atol)
        torch.testing.assert_close(a[group].boxes, b[group].boxes, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_all_layers(kind: str) -> None:
    detector, images = detector_of(kind), batch()
    said = detector(images)
    columns = CLASSES + ("detr" in kind)
    assert said["match"].logits.shape == (3, 2, 6, columns) and said["match"].boxes.shape == (3, 2, 6, 4)
    assert ((said["match"].boxes > 0) & (said["match"].boxes < 1)).all()
    assert set(said) == ({"match", "proposals"} if kind == "two-stage" else {"match"})
    if kind == "two-stage":  # of 1/8, 1/16, 1/32 and 1/64 of the side
        assert said["proposals"].logits.shape == (1, 2, 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2, columns)
    found = build_postprocess(composed(kind))(said, images)
    assert len(found) == 2 and all(one.boxes_xyxy.shape == (len(one.scores), 4) for one in found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_the_padding_of_images_changes_nothing(kind: str) -> None:
    detector, images = detector_of(kind), batch()
    garbage = torch.randint(0, 256, images.pixels.shape, dtype=torch.uint8)
    spoiled = replace(images, pixels=torch.where(images.padding_mask[:, None], garbage, images.pixels))
    assert not torch.equal(spoiled.pixels, images.pixels)
    with torch.no_grad():
        assert_same(detector(spoiled), detector(images))


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_the_padding_of_maps_reaches_no_image(kind: str) -> None:
    """The neck's convolutions and norms see padding, as officially; nothing behind them does."""
    detector, images = detector_of(kind), batch()
    maps: list[Tensor] = []

    def spoil(module: torch.nn.Module, inputs: object, levels: list[Tensor]) -> list[Tensor]:
        for level in levels:
            h, w = level.shape[-2:]
            rows = torch.arange(h) * 64 // h
            columns = torch.arange(w) * 96 // w
            padding = images.padding_mask[:, rows][:, :, columns]
            maps.append(torch.where(padding[:, None], 1e3 * torch.randn_like(level), level))
        return maps[-len(levels) :]

    with torch.no_grad():
        before = detector(images)
        detector.neck.register_forward_hook(spoil)
        after = detector(images)
    assert_same({"match": after["match"]}, {"match": before["match"]}, atol=1e-6)


@pytest.mark.parametrize("kind", LEARNED)
def test_permuted_queries_permute_predictions(kind: str) -> None:
    detector, images = detector_of(kind), batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        before = detector(images)["match"]
        for name in ("pos", "content"):
            parameter = getattr(detector.query_source, name)
            if parameter is not None:
                parameter.copy_(parameter[order].clone())
        after = detector(images)["match"]
    assert_same({"": after}, {"": Predictions(before.logits[:, :, order], before.boxes[:, :, order])}, atol=1e-5)
    assert not torch.allclose(after.logits, before.logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_equal_images_are_one_image_twice(kind: str) -> None:
    detector = detector_of(kind)
    one = batch(((64, 80),), (64, 96))
    two = Images(one.pixels.repeat(2, 1, 1, 1), one.padding_mask.repeat(2, 1, 1), one.sizes * 2, one.sizes * 2, (0, 1))
    with torch.no_grad():
        alone, together = detector(one), detector(two)
    for image in range(2):
        for group, said in together.items():
            now = Predictions(said.logits[:, image : image + 1], said.boxes[:, image : image + 1])
            assert_same({"": now}, {"": alone[group]}, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unpadded_image_is_one_with_an_empty_mask(kind: str) -> None:
    """The way without a mask is a short cut, and no other way."""
    detector, images = detector_of(kind), batch(((64, 96),))
    claimed = replace(images, sizes=((64, 95),))  # makes the detector look at the mask, which hides nothing
    assert claimed.padded and not images.padded
    with torch.no_grad():
        assert_same(detector(claimed), detector(images), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_uint8_and_normalised_pixels_agree(kind: str) -> None:
    detector, images = detector_of(kind), batch()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = ((images.pixels.float() / 255 - mean) / std).masked_fill(images.padding_mask[:, None], 0.0)
    with torch.no_grad():
        assert_same(detector(replace(images, pixels=pixels)), detector(images), atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    """With one exception: before the zero content that DETR starts from, a norm has nothing to scale."""
    detector = detector_of(kind).train()
    build_criterion(composed(kind))(detector(batch()), targets()).total.backward()
    bad = {name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not bad
    unmoved = {name for name, p in detector.named_parameters() if p.grad is not None and not p.grad.any()}
    assert unmoved == ({"decoder.layers.0.self_attention_residual.norm.weight"} if "pre-norm" in kind else set())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_trains_with_finite_numbers(kind: str) -> None:
    detector = detector_of(kind).train()
    criterion = build_criterion(composed(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = detector(batch())
    assert {one.logits.dtype for one in said.values()} == {one.boxes.dtype for one in said.values()} == {torch.float32}
    losses = criterion(said, targets())
    losses.total.backward()
    assert losses.total.isfinite() and all(part.isfinite() for part in losses.parts.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if kind in LEARNED:  # rounding may choose other proposals
        with torch.no_grad():
            exact = detector(batch())["match"]
        torch.testing.assert_close(said["match"].boxes, exact.boxes, rtol=0, atol=0.1)


def test_detr_starts_as_officially() -> None:
    """Xavier in the transformer; PyTorch's own start in the projection, the heads and the biases of linear layers."""
    torch.manual_seed(0)
    cfg = compose("train", ["family=detr", "backbone=small", "encoder.num_layers=1", "decoder.num_layers=1"])
    detector = build_detector(cfg, 91)
    for name, parameter in detector.named_parameters():
        if name.startswith("backbone") or "norm" in name:
            continue
        largest, inputs = float(parameter.detach().abs().max()), parameter[0].numel()
        attention = "attention" in name
        if name == "query_source.pos":
            assert abs(float(parameter.detach().std()) - 1) < 0.02
        elif attention and name.endswith("bias"):
            assert largest == 0, name
        elif name.endswith("weight"):
            xavier = name.startswith(("encoder", "decoder"))
            bound = (6 / (inputs + len(parameter))) ** 0.5 if xavier else inputs**-0.5
            assert 0.99 * bound < largest <= bound, name
        else:
            fan_in = detector.get_submodule(name.rpartition(".")[0]).weight[0].numel()  # type: ignore[index, union-attr]
            assert 0.5 * fan_in**-0.5 < largest <= fan_in**-0.5, name


def test_settings_of_one_query_position_and_memory() -> None:
    """Positions at the input only: the decoder reads what the encoder was given, and adds nothing."""
    cfg = compose("train", ["family=detr", *TINY, "encoder_position=at_input", "memory_position=none"])
    torch.manual_seed(0)
    detector = build_detector(cfg, CLASSES).eval()
    assert detector.encode(batch()).pos is None
    cfg = compose("train", ["family=detr", *TINY, "encoder_position=none", "memory_position=at_attention"])
    memory = build_detector(cfg, CLASSES).eval().encode(batch())
    assert memory.pos is not None and memory.pos.shape == memory.content.shape
