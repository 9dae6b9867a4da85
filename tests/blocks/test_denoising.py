from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from detfamily.blocks.denoising import CenterDenoising, Draws
from detfamily.blocks.query_position import anchor_code
from detfamily.criterion import Normalizer
from detfamily.criterion.losses import FocalClassLoss, L1Loss
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

Box = tuple[float, float, float, float]


def denoising(**changes: Any) -> CenterDenoising:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_classes": CLASSES,
        "embed_dim": WIDTH,
        "num_groups": 3,
        "label_noise": 0.4,
        "center_noise": 0.5,
        "size_noise": 0.7,
        "eps": EPS,
        "fills_content": False,
        "needs_pos": False,
        "reference_dim": 4,
        **changes,
    }
    return CenterDenoising(**arguments)


@dataclass(frozen=True)
class NaiveCopy:
    """One copy of one object: where it stands, what it came from, and what became of it."""

    image: int
    group: int
    slot: int
    label: int
    box: Box
    noised_label: int
    noised_box: Box


def naive_copies(
    targets: Targets, groups: int, noise: tuple[float, float, float], draws: tuple[Sequence[float], Sequence[int], Any]
) -> list[NaiveCopy]:
    """The paper's and the official code's way, a copy at a time, in their order of draws, in float32."""
    chances, new_labels, uniforms = iter(draws[0]), iter(draws[1]), iter(draws[2])
    label_noise, center_noise, size_noise = noise
    places = [
        (image, group, t) for group in range(groups) for image, count in enumerate(targets.counts) for t in range(count)
    ]
    flips = [next(chances) < label_noise for _ in places]
    labels = [
        next(new_labels) if flip else int(targets.labels[i, t]) for flip, (i, _, t) in zip(flips, places, strict=True)
    ]
    most, copies = max(targets.counts), []
    for noised_label, (image, group, t) in zip(labels, places, strict=True):
        box = targets.boxes[image, t].numpy()
        reach = [box[2] / np.float32(2), box[3] / np.float32(2), box[2], box[3]]
        shares = [np.float32(x) for x in (center_noise, center_noise, size_noise, size_noise)]
        noised = []
        for x, u, r, share in zip(box, next(uniforms), reach, shares, strict=True):
            moved = x + (np.float32(u) * np.float32(2) - np.float32(1)) * r * share
            noised.append(float(min(max(moved, np.float32(0)), np.float32(1))))
        copies.append(
            NaiveCopy(
                image,
                group,
                group * most + t,
                int(targets.labels[image, t]),
                cast("Box", tuple(box.tolist())),
                int(noised_label),
                cast("Box", tuple(noised)),
            )
        )
    return copies


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [4], [1, 1, 1], [2, 0, 5, 3]])
def test_copies_as_a_naive_loop(counts: list[int], groups: int) -> None:
    noise, total = (0.4, 0.5, 0.7), groups * sum(counts)
    rng = np.random.default_rng(total)
    chances, uniforms = rng.random(total, np.float32), rng.random((total, 4), np.float32)
    new_labels = rng.integers(0, CLASSES, int((chances < 0.4).sum()))
    ours, queries, targets = denoising(num_groups=groups), object_queries(len(counts)), objects(counts)
    listed = Listed(*(torch.from_numpy(one) for one in (chances, new_labels, uniforms)))
    ours.draws = cast("Draws", listed)
    mixed, known = ours(queries, targets)
    assert listed.asked == ["chances", "labels", "boxes"]
    most = max(counts)
    assert known is not None and known.copies == groups and mixed.reference_points is not None
    assert mixed.groups == {"denoise": slice(0, groups * most), "match": slice(groups * most, groups * most + OTHERS)}
    assert torch.equal(mixed.content[:, groups * most :], queries.content)
    assert queries.reference_points is not None
    assert torch.equal(mixed.reference_points[:, groups * most :], queries.reference_points)
    assert mixed.attention_mask is not None
    assert torch.equal(mixed.attention_mask, naive_hidden(groups, most, OTHERS))
    used = torch.zeros(len(counts), groups * most, dtype=torch.bool)
    raw = ours.noise(targets, groups)
    for copy in naive_copies(targets, groups, noise, (chances.tolist(), new_labels.tolist(), uniforms)):
        place = (copy.image, copy.slot)
        used[place] = True
        assert int(known.targets.labels[place]) == copy.label and tuple(known.targets.boxes[place].tolist()) == copy.box
        assert int(raw.labels[place]) == copy.noised_label and tuple(raw.boxes[place].tolist()) == copy.noised_box
        expected = torch.cat([ours.label_embed.weight[copy.noised_label], torch.ones(1)])
        assert torch.equal(mixed.content[place], expected)
        clamped = torch.tensor(copy.noised_box, dtype=torch.float64).clamp(EPS, 1 - EPS)
        torch.testing.assert_close(mixed.reference_points[place].double(), clamped, rtol=0, atol=1e-6)
    assert torch.equal(known.matched, used) and torch.equal(known.counted, used)
    assert not mixed.content[:, : groups * most][~used].any()
    assert (mixed.reference_points[:, : groups * most][~used] == 0.5).all()


