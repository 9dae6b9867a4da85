"""Properties of whole detectors, small ones of all families and of every way to make queries."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from detfamily.blocks.denoising import Draws
from detfamily.build import build_criterion, build_detector, build_postprocess
from detfamily.config import compose
from detfamily.detector import Detector
from detfamily.structures import Given, Images, Predictions, Queries, Size, Targets

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
    "deformable, local and axial encoder": ("family=deformable_detr", "encoder_attention=[neighborhood_dilated,axial]"),
    "refined": ("family=deformable_detr", "decoder=refine"),
    "refined, looking forward": ("family=deformable_detr", "decoder=refine", "decoder.look_forward=true"),
    "two-stage": ("family=deformable_detr", "decoder=refine", "query_source=proposals"),
    "conditional": ("family=conditional_detr",),
    "dab": ("family=dab_detr",),
    "dab, patterns": ("family=dab_detr", "model.num_patterns=2"),
    "dab, points": ("family=dab_detr", "model.anchor_dim=2", "query_position.modulate_wh=false"),
    "dab-deformable": ("family=dab_deformable_detr",),
    "dab-deformable, levels apart": (
        *("family=dab_deformable_detr", "cross_attention=conditional_levels", "query_source=anchors"),
        *("self_attention=split_dense", "model.num_patterns=2"),
    ),
    "two-stage, mixed": ("family=deformable_detr", "decoder=refine", "query_source=proposals_mixed"),
    "dino": ("family=dino", "denoising=none"),
    "dino, own content, the decoder's heads": (
        *("family=dino", "denoising=none", "query_source.content=memory", "query_source.learn_size=true"),
        *("query_source.class_head=null", "query_source.box_head=null"),
    ),
    "dino, heads apart": ("family=dino", "denoising=none", "decoder=refine", "decoder.look_forward=true"),
    "many, two-stage": ("family=h_deformable_detr",),
    "many, detr": ("family=detr", "one_to_many=hybrid"),
    "many, dab-deformable": ("family=dab_deformable_detr", "one_to_many=hybrid"),
    "many, dino": ("family=dino", "denoising=none", "one_to_many=hybrid"),
}
DENOISED = {
    "dn detr": ("family=detr", "denoising=dn"),
    "dn conditional": ("family=conditional_detr", "denoising=dn"),
    "dn dab": ("family=dab_detr", "denoising=dn"),
    "dn dab, patterns": ("family=dab_detr", "denoising=dn", "model.num_patterns=2"),
    "dn deformable": ("family=deformable_detr", "denoising=dn"),
    "dn two-stage": ("family=deformable_detr", "decoder=refine", "query_source=proposals", "denoising=dn"),
    "dn dab-deformable": ("family=dab_deformable_detr", "denoising=dn"),
    "dn many, deformable": ("family=deformable_detr", "denoising=dn", "one_to_many=hybrid"),
    "dn dino": ("family=dino", "denoising=dn"),
    "cdn detr": ("family=detr", "denoising=cdn"),
    "cdn dab, patterns": ("family=dab_detr", "denoising=cdn", "model.num_patterns=2"),
    "cdn dino": ("family=dino",),
    "cdn dino, near copies only": ("family=dino", "denoising.contrastive=false"),
    "cdn many, two-stage": ("family=h_deformable_detr", "denoising=cdn"),
}
LEARNED = [kind for kind in KINDS if "two-stage" not in kind and "dino" not in kind]
MANY = [kind for kind in KINDS if "many" in kind]
CLASSES = 3
GROUPS = 5
ONE_TO_MANY = 5


def columns_of(kind: str) -> int:
    return CLASSES + (kind in ("detr", "detr, pre-norm, learned positions", "many, detr", "dn detr", "cdn detr"))


def rounds_of(kind: str) -> int:
    """Copies of an object in a group: near and far."""
    return 2 if kind.startswith("cdn") and "near copies only" not in kind else 1


def groups_of(kind: str) -> set[str]:
    """What is predicted in evaluation."""
    return {"match", "proposals"} if "two-stage" in kind or "dino" in kind else {"match"}


def patterns_of(kind: str) -> int:
    return 2 if "patterns" in kind or "levels apart" in kind else 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size spend more time on waking threads than on their numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def composed(kind: str) -> DictConfig:
    groups = [f"denoising.num_groups={GROUPS}"] if kind in DENOISED else []
    return compose("train", [*(KINDS | DENOISED)[kind], *TINY, *groups, f"model.num_one_to_many={ONE_TO_MANY}"])


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


@pytest.mark.parametrize("kind", KINDS | DENOISED)
def test_shapes_of_all_layers(kind: str) -> None:
    detector, images = detector_of(kind), batch()
    said = detector(images)
    columns, queries = columns_of(kind), 6 * patterns_of(kind)
    assert said["match"].logits.shape == (3, 2, queries, columns)
    assert said["match"].boxes.shape == (3, 2, queries, 4)
    assert ((said["match"].boxes > 0) & (said["match"].boxes < 1)).all()
    assert set(said) == groups_of(kind)
    if "proposals" in said:  # all of 1/8, 1/16, 1/32 and 1/64 of the side, or those that became queries
        tokens = 6 if "dino" in kind else 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
        assert said["proposals"].logits.shape == (1, 2, tokens, columns)
        assert said["proposals"].boxes.shape == (1, 2, tokens, 4)
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
    moved = 0
    with torch.no_grad():
        before = detector(images)["match"]
        for name, parameter in detector.query_source.named_parameters():
            if name in ("pos", "content", "reference.center_logit", "reference.size_logit"):
                parameter[:6] = parameter[order].clone()  # there may be more, in training
                moved += 1
        after = detector(images)["match"]
    assert moved
    everywhere = torch.cat([order + 6 * pattern for pattern in range(patterns_of(kind))])
    expected = Predictions(before.logits[:, :, everywhere], before.boxes[:, :, everywhere])
    assert_same({"": after}, {"": expected}, atol=1e-4)
    assert not torch.allclose(after.logits, before.logits, atol=1e-3)


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


def starts_from_zero_content(detector: Detector, kind: str) -> bool:
    return not detector.query_source.has_content and detector.denoising is None and patterns_of(kind) == 1


@pytest.mark.parametrize("kind", KINDS | DENOISED)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    """With exceptions where there is nothing to learn.

    From zero content a norm has nothing to scale, and a projection nothing to multiply; what is added to all keys alike
    changes no softmax; and where all that is read is equal, it does not matter where queries look. Rounding may leave
    these last ones something.
    """
    detector = detector_of(kind).train()
    build_criterion(composed(kind))(detector(batch(), targets()), targets()).total.backward()
    bad = {name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not bad
    unmoved = {name for name, p in detector.named_parameters() if p.grad is not None and not p.grad.any()}
    first, zero = "decoder.layers.0.self_attention", set()
    if starts_from_zero_content(detector, kind):
        names = [f"{first}_residual.norm.weight"] if "pre-norm" in kind else []
        names += [f"{first}.{name}_proj.weight" for name in ("query_content", "key_content", "value")]
        zero = {name for name, _ in detector.named_parameters()} & set(names)
    assert zero <= unmoved
    rounding = {name for name in unmoved - zero if "key_" in name or name.startswith(f"{first}.query_")}
    assert unmoved == zero | rounding


@pytest.mark.parametrize("kind", KINDS | DENOISED)
def test_bfloat16_autocast_trains_with_finite_numbers(kind: str) -> None:
    detector = detector_of(kind).train()
    criterion = build_criterion(composed(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = detector(batch(), targets())
    assert {one.logits.dtype for one in said.values()} == {one.boxes.dtype for one in said.values()} == {torch.float32}
    losses = criterion(said, targets())
    losses.total.backward()
    assert losses.total.isfinite() and all(part.isfinite() for part in losses.parts.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if groups_of(kind) == {"match"}:  # rounding may choose other proposals
        with torch.no_grad():
            exact = detector(batch(), targets())["match"]
        torch.testing.assert_close(said["match"].boxes, exact.boxes, rtol=0, atol=0.1)


def crowd(*counts: int) -> Targets:
    generator = torch.Generator().manual_seed(3)
    labels = [torch.randint(0, CLASSES, (count,), generator=generator) for count in counts]
    return Targets.from_lists(labels, [0.2 + 0.5 * torch.rand(count, 4, generator=generator) for count in counts])


def trained(kind: str) -> Detector:
    """In training, with noise that is the same each time, and a backbone that does as in evaluation."""
    detector = detector_of(kind).train()
    detector.backbone.eval()
    assert detector.denoising is not None
    detector.denoising.draws = Draws(torch.Generator().manual_seed(5))
    return detector


@pytest.mark.parametrize("kind", DENOISED)
def test_copies_are_a_group_in_training_only(kind: str) -> None:
    detector, images, objects = trained(kind), batch(), crowd(3, 1)
    said = detector(images, objects)
    assert set(said) == groups_of(kind) | {"denoise"} | ({"one_to_many"} if "many" in kind else set())
    copies, slots = said["denoise"], GROUPS * rounds_of(kind) * 3
    assert copies.given is not None and copies.given.copies == GROUPS
    assert copies.logits.shape == (3, 2, slots, columns_of(kind)) and copies.boxes.shape == (3, 2, slots, 4)
    assert said["match"].given is None and said["match"].logits.shape[2] == 6 * patterns_of(kind)
    assert copies.given.matched.sum(1).tolist() == [GROUPS * 3, GROUPS]
    assert bool(copies.given.counted.all()) == (rounds_of(kind) == 2)  # contrastive: unused slots, too
    detector.eval()
    with torch.no_grad():
        without, with_targets = detector(images), detector(images, objects)
    assert set(without) == groups_of(kind)
    assert_same(with_targets, without)


@pytest.mark.parametrize("kind", MANY)
def test_more_queries_in_training_do_not_change_what_the_others_say(kind: str) -> None:
    """They are a group of their own, and it is as in evaluation."""
    detector, images = detector_of(kind).train(), batch()
    detector.backbone.eval()
    with torch.no_grad():
        training = detector(images, targets())
        more = training.pop("one_to_many")
        assert more.given is None and more.logits.shape == (3, 2, ONE_TO_MANY, columns_of(kind))
        assert more.boxes.shape == (3, 2, ONE_TO_MANY, 4) and ((more.boxes > 0) & (more.boxes < 1)).all()
        assert_same(training, detector.eval()(images), atol=2e-5)


@pytest.mark.parametrize("kind", MANY)
def test_groups_of_queries_do_not_learn_from_each_other(kind: str) -> None:
    detector = detector_of(kind).train()
    leaves: list[Tensor] = []

    def cut(module: torch.nn.Module, inputs: object, output: tuple[Queries, object]) -> tuple[Queries, object]:
        leaves.append(output[0].content.detach().requires_grad_())
        return replace(output[0], content=leaves[0]), output[1]

    detector.query_source.register_forward_hook(cut)
    said = detector(batch(), targets())
    for name, own in (("match", slice(0, 6)), ("one_to_many", slice(6, 6 + ONE_TO_MANY))):
        wanted = said[name].logits.sum() + said[name].boxes.sum()
        (gradient,) = torch.autograd.grad(wanted, leaves[0], retain_graph=True)
        assert gradient[:, own].any(-1).all()
        assert torch.equal(gradient.any(-1)[0].nonzero().flatten(), torch.arange(6 + ONE_TO_MANY)[own])


@pytest.mark.parametrize("kind", MANY)
def test_several_queries_answer_for_each_object(kind: str) -> None:
    """As many as are asked for: 2 objects, 2 times; the 5 queries are not enough for 6 times."""
    detector, criterion = detector_of(kind).train(), build_criterion(composed(kind))
    said = detector(batch(), targets())
    for repeats, answers in ((6, 5), (2, 4)):
        criterion.groups["one_to_many"].repeats = repeats
        losses = criterion(said, targets())
        assert losses.assignments["match"].matched.sum((1, 2)).tolist() == [2, 2, 2]
        assert losses.assignments["one_to_many"].matched.sum((1, 2)).tolist() == [answers] * 3
        assert {name.split("/")[0] for name in losses.parts} == groups_of(kind) | {"one_to_many"}


def test_the_decoders_heads_learn_from_proposals() -> None:
    """Where these have none of their own."""
    for kind, learns in (("dino", False), ("dino, own content, the decoder's heads", True)):
        detector = detector_of(kind).train()
        said = detector(batch())["proposals"]
        (said.logits.sum() + said.boxes.sum()).backward()
        for heads in (detector.heads.class_heads, detector.heads.box_heads):
            assert any(one.grad is not None and one.grad.any() for one in heads.parameters()) == learns


def test_copies_without_a_group_of_their_own_join_the_matching() -> None:
    """Answers in hand: official training without denoising, as it is."""
    detector, objects, criterion = trained("cdn dino"), crowd(3, 1), build_criterion(composed("cdn dino"))
    assert detector.denoising is not None
    detector.denoising.own_group = False
    said = detector(batch(), objects)
    assert set(said) == {"match", "proposals"} and said["match"].given is None
    assert said["match"].logits.shape[2] == GROUPS * 2 * 3 + 6
    losses = criterion(said, objects)
    assert losses.total.isfinite() and losses.assignments["match"].matched.sum((1, 2)).tolist() == [4] * 3
    with torch.no_grad():
        evaluated = detector.eval()(batch(), objects)
    assert evaluated["match"].logits.shape[2] == 6


@pytest.mark.parametrize("kind", DENOISED)
def test_training_needs_the_targets(kind: str) -> None:
    with pytest.raises(ValueError, match=r"denoising needs the targets in training: detector\(images, targets\)"):
        trained(kind)(batch())


@pytest.mark.parametrize("kind", DENOISED)
def test_copies_do_not_change_what_the_other_queries_say(kind: str) -> None:
    """Whatever they are, and how many; and it is as in evaluation."""
    detector, images = trained(kind), batch()
    with torch.no_grad():
        few, many, none = (detector(images, crowd(*counts)) for counts in ((1, 2), (5, 0), (0, 0)))
        others = few.get("one_to_many", few["match"])
        alone = detector.eval()(images)
    for said in (few, many, none):
        said.pop("denoise")
        if "many" in kind:
            assert_same({"": said.pop("one_to_many")}, {"": others}, atol=2e-5)
        assert_same(said, alone, atol=2e-5)


@pytest.mark.parametrize("kind", ["dn detr", "dn dab", "dn deformable", "cdn dino", "cdn many, two-stage"])
def test_without_the_mask_answers_leak(kind: str) -> None:
    detector, images = trained(kind), batch()
    assert detector.denoising is not None
    detector.denoising.attention_mask = False
    with torch.no_grad():
        one, two = detector(images, crowd(1, 2)), detector(images, crowd(5, 0))
    assert not torch.allclose(one["match"].logits, two["match"].logits, atol=1e-3)


@pytest.mark.parametrize("kind", DENOISED)
def test_who_learns_from_whom(kind: str) -> None:
    """A copy's answers depend on its own group and on the queries that are no copies, those on no copy."""
    detector, objects = trained(kind), crowd(2, 2)
    leaves: list[Tensor] = []
    assert detector.denoising is not None

    def cut(module: torch.nn.Module, inputs: object, output: tuple[Queries, Given]) -> tuple[Queries, Given]:
        leaves.append(output[0].content.detach().requires_grad_())
        return replace(output[0], content=leaves[0]), output[1]

    detector.denoising.register_forward_hook(cut)
    said = detector(batch(), objects)
    per_group = 2 * rounds_of(kind)
    parts = {f"group {group}": slice(per_group * group, per_group * (group + 1)) for group in range(GROUPS)}
    start, queries = per_group * GROUPS, 6 * patterns_of(kind)
    parts["match"] = slice(start, start + queries)
    if "many" in kind:
        parts["one_to_many"] = slice(start + queries, None)
    for name, part in parts.items():
        answers = said.get(name, said["denoise"])
        own = slice(None) if name in said else part
        wanted = answers.logits[:, :, own].sum() + answers.boxes[:, :, own].sum()
        (gradient,) = torch.autograd.grad(wanted, leaves[0], retain_graph=True)
        seen = {name} if name in said else {name, "match", "one_to_many"}
        for other, there in parts.items():
            assert bool(gradient[:, there].any()) == (other in seen), (name, other)


