"""DINO's noise: near and far copies of the objects, whose corners move."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detfamily.blocks.denoising import CornerDenoising, Draws
from detfamily.criterion import Normalizer
from detfamily.criterion.losses import FocalClassLoss, GIoULoss, L1Loss
from detfamily.criterion.matcher import Assignment
from detfamily.criterion.rules import Known
from detfamily.structures import Queries, Targets

from .conftest import (
    CLASSES,
    EPS,
    OTHERS,
    WIDTH,
    Listed,
    Operations,
    many,
    naive_focal,
    naive_hidden,
    object_queries,
    objects,
    said_of,
)


def denoising(**changes: Any) -> CornerDenoising:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_classes": CLASSES,
        "embed_dim": WIDTH,
        "num_queries": 20,
        "label_noise": 0.3,
        "corner_noise": 0.4,
        "eps": EPS,
        "fills_content": False,
        "needs_pos": False,
        "reference_dim": 4,
        **changes,
    }
    return CornerDenoising(**arguments)


@dataclass(frozen=True)
class NaiveCopy:
    """One copy of one object: where it stands, and what became of it; boxes in float64."""

    image: int
    object: int
    slot: int
    near: bool
    label: int
    box: list[float]


def naive_places(counts: Sequence[int], groups: int, contrastive: bool) -> Iterator[tuple[int, int, int, bool]]:
    """(image, object, slot, near) in the official order: group by group, near before far, image by image."""
    slot = 0
    for _ in range(groups):
        for near in (True, False) if contrastive else (True,):
            for image, count in enumerate(counts):
                for t in range(count):
                    yield image, t, slot + t, near
            slot += max(counts)


def naive_copies(
    targets: Targets, groups: int, contrastive: bool, noise: tuple[float, float], draws: Sequence[Any]
) -> list[NaiveCopy]:
    """A copy at a time: all labels first, then all corners."""
    chances, new_labels, signs, parts = (iter(one.tolist()) for one in draws)
    places = list(naive_places(targets.counts, groups, contrastive))
    labels = [
        next(new_labels) if next(chances) < noise[0] else int(targets.labels[image, t]) for image, t, _, _ in places
    ]
    copies = []
    for label, (image, t, slot, near) in zip(labels, places, strict=True):
        cx, cy, w, h = targets.boxes[image, t].tolist()
        corners = []
        for at, half, sign, part in zip(
            (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2),
            (w / 2, h / 2, w / 2, h / 2),
            next(signs),
            next(parts),
            strict=True,
        ):
            step = (part if near else part + 1) * half * noise[1]
            corners.append(min(max(at + step if sign else at - step, 0.0), 1.0))
        left, top, right, bottom = corners
        box = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        copies.append(NaiveCopy(image, t, slot, near, label, box))
    return copies


def random_draws(places: int, label_noise: float) -> tuple[Any, Any, Any, Any]:
    """Chances, labels, signs, parts."""
    rng = np.random.default_rng(places)
    chances = rng.random(places, np.float32)
    labels = rng.integers(0, CLASSES, int((chances < label_noise).sum()))
    return chances, labels, rng.integers(0, 2, (places, 4)), rng.random((places, 4), np.float32)


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize(("groups", "corner_noise"), [(1, 0.4), (3, 1.0), (2, 1.7)])
@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [4], [2, 0, 5, 3]])
def test_copies_as_a_naive_loop(counts: list[int], groups: int, corner_noise: float, contrastive: bool) -> None:
    per_group = max(counts) * (2 if contrastive else 1)
    total = groups * per_group
    places = list(naive_places(counts, groups, contrastive))
    chances, labels, signs, parts = draws = random_draws(len(places), 0.3)
    ours = denoising(num_groups=groups, corner_noise=corner_noise, contrastive=contrastive)
    listed = Listed(*(torch.from_numpy(one) for one in (chances, labels, parts, signs)))
    ours.draws = cast("Draws", listed)
    queries, targets = object_queries(len(counts)), objects(counts)
    mixed, known = ours(queries, targets)
    assert listed.asked == ["chances", "labels", "signs", "boxes"]
    assert known is not None and known.copies == groups and known.limit == (500 if contrastive else 1000)
    assert mixed.groups == {"denoise": slice(0, total), "match": slice(total, total + OTHERS)}
    assert mixed.attention_mask is not None and mixed.reference_points is not None
    assert torch.equal(mixed.attention_mask, naive_hidden(groups, per_group, OTHERS))
    assert torch.equal(mixed.content[:, total:], queries.content)
    assert queries.reference_points is not None
    assert torch.equal(mixed.reference_points[:, total:], queries.reference_points)
    raw = ours.noise(targets, groups)
    used, near = torch.zeros(2, len(counts), total, dtype=torch.bool)
    for copy in naive_copies(targets, groups, contrastive, (0.3, corner_noise), draws):
        place = (copy.image, copy.slot)
        used[place], near[place] = True, copy.near
        assert int(raw.labels[place]) == copy.label
        torch.testing.assert_close(raw.boxes[place].double(), torch.tensor(copy.box).double(), rtol=0, atol=1e-6)
        assert torch.equal(mixed.content[place], ours.label_embed.weight[copy.label])
        clamped = torch.tensor(copy.box, dtype=torch.float64).clamp(EPS, 1 - EPS)
        torch.testing.assert_close(mixed.reference_points[place].double(), clamped, rtol=0, atol=1e-6)
        if copy.near:
            assert int(known.targets.labels[place]) == int(targets.labels[copy.image, copy.object])
            assert torch.equal(known.targets.boxes[place], targets.boxes[copy.image, copy.object])
    assert torch.equal(raw.valid, used) and torch.equal(known.matched, near)
    assert torch.equal(known.counted, torch.ones_like(used) if contrastive else used)
    assert not mixed.content[:, :total][~used].any()
    assert (mixed.reference_points[:, :total][~used] == 0.5).all()


def test_corners_may_pass_each_other() -> None:
    """Officially, too: a far copy's sides may come out negative; references keep them at eps."""
    ours, targets = denoising(num_groups=1, label_noise=0.0, corner_noise=1.0), many(1)
    inwards = torch.tensor([[1, 1, 0, 0]] * 2)
    nothing = torch.zeros(0)
    ours.draws = cast("Draws", Listed(nothing, nothing, torch.full((2, 4), 0.5), inwards))
    near, far = ours.noise(targets, 1).boxes[0]
    torch.testing.assert_close(near, torch.tensor([0.5, 0.4, 0.1, 0.15]))
    torch.testing.assert_close(far, torch.tensor([0.5, 0.4, -0.1, -0.15]))
    references = ours(object_queries(1), targets)[0].reference_points
    assert references is not None
    torch.testing.assert_close(references[0, 1], torch.tensor([0.5, 0.4, EPS, EPS]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_layout_and_reach_of_the_noise(counts: list[int], num_queries: int, contrastive: bool, seed: int) -> None:
    ours, targets = denoising(num_queries=num_queries, contrastive=contrastive), objects(counts, seed)
    ours.draws = Draws(torch.Generator().manual_seed(seed))
    mixed, known = ours(object_queries(len(counts)), targets)
    rounds, most = 2 if contrastive else 1, max(counts)
    groups = max(1, num_queries // (rounds * most)) if most else 1
    assert known is not None and known.copies == groups and mixed.attention_mask is not None
    assert torch.equal(mixed.attention_mask, naive_hidden(groups, rounds * most, OTHERS))
    copies = ours.noise(targets, groups)
    real = torch.zeros(copies.valid.shape, dtype=torch.bool)
    for image, t, slot, near in naive_places(counts, groups, contrastive):
        place = (image, slot)
        real[place] = True
        assert bool(known.matched[place]) == near and 0 <= int(copies.labels[place]) < CLASSES
        cx, cy, w, h = targets.boxes[image, t].tolist()
        x, y, width, height = copies.boxes[place].tolist()
        for before, now, half in (
            (cx - w / 2, x - width / 2, w / 2),
            (cy - h / 2, y - height / 2, h / 2),
            (cx + w / 2, x + width / 2, w / 2),
            (cy + h / 2, y + height / 2, h / 2),
        ):
            moved = abs(now - before) / half
            assert -1e-6 <= now <= 1 + 1e-6
            if 1e-5 < now < 1 - 1e-5:  # not at the image's border
                least, end = (0.0, 0.4) if near else (0.4, 0.8)
                assert least - 1e-3 <= moved <= end + 1e-3
    assert torch.equal(copies.valid, real) and not known.matched[~real].any()


@pytest.mark.parametrize(("near", "least"), [(True, 0.0), (False, 1.0)])
def test_corners_move_evenly_within_their_reach(near: bool, least: float) -> None:
    """To either side alike, near copies less than a whole reach, and far ones more; each corner on its own."""
    torch.manual_seed(0)
    boxes = denoising().noise(many(), 1).boxes[0].view(2, -1, 4)[0 if near else 1]
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    moved = (corners - torch.tensor([0.4, 0.25, 0.6, 0.55])) / torch.tensor([0.1, 0.15, 0.1, 0.15]) / 0.4
    even = torch.linspace(0, 1, 20000) + least
    for axis in range(4):
        torch.testing.assert_close(moved[:, axis].abs().sort().values, even, rtol=0, atol=0.02)
        assert abs(float((moved[:, axis] > 0).float().mean()) - 0.5) < 0.011  # three standard deviations
    assert float(torch.corrcoef(moved.T).triu(1).abs().max()) < 0.03


def test_labels_of_near_and_far_copies_flip_alike_and_each_on_its_own() -> None:
    torch.manual_seed(0)
    near, far = denoising(label_noise=0.25).noise(many(), 1).labels[0].view(2, -1)
    for labels in (near, far):
        for label in range(CLASSES):
            share = float((labels == label).float().mean())
            assert abs(share - (0.25 / CLASSES + (0.75 if label == 2 else 0.0))) < 0.012
    flipped = torch.stack([near != 2, far != 2]).float()
    assert abs(float(torch.corrcoef(flipped)[0, 1])) < 0.03


def test_each_noise_alone() -> None:
    torch.manual_seed(0)
    targets = objects([4, 4])
    labels = denoising(corner_noise=0.0, label_noise=1.0).noise(targets, 1)
    assert torch.equal(labels.boxes, targets.boxes.repeat(1, 2, 1))
    assert not torch.equal(labels.labels, targets.labels.repeat(1, 2))
    boxes = denoising(label_noise=0.0).noise(targets, 1)
    assert torch.equal(boxes.labels, targets.labels.repeat(1, 2))
    assert not (boxes.boxes == targets.boxes.repeat(1, 2, 1)).all(-1).any()


def test_without_noise_copies_are_the_objects_and_nothing_is_drawn() -> None:
    """And far copies are still to find nothing, as officially."""
    ours, targets = denoising(label_noise=0.0, corner_noise=0.0, num_groups=2), objects([3, 3])
    ours.draws = cast("Draws", None)
    mixed, known = ours(object_queries(2), targets)
    assert mixed.reference_points is not None and known is not None
    wanted = targets.boxes.clamp(EPS, 1 - EPS).repeat(1, 4, 1)
    torch.testing.assert_close(mixed.reference_points[:, :12], wanted, rtol=0, atol=2e-6)
    assert known.matched.tolist() == [[*[True] * 3, *[False] * 3] * 2] * 2 and known.counted.all()


def test_a_seeded_generator_repeats_its_draws_and_leaves_the_common_one_alone() -> None:
    ours, queries, targets = denoising(), object_queries(2), objects([3, 2])

    def run(seed: int | None) -> tuple[Tensor, Tensor]:
        ours.draws = Draws(None if seed is None else torch.Generator().manual_seed(seed))
        noised, _ = ours(queries, targets)
        assert noised.reference_points is not None
        return noised.reference_points, noised.content

    state = torch.get_rng_state()
    first, again, other = run(5), run(5), run(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    common = run(None)
    torch.manual_seed(3)
    assert torch.equal(run(None)[0], common[0]) and not torch.equal(torch.get_rng_state(), state)


def official_groups(dn_number: int, most: int) -> int:
    """By the rules in words: quirks of the official code, where numbers below 50 are groups."""
    doubled = 2 * dn_number
    if not most or not doubled:
        return 1
    if doubled < 100:
        return doubled
    return max(1, math.floor(doubled / (2 * most)))


@pytest.mark.parametrize("dn_number", [1, 5, 49, 50, 60, 100, 300])
@pytest.mark.parametrize("counts", [[0, 0], [1], [3, 0], [7, 2], [50], [51], [130, 4]])
def test_as_many_groups_as_officially(counts: list[int], dn_number: int) -> None:
    few = {"num_groups": 2 * dn_number} if dn_number < 50 else {}
    ours = denoising(num_queries=2 * dn_number, max_queries=10**6, attention_mask=False, **few)
    _, known = ours(object_queries(len(counts)), objects(counts))
    groups = official_groups(dn_number, max(counts))
    assert known is not None and known.copies == groups
    assert known.matched.shape == (len(counts), groups * 2 * max(counts))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=3),
    st.integers(1, 400),
    st.none() | st.integers(1, 9),
    st.integers(2, 120),
    st.booleans(),
)
def test_the_cost_is_bounded_whatever_is_in_an_image(
    counts: list[int], num_queries: int, num_groups: int | None, max_queries: int, contrastive: bool
) -> None:
    ours = denoising(num_queries=num_queries, num_groups=num_groups, max_queries=max_queries, contrastive=contrastive)
    mixed, known = ours(object_queries(len(counts)), objects(counts))
    rounds = 2 if contrastive else 1
    limit = max_queries // rounds
    assert known is not None and known.limit == limit  # not what this batch happens to hold
    most = min(max(counts), limit)
    total = mixed.groups["denoise"].stop
    assert total == known.copies * rounds * most <= max_queries and known.copies >= 1
    if most:
        wanted = num_groups or max(1, num_queries // (rounds * most))
        assert known.copies <= wanted
        if known.copies < wanted:  # another group would not fit
            assert total + rounds * most > max_queries
    assert known.matched.sum(1).tolist() == [known.copies * min(count, limit) for count in counts]


@pytest.mark.parametrize("most", [300, 21])
def test_near_and_far_copies_of_a_crowd_are_of_the_same_objects(most: int) -> None:
    """Chosen at random where there are too many."""
    targets, met = objects([most, 4]), set()
    for seed in range(25):
        ours = denoising(max_queries=40, label_noise=0.0, corner_noise=0.0)
        ours.draws = Draws(torch.Generator().manual_seed(seed))
        mixed, known = ours(object_queries(2), targets)
        assert known is not None and known.copies == 1 and mixed.reference_points is not None
        near, far = mixed.reference_points[:, :40].unflatten(1, (2, 20)).unbind(1)
        assert torch.equal(near, far)
        boxes = {tuple(box) for box in known.targets.boxes[0, :20].tolist()}
        assert len(boxes) == 20 and boxes <= {tuple(box) for box in targets.boxes[0].tolist()}
        assert known.matched.sum(1).tolist() == [20, 4] and known.counted.all()
        met |= boxes
    assert len(met) > min(most - 1, 230)  # 300 * (1 - (280 / 300)^25) = 246


def test_a_group_of_near_and_far_copies_needs_room_for_two() -> None:
    with pytest.raises(ValueError, match=r"denoising\.max_queries=1: expected 2 or more"):
        denoising(max_queries=1)
    denoising(max_queries=1, contrastive=False)


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize(("counts", "max_queries"), [([3, 1], 1000), ([2, 0, 5], 1000), ([30, 4], 24), ([0, 2], 24)])
def test_far_copies_and_unused_slots_are_trained_to_find_nothing(
    counts: list[int], max_queries: int, contrastive: bool
) -> None:
    """The class loss is over all of them, the losses of boxes over near copies; both are divided by the near ones."""
    ours = denoising(max_queries=max_queries, contrastive=contrastive)
    _, known = ours(object_queries(len(counts)), objects(counts))
    assert known is not None
    said = said_of(known, len(counts))
    normalizer = Known().normalizer(Normalizer(torch.tensor(counts, dtype=torch.float64)), said)
    shape = (2, *known.matched.shape)
    assignment = Assignment(torch.arange(shape[2]).expand(shape), known.matched.expand(shape))
    found = [loss(said, known.targets, assignment, normalizer) for loss in (FocalClassLoss(), L1Loss(), GIoULoss())]
    most, groups, rounds = min(max(counts), known.limit), known.copies, 2 if contrastive else 1
    for layer in range(2):
        focal, distance, answers = 0.0, 0.0, 0
        for image, group, round_, t in itertools.product(range(len(counts)), range(groups), range(rounds), range(most)):
            slot, real = (group * rounds + round_) * most + t, t < counts[image]
            near = real and round_ == 0
            label = int(known.targets.labels[image, slot]) if near else None
            if near or contrastive:
                focal += naive_focal(said.logits[layer, image, slot].tolist(), label)
            if near:
                wanted = known.targets.boxes[image, slot].double()
                distance += float((said.boxes[layer, image, slot] - wanted).abs().sum())
                answers += 1
        assert answers == groups * sum(min(count, known.limit) for count in counts)
        assert float(found[0][layer]) == pytest.approx(focal / answers)
        assert float(found[1][layer]) == pytest.approx(distance / answers)
    assert found[2].isfinite().all() and (found[2] > 0).all()


@pytest.mark.parametrize("num_groups", [None, 4])
def test_a_batch_without_objects(num_groups: int | None) -> None:
    """No copies, one group, and a gradient for every parameter, which other processes may be waiting for."""
    ours, queries = denoising(num_groups=num_groups, needs_pos=True), object_queries(2, pos=True)
    mixed, known = ours(queries, objects([0, 0]))
    assert known is not None and known.copies == 1 and known.matched.shape == known.counted.shape == (2, 0)
    assert mixed.groups == {"denoise": slice(0, 0), "match": slice(0, OTHERS)}
    assert torch.equal(mixed.content, queries.content)
    assert mixed.attention_mask is None or not mixed.attention_mask.any()
    assert mixed.pos is not None
    (mixed.content.sum() + mixed.pos.sum()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def with_others() -> Queries:
    """Two queries that are matched, and one of which several would answer for an object."""
    late = torch.arange(OTHERS) >= 2
    return replace(
        object_queries(2),
        attention_mask=late[:, None] != late,
        groups={"match": slice(0, 2), "one_to_many": slice(2, 3)},
    )


def test_copies_go_before_several_groups() -> None:
    mixed, known = denoising(num_groups=1)(with_others(), objects([2, 1]))
    assert mixed.groups == {"denoise": slice(0, 4), "match": slice(4, 6), "one_to_many": slice(6, 7)}
    expected = naive_hidden(1, 4, OTHERS)
    expected[4:6, 6] = expected[6, 4:6] = True
    assert known is not None and mixed.attention_mask is not None and torch.equal(mixed.attention_mask, expected)


def test_copies_without_a_group_of_their_own_are_matched_like_the_others() -> None:
    """What the official code does without denoising; the queries are the same, and nothing says what they answer."""
    targets = objects([2, 1])
    for queries, groups in (
        (object_queries(2), {"match": slice(0, 4 + OTHERS)}),
        (with_others(), {"match": slice(0, 6), "one_to_many": slice(6, 7)}),
    ):
        noised = []
        for own_group in (True, False):
            ours = denoising(num_groups=1, own_group=own_group)
            ours.draws = Draws(torch.Generator().manual_seed(1))
            noised.append(ours(queries, targets))
        (usual, usual_known), (joined, joined_known) = noised
        assert usual_known is not None and joined_known is None and joined.groups == groups
        for name in ("content", "reference_points", "attention_mask"):
            assert torch.equal(getattr(joined, name), getattr(usual, name))
    empty, known = denoising(own_group=False)(object_queries(2), objects([0, 0]))
    assert known is None and empty.groups == {"match": slice(0, OTHERS)}


@pytest.mark.parametrize("fills_content", [False, True])
def test_nothing_is_denoised_without_targets(fills_content: bool) -> None:
    for own_group in (True, False):
        ours, queries = denoising(fills_content=fills_content, own_group=own_group), object_queries(2)
        plain, known = ours(queries, None)
        assert known is None and plain.attention_mask is None and plain.groups == queries.groups
        unknown = ours.label_embed.weight[CLASSES]
        assert torch.equal(plain.content, queries.content + unknown if fills_content else queries.content)


def test_an_indicator_marks_near_and_far_copies_alike() -> None:
    ours = denoising(indicator=True, num_groups=1)
    assert ours.label_embed.weight.shape == (CLASSES + 1, WIDTH - 1)
    mixed, _ = ours(object_queries(2), objects([2, 1]))
    assert mixed.content[..., -1].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0]]


def test_copies_learn_labels() -> None:
    ours, targets = denoising(label_noise=0.0), objects([3, 1])
    mixed, _ = ours(object_queries(2), targets)
    mixed.content.square().sum().backward()
    gradient = ours.label_embed.weight.grad
    assert gradient is not None
    seen = {
        int(label) for labels, count in zip(targets.labels, targets.counts, strict=True) for label in labels[:count]
    }
    assert {row for row in range(CLASSES + 1) if gradient[row].any()} == seen


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("max_queries", [1000, 4])
def test_no_loop_over_images_or_objects_and_nothing_waits_for_the_device(max_queries: int, contrastive: bool) -> None:
    """As many operations for sixteen images as for two, also where not every object gets a copy."""
    counted = []
    for counts in ([5, 1], [5, 3, 4, 8] * 4):
        ours = denoising(max_queries=max_queries, contrastive=contrastive)
        queries, targets = object_queries(len(counts)), objects(counts)
        with Operations() as operations:
            ours(queries, targets)
        assert not operations.waits
        counted.append(operations.seen)
    assert counted[0] == counted[1] and sum(counted[0].values()) < 150


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_queries", 0, "expected 1 or more; denoising=none turns it off"),
        ("num_groups", 0, "expected 1 or more; denoising=none turns it off"),
        ("max_queries", 0, "expected 2 or more; denoising=none turns it off"),
        ("label_noise", 1.5, "expected a probability"),
        ("corner_noise", -0.1, "expected 0 or more"),
        ("corner_noise", math.nan, "expected 0 or more"),
        ("corner_noise", math.inf, "expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"denoising\.{key}={value}: {message}"):
        denoising(**{key: value})