@pytest.mark.parametrize("case", ["base", "empty_image", "d256_formula"])
def test_official_copies_queries_and_mask(goldens: Path, case: str) -> None:
    folder = goldens / "dn_dab_detr" / case
    io = load_file(folder / "io.safetensors")
    width, groups = io["dn.input_query_label"].shape[-1], int(io["dn.scalar"])
    indices = range(2)
    targets = Targets.from_lists(*([io[f"targets.{i}.{kind}"] for i in indices] for kind in ("labels", "boxes")))
    classes, pad = io["dn.output_known_class"].shape[-1], int(io["dn.pad_size"])
    ours = denoising(
        num_classes=classes,
        embed_dim=width,
        num_groups=groups,
        **dict.fromkeys(("label_noise", "center_noise", "size_noise"), 0.4),
        fills_content=True,
    )
    weights = load_file(folder / "weights.safetensors") if case != "d256_formula" else {}
    if weights:
        ours.label_embed.load_state_dict({"weight": weights["label_enc.weight"]})
    ours.draws = cast("Draws", Listed(*(io[f"dn.{name}"] for name in ("rand_label_p", "rand_new_label", "rand_box"))))
    others = io["dn.input_query_bbox"][:, pad:].sigmoid()
    queries = Queries(torch.zeros(*others.shape[:2], width), None, others, groups={"match": slice(0, others.shape[1])})
    mixed, known = ours(queries, targets)
    raw = ours.noise(targets, groups)
    place = (io["dn.known_batch_idx"], io["dn.map_known_indice"])
    assert known is not None and int(known.matched.sum()) == len(io["dn.known_labels"])
    assert known.matched[place].all()
    assert torch.equal(known.targets.labels[place], io["dn.known_labels"])
    assert torch.equal(known.targets.boxes[place], io["dn.known_boxes"])
    assert torch.equal(raw.labels[place], io["dn.known_labels_noised"])
    assert torch.equal(raw.boxes[place], io["dn.known_boxes_noised"])
    assert mixed.attention_mask is not None and torch.equal(mixed.attention_mask, io["dn.attn_mask"])
    torch.testing.assert_close(ours.box_logits_of(raw), io["dn.input_query_bbox"][:, :pad], rtol=0, atol=3e-5)
    assert mixed.reference_points is not None
    torch.testing.assert_close(mixed.reference_points, io["dn.input_query_bbox"].sigmoid(), rtol=0, atol=1e-6)
    if weights:
        assert torch.equal(mixed.content, io["dn.input_query_label"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 2**31))