@pytest.mark.parametrize("kind", DENOISED)
def test_a_batch_without_objects_trains(kind: str) -> None:
    """All processes wait for all gradients: that of the labels is zero, but not missing."""
    detector, nothing = trained(kind), crowd(0, 0)
    said = detector(batch(), nothing)
    assert said["denoise"].logits.shape[2] == 0
    losses = build_criterion(composed(kind))(said, nothing)
    losses.total.backward()
    assert losses.total.isfinite() and not any(part for name, part in losses.parts.items() if "denoise" in name)
    assert not {name for name, parameter in detector.named_parameters() if parameter.grad is None}
    assert detector.denoising is not None
    gradient = detector.denoising.label_embed.weight.grad
    assert gradient is not None and not gradient[:CLASSES].any()
    assert bool(gradient[CLASSES].any()) == detector.denoising.fills_content


@pytest.mark.parametrize("kind", DENOISED)
def test_what_lies_in_the_padding_changes_no_copies(kind: str) -> None:
    images, objects = batch(), crowd(3, 2)
    garbage = torch.randint(0, 256, images.pixels.shape, dtype=torch.uint8)
    spoiled = replace(images, pixels=torch.where(images.padding_mask[:, None], garbage, images.pixels))
    with torch.no_grad():
        assert_same(trained(kind)(spoiled, objects), trained(kind)(images, objects))