def test_layout_and_reach_of_the_noise(counts: list[int], groups: int, seed: int) -> None:
    ours, targets = denoising(num_groups=groups), objects(counts, seed)
    ours.draws = Draws(torch.Generator().manual_seed(seed))
    mixed, known = ours(object_queries(len(counts)), targets)
    most = max(counts)
    copies = ours.noise(targets, groups)
    assert known is not None and mixed.attention_mask is not None
    assert torch.equal(mixed.attention_mask, naive_hidden(groups, most, OTHERS))
    for image, group, t in itertools.product(range(len(counts)), range(groups), range(most)):
        place, real = (image, group * most + t), t < counts[image]
        assert bool(known.matched[place]) == bool(known.counted[place]) == bool(copies.valid[place]) == real
        if real:
            cx, cy, w, h = targets.boxes[image, t].tolist()
            noised = copies.boxes[place].tolist()
            for before, now, reach in zip((cx, cy, w, h), noised, (w / 4, h / 4, 0.7 * w, 0.7 * h), strict=True):
                assert 0 <= now <= 1 and abs(now - before) <= reach + 1e-6
            assert 0 <= int(copies.labels[place]) < CLASSES


def test_labels_flip_as_often_as_they_should_and_may_stay() -> None:
    torch.manual_seed(0)
    labels = denoising(label_noise=0.4).noise(many(), 1).labels[0]
    for label in range(CLASSES):
        share = float((labels == label).float().mean())
        assert abs(share - (0.4 / CLASSES + (0.6 if label == 2 else 0.0))) < 0.012  # three standard deviations


def test_boxes_move_evenly_within_their_reach() -> None:
    torch.manual_seed(0)
    ours = denoising(center_noise=0.4, size_noise=0.6)
    moved = ours.noise(many(), 1).boxes[0] - torch.tensor([0.5, 0.4, 0.2, 0.3])
    even = torch.linspace(-1, 1, 20000)
    for axis, reach in enumerate((0.4 * 0.1, 0.4 * 0.15, 0.6 * 0.2, 0.6 * 0.3)):
        torch.testing.assert_close(moved[:, axis].sort().values / reach, even, rtol=0, atol=0.04)
    assert float(torch.corrcoef(moved.T).triu(1).abs().max()) < 0.03


def test_each_noise_alone() -> None:
    torch.manual_seed(0)
    targets = objects([4, 4])
    for changes, still, moves in (
        ({"size_noise": 0.0}, slice(2, 4), slice(0, 2)),
        ({"center_noise": 0.0}, slice(0, 2), slice(2, 4)),
    ):
        copies = denoising(num_groups=1, **changes).noise(targets, 1)
        assert torch.equal(copies.boxes[..., still], targets.boxes[..., still])
        assert not (copies.boxes[..., moves] == targets.boxes[..., moves]).any()


def test_without_noise_copies_are_the_objects_and_nothing_is_drawn() -> None:
    ours = denoising(label_noise=0.0, center_noise=0.0, size_noise=0.0, num_groups=2)
    ours.draws = cast("Draws", None)
    targets = objects([3, 3])
    targets.boxes[0, 0] = torch.tensor([0.0, 1.0, 1e-4, 0.9999])
    mixed, known = ours(object_queries(2), targets)
    copies = ours.noise(targets, 2)
    assert torch.equal(copies.boxes, targets.boxes.repeat(1, 2, 1)) and torch.equal(
        copies.labels, targets.labels.repeat(1, 2)
    )
    assert mixed.reference_points is not None and known is not None
    references = mixed.reference_points[:, :6]
    torch.testing.assert_close(references, copies.boxes.clamp(EPS, 1 - EPS), rtol=0, atol=2e-6)
    inside = (copies.boxes > EPS) & (copies.boxes < 1 - EPS)
    torch.testing.assert_close(references[inside], known.targets.boxes[inside], rtol=0, atol=2e-6)
    assert int((~inside).sum()) == 8  # four numbers, twice


def test_a_seeded_generator_repeats_its_draws_and_leaves_the_common_one_alone() -> None:
    ours, queries, targets = denoising(), object_queries(2), objects([3, 2])

    def run(seed: int | None) -> Tensor:
        ours.draws = Draws(None if seed is None else torch.Generator().manual_seed(seed))
        references = ours(queries, targets)[0].reference_points
        assert references is not None
        return references

    state = torch.get_rng_state()
    first, again, other = run(5), run(5), run(6)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    common = run(None)
    torch.manual_seed(3)
    assert torch.equal(run(None), common) and not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fills_content", [False, True])
def test_nothing_is_denoised_without_targets(fills_content: bool) -> None:
    ours, queries = denoising(fills_content=fills_content), object_queries(2)
    plain, known = ours(queries, None)
    assert known is None and plain.attention_mask is None and plain.groups == queries.groups
    assert plain.reference_points is queries.reference_points
    unknown = torch.cat([ours.label_embed.weight[CLASSES], torch.zeros(1)])
    expected = queries.content + unknown if fills_content else queries.content
    assert torch.equal(plain.content, expected)


@pytest.mark.parametrize("fills_content", [False, True])
def test_the_last_channel_marks_copies(fills_content: bool) -> None:
    ours = denoising(fills_content=fills_content)
    assert ours.label_embed.weight.shape == (CLASSES + 1, WIDTH - 1)
    mixed, known = ours(object_queries(2), objects([3, 1]))
    assert known is not None
    assert torch.equal(mixed.content[:, :9, -1].bool(), known.matched) and not mixed.content[:, 9:, -1].any()


@pytest.mark.parametrize("fills_content", [False, True])
def test_without_an_indicator_labels_fill_the_content(fills_content: bool) -> None:
    ours, queries = denoising(indicator=False, fills_content=fills_content, label_noise=0.0), object_queries(2)
    assert ours.label_embed.weight.shape == (CLASSES + 1, WIDTH)
    mixed, known = ours(queries, objects([3, 1]))
    assert known is not None
    expected = ours.label_embed.weight[known.targets.labels]
    assert torch.equal(mixed.content[:, :9][known.matched], expected[known.matched])
    others = queries.content + ours.label_embed.weight[CLASSES] if fills_content else queries.content
    assert torch.equal(mixed.content[:, 9:], others)


def test_copies_that_are_told_no_label() -> None:
    ours, targets = denoising(embed_labels=False), objects([3, 1])
    mixed, known = ours(object_queries(2), targets)
    unknown = torch.cat([ours.label_embed.weight[CLASSES], torch.ones(1)])
    assert known is not None and torch.equal(known.targets.labels, targets.labels.repeat(1, 3))
    assert torch.equal(mixed.content[:, :9][known.matched], unknown.expand(12, -1))


@pytest.mark.parametrize("reference_dim", [None, 2, 4])
def test_positions_are_made_of_boxes_where_queries_have_some(reference_dim: int | None) -> None:
    ours = denoising(needs_pos=True, reference_dim=reference_dim, label_noise=0.0, center_noise=0.0, size_noise=0.0)
    queries, targets = object_queries(2, reference_dim, pos=True), objects([3, 1])
    mixed, known = ours(queries, targets)
    assert mixed.pos is not None and queries.pos is not None and known is not None and ours.pos_head is not None
    assert torch.equal(mixed.pos[:, 9:], queries.pos)
    boxes = targets.boxes.clamp(EPS, 1 - EPS).repeat(1, 3, 1)
    first, second = (cast("nn.Linear", layer) for layer in ours.pos_head.layers)
    made = second(first(anchor_code(boxes, WIDTH)).clamp(min=0))
    torch.testing.assert_close(mixed.pos[:, :9][known.matched], made[known.matched], rtol=0, atol=1e-5)
    if reference_dim is None:
        assert mixed.reference_points is None
    else:
        assert mixed.reference_points is not None
        assert mixed.reference_points.shape == (2, 9 + OTHERS, reference_dim)
        wanted = boxes[known.matched][:, :reference_dim]
        torch.testing.assert_close(mixed.reference_points[:, :9][known.matched], wanted, rtol=0, atol=2e-6)