@pytest.mark.parametrize("kind", ["dn detr", "dn dab", "dn deformable", "cdn detr", "cdn dino"])
def test_a_crowded_image_costs_no_more_than_allowed(kind: str) -> None:
    detector, objects = trained(kind), crowd(300, 2)
    assert detector.denoising is not None
    detector.denoising.max_queries = 20
    said = detector(batch(), objects)
    assert said["denoise"].logits.shape[2] == 20 and said["denoise"].given.copies == 1
    losses = build_criterion(composed(kind))(said, objects)
    losses.total.backward()
    assert losses.total.isfinite()
    given = said["denoise"].given
    distances = [
        float((said["denoise"].boxes[2, image, slot] - given.targets.boxes[image, slot]).detach().abs().sum())
        for image, slot in given.matched.nonzero().tolist()
    ]
    near = 20 // rounds_of(kind) + 2
    assert len(distances) == near
    assert float(losses.parts["denoise/2/l1"]) == pytest.approx(sum(distances) / near, rel=1e-4)


@pytest.mark.parametrize("look_forward", [False, True])
def test_boxes_reach_the_heads_of_the_layer_before_only_looking_forward(look_forward: bool) -> None:
    """The loss of each layer's boxes, in a whole detector."""
    kind = "refined, looking forward" if look_forward else "refined"
    detector, criterion = detector_of(kind).train(), build_criterion(composed(kind))
    said = detector(batch())["match"]
    for layer in range(3):
        detector.zero_grad()
        here = Predictions(said.logits[layer : layer + 1].detach(), said.boxes[layer : layer + 1])
        criterion({"match": here}, targets()).total.backward(retain_graph=True)
        reached = {
            index
            for index, head in enumerate(detector.heads.box_heads)
            if any(p.grad is not None and p.grad.any() for p in head.parameters())
        }
        assert reached == ({layer, layer - 1} - {-1} if look_forward else {layer})


def test_shared_heads_learn_from_the_layer_after_only_looking_forward() -> None:
    """DAB-DETR: the second layer's boxes move the first layer's, whose content the decoder's norm has not seen."""
    gradients = []
    for look_forward in (True, False):
        detector = detector_of("dab")
        detector.decoder.look_forward = look_forward
        seen: list[Tensor] = []
        detector.decoder.layers[0].register_forward_hook(lambda m, i, output, seen=seen: seen.append(output))
        boxes = detector(batch())["match"].boxes
        (gradient,) = torch.autograd.grad(boxes[1].sum(), seen[0])
        gradients.append(gradient)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.05)


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