def test_a_mask_that_others_bring_stays() -> None:
    theirs = torch.rand(OTHERS, OTHERS) < 0.5
    queries = replace(object_queries(1), attention_mask=theirs)
    for hides in (False, True):
        mask = denoising(attention_mask=hides, num_groups=2)(queries, objects([2]))[0].attention_mask
        assert mask is not None and torch.equal(mask[4:, 4:], theirs)
        expected = naive_hidden(2, 2, OTHERS) if hides else torch.zeros(7, 7, dtype=torch.bool)
        expected[4:, 4:] = theirs
        assert torch.equal(mask, expected)
    assert denoising(attention_mask=False)(object_queries(1), objects([2]))[0].attention_mask is None


@pytest.mark.parametrize("needs_pos", [False, True])
def test_a_batch_without_objects(needs_pos: bool) -> None:
    """No copies, and yet a gradient for every parameter, which other processes may be waiting for."""
    ours, queries = denoising(needs_pos=needs_pos), object_queries(2, pos=needs_pos)
    mixed, known = ours(queries, objects([0, 0]))
    assert known is not None and known.matched.shape == (2, 0) and mixed.groups["denoise"] == slice(0, 0)
    assert mixed.groups["match"] == slice(0, OTHERS) and torch.equal(mixed.content, queries.content)
    assert mixed.attention_mask is None or not mixed.attention_mask.any()
    total = mixed.content.sum() if mixed.pos is None else mixed.content.sum() + mixed.pos.sum()
    total.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_labels_and_positions_learn() -> None:
    ours, queries, targets = denoising(needs_pos=True, label_noise=0.0), object_queries(2, pos=True), objects([3, 1])
    mixed, _ = ours(queries, targets)
    assert mixed.pos is not None
    (mixed.content.square().sum() + mixed.pos.square().sum()).backward()
    gradient = ours.label_embed.weight.grad
    assert gradient is not None
    seen = {
        int(label) for labels, count in zip(targets.labels, targets.counts, strict=True) for label in labels[:count]
    }
    assert {row for row in range(CLASSES + 1) if gradient[row].any()} == seen
    assert ours.pos_head is not None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in ours.pos_head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copies_join_queries_in_their_precision(dtype: torch.dtype) -> None:
    queries = object_queries(2, pos=True)
    assert queries.pos is not None
    queries = replace(queries, content=queries.content.to(dtype), pos=queries.pos.to(dtype))
    mixed, _ = denoising(needs_pos=True)(queries, objects([3, 1]))
    assert mixed.pos is not None and mixed.reference_points is not None
    assert mixed.content.dtype == mixed.pos.dtype == dtype and mixed.reference_points.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 120))
def test_the_cost_is_bounded_whatever_is_in_an_image(counts: list[int], num_groups: int, max_queries: int) -> None:
    ours, targets = denoising(num_groups=num_groups, max_queries=max_queries), objects(counts)
    mixed, known = ours(object_queries(len(counts)), targets)
    most = max(counts)
    assert known is not None and 1 <= known.copies <= num_groups
    assert known.limit == max_queries  # not what this batch happens to hold: others of the same step hold more
    total = mixed.groups["denoise"].stop
    assert total == known.copies * min(most, max_queries) <= max_queries
    if most and known.copies < num_groups:  # another group would not fit
        assert total + min(most, max_queries) > max_queries
    per_image = [min(count, max_queries) for count in counts]
    assert known.matched.sum(1).tolist() == [known.copies * count for count in per_image]


def test_of_too_many_objects_some_are_chosen_at_random() -> None:
    ours, targets = denoising(max_queries=40), objects([300, 7, 55])
    everything = [
        {tuple(box.tolist()) for box in boxes[:n]} for boxes, n in zip(targets.boxes, targets.counts, strict=True)
    ]
    labels = {
        tuple(box.tolist()): int(label)
        for bs, ls in zip(targets.boxes, targets.labels, strict=True)
        for box, label in zip(bs, ls, strict=True)
    }
    met: set[Any] = set()
    for seed in range(30):
        ours.draws = Draws(torch.Generator().manual_seed(seed))
        _, known = ours(object_queries(3), targets)
        assert known is not None and known.copies == 1 and known.targets.boxes.shape == (3, 40, 4)
        for image, count in enumerate((40, 7, 40)):
            real = known.matched[image]
            chosen = [tuple(box.tolist()) for box in known.targets.boxes[image][real]]
            assert len(chosen) == len(set(chosen)) == count and set(chosen) <= everything[image]
            assert [labels[box] for box in chosen] == known.targets.labels[image][real].tolist()
        met |= {tuple(box.tolist()) for box in known.targets.boxes[0]}
    assert len(met) > 280  # 300 * (1 - (260 / 300)^30) = 296 of the 300


@pytest.mark.parametrize(("counts", "max_queries"), [([300, 7], 40), ([300, 7], 650), ([2, 3], 1000), ([40, 0], 40)])
def test_losses_of_crowds_are_the_mean_over_what_is_copied(counts: list[int], max_queries: int) -> None:
    ours, targets = denoising(max_queries=max_queries), objects(counts)
    _, known = ours(object_queries(2), targets)
    assert known is not None
    said = said_of(known, 2)
    normalizer = Known().normalizer(Normalizer(torch.tensor(counts, dtype=torch.float64)), said)
    query = torch.arange(known.matched.shape[1]).expand(2, 2, -1)
    assignment = Assignment(query, known.matched.expand(2, 2, -1))
    l1 = L1Loss()(said, known.targets, assignment, normalizer)
    of_class = FocalClassLoss()(said, known.targets, assignment, normalizer)
    for layer in range(2):
        distances, focal = [], []
        for image, slot in itertools.product(range(2), range(known.matched.shape[1])):
            if known.matched[image, slot]:
                wanted = known.targets.boxes[image, slot].double()
                distances.append(float((said.boxes[layer, image, slot] - wanted).abs().sum()))
                focal.append(
                    naive_focal(said.logits[layer, image, slot].tolist(), int(known.targets.labels[image, slot]))
                )
        assert float(l1[layer]) == pytest.approx(sum(distances) / len(distances))
        assert float(of_class[layer]) == pytest.approx(sum(focal) / len(focal))


@pytest.mark.parametrize("max_queries", [1000, 2])
def test_no_loop_over_images_or_objects_and_nothing_waits_for_the_device(max_queries: int) -> None:
    """As many operations for sixteen images as for two, also where not every object gets a copy."""
    counted = []
    for counts in ([3, 1], [5, 3, 4, 3] * 4):
        ours, queries, targets = denoising(max_queries=max_queries), object_queries(len(counts)), objects(counts)
        with Operations() as operations:
            ours(queries, targets)
        assert not operations.waits
        counted.append(operations.seen)
    assert counted[0] == counted[1] and sum(counted[0].values()) < 150


def test_the_watch_sees_what_waits() -> None:
    x = torch.rand(4)
    for waits in (lambda: x[x > 0.5], lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero()):
        with Operations() as operations:
            waits()
        assert operations.waits


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_groups", 0, "expected 1 or more; denoising=none turns it off"),
        ("max_queries", -3, "expected 1 or more; denoising=none turns it off"),
        ("label_noise", 1.1, "expected a probability"),
        ("label_noise", -0.1, "expected a probability"),
        ("label_noise", math.nan, "expected a probability"),
        ("center_noise", -0.1, "expected 0 or more"),
        ("center_noise", math.nan, "expected 0 or more"),
        ("size_noise", -1, "expected 0 or more"),
        ("size_noise", math.inf, "expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"denoising\.{key}={value}: {message}"):
        denoising(**{key: value})


def test_queries_that_say_nothing_of_a_place_cannot_be_denoised() -> None:
    with pytest.raises(ValueError, match="this query_source have neither: choose another, or denoising=none"):
        denoising(needs_pos=False, reference_dim=None)
