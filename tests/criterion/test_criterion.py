from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detfamily.criterion import Normalizer
from detfamily.criterion.losses import L1Loss
from detfamily.criterion.rules import Hungarian, Known
from detfamily.errors import NonFiniteError
from detfamily.structures import Predictions, Targets

Given = Callable[..., Any]
Noised = Callable[..., Any]
KINDS = ["focal", "softmax"]
WEIGHTS = {"class": 0.7, "l1": 5.0, "giou": 2.0}


@pytest.mark.parametrize(
    ("counts", "classes"),
    [([2, 3], 4), ([2, 0, 5], 4), ([0, 0], 4), ([9, 1, 12], 4), ([3, 2], 1), ([0], 1), ([7], 2)],
    ids=["plain", "an empty image", "an empty batch", "more objects than queries", "one class", "nothing", "full"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_as_a_naive_loop(given: Given, kind: str, counts: list[int], classes: int) -> None:
    one = given(kind, counts, classes=classes)
    losses = one.criterion()({"match": one.predictions}, one.targets)
    assert set(losses.parts) == {f"match/{layer}/{name}" for layer in range(3) for name in WEIGHTS}
    for layer in range(3):
        for name, expected in one.naive_losses(layer).items():
            part = losses.parts[f"match/{layer}/{name}"]
            assert not part.requires_grad and part.shape == ()
            torch.testing.assert_close(part, expected.detach(), rtol=1e-7, atol=1e-9)
    total = one.naive_total()
    torch.testing.assert_close(losses.total, total, rtol=1e-7, atol=1e-9)
    inputs = (one.predictions.logits, one.predictions.boxes)
    for ours, expected in zip(
        torch.autograd.grad(losses.total, inputs),
        torch.autograd.grad(total, inputs, allow_unused=True),
        strict=True,
    ):
        expected = torch.zeros_like(ours) if expected is None else expected  # no object: no box is asked for
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_proposals_learn_objects_without_their_classes(given: Given, kind: str) -> None:
    one, two = given(kind, [2, 4]), given(kind, [2, 4], layers=1, queries=11)
    agnostic = replace(two, labels=[torch.zeros_like(labels) for labels in one.labels], boxes=one.boxes)
    losses = one.criterion()({"match": one.predictions, "proposals": two.predictions}, one.targets)
    for name, expected in agnostic.naive_losses(0).items():
        torch.testing.assert_close(losses.parts[f"proposals/0/{name}"], expected.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(losses.total, one.naive_total() + 0.5 * agnostic.naive_total(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("counts", [[2, 3], [1, 0, 2], [0, 0], [4, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_several_queries_answer_for_each_object(given: Given, kind: str, counts: list[int], repeats: int) -> None:
    """Losses and gradients as a naive loop over lists in which every object stands several times."""
    one = given(kind, counts)
    two = given(kind, counts, queries=9)
    many = replace(
        two,
        labels=[labels.repeat(repeats) for labels in one.labels],
        boxes=[boxes.repeat(repeats, 1) for boxes in one.boxes],
    )
    groups = {"match": Hungarian(), "one_to_many": Hungarian(repeats=repeats, weight=0.5)}
    losses = one.criterion(groups=groups)({"match": one.predictions, "one_to_many": two.predictions}, one.targets)
    for layer in range(3):
        for name, expected in many.naive_losses(layer).items():
            part = losses.parts[f"one_to_many/{layer}/{name}"]
            torch.testing.assert_close(part, expected.detach(), rtol=1e-7, atol=1e-9)
    assignment = losses.assignments["one_to_many"]
    for layer, (image, count) in itertools.product(range(3), enumerate(counts)):
        queries = assignment.query[layer, image][assignment.matched[layer, image]].tolist()
        assert len(queries) == len(set(queries)) == min(count * repeats, 9)
    total = one.naive_total() + 0.5 * many.naive_total()
    torch.testing.assert_close(losses.total, total, rtol=1e-7, atol=1e-9)
    inputs = (two.predictions.logits, two.predictions.boxes)
    ours = torch.autograd.grad(losses.total, inputs)
    theirs = torch.autograd.grad(total, inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-6, atol=1e-8)


class HostWatch(TorchDispatchMode):
    """Counts operations that wait for the device, wherever the tensors lie."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1] if one is not None
        )
        if by_mask or name.lstrip("_").startswith(tuple(word.lstrip("_") for word in self.WAITING)):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every way from a tensor to the host by name: what the copy takes on a real device."""
    copies: list[str] = []

    def counted(name: str) -> None:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            target = kwargs.get("device", args[0] if args else None)
            if name != "to" or (isinstance(target, (str, torch.device)) and torch.device(target).type == "cpu"):
                copies.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, call)

    for name in ("cpu", "tolist", "item", "__bool__", "__float__", "__int__", "__index__", "__array__"):
        counted(name)
    return copies


def test_the_watch_sees_what_waits() -> None:
    x = torch.rand(4)
    for waits in (lambda: x[x > 0.5], lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero()):
        with HostWatch() as watch:
            waits()
        assert watch.seen
    with HostWatch() as watch:
        x[torch.tensor([0, 1, 1, 3])] + torch.where(x > 0.5, x, x.new_zeros(()))
    assert not watch.seen


@pytest.mark.parametrize("kind", KINDS)
def test_one_copy_to_the_host_in_a_step(
    given: Given, noised: Noised, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = given(kind, [2, 0, 9]), given(kind, [2, 0, 9], layers=1, queries=11)
    said = {"match": one.predictions, "proposals": two.predictions, "denoise": noised(one, 3).predictions}
    said["one_to_many"] = given(kind, [2, 0, 9], queries=20).predictions
    criterion, targets = one.criterion(), one.targets
    criterion.groups["one_to_many"] = Hungarian(repeats=3)
    copies = count_copies(monkeypatch)
    with HostWatch() as watch:
        losses = criterion(said, targets, ride=torch.tensor([4.0, 5.0]))
        losses.total.backward()
    assert copies == ["cpu"] and watch.seen == []
    assert losses.ride is not None and losses.ride.tolist() == [4.0, 5.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_copy_to_the_host_in_a_step_on_a_device(given: Given) -> None:
    one = given("focal", [2, 0, 9])
    predictions = Predictions(one.predictions.logits.cuda(), one.predictions.boxes.cuda())
    criterion, targets = one.criterion().cuda(), one.targets.to("cuda")
    criterion({"match": predictions}, targets)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        criterion({"match": predictions}, targets).total.backward()
    assert sum(event.count for event in profile.key_averages() if "DtoH" in event.key) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_none_is_named(given: Given, kind: str) -> None:
    one, two = given(kind, [2, 3]), given(kind, [2, 3], layers=1)
    boxes = two.predictions.boxes.detach().clone()
    boxes[0, 1, 3, 2] = float("nan")
    spoiled = {"match": one.predictions, "proposals": Predictions(two.predictions.logits, boxes)}
    with pytest.raises(NonFiniteError, match="group 'proposals', layer 0, image 101"):
        one.criterion()(spoiled, one.targets)


@pytest.mark.parametrize("counts", [[2, 3, 9, 0], [0, 0, 0, 0], [12, 10, 8, 9]])
@pytest.mark.parametrize("kind", KINDS)
def test_halves_of_a_batch_with_a_common_normalizer_add_up(given: Given, kind: str, counts: list[int]) -> None:
    """Accumulation and data parallel training cost what one large batch costs."""
    one = given(kind, counts)
    criterion = one.criterion()
    whole = criterion({"match": one.predictions}, one.targets).total

    def halves(processes: int) -> Tensor:
        normalizer = Normalizer(torch.tensor(counts, dtype=torch.float64), processes)
        total = torch.zeros((), dtype=torch.float64)
        for half in (slice(0, 2), slice(2, 4)):
            predictions = Predictions(one.predictions.logits[:, half], one.predictions.boxes[:, half])
            targets = Targets.from_lists(one.labels[half], one.boxes[half])
            total = total + criterion({"match": predictions}, targets, normalizer).total
        return total

    torch.testing.assert_close(halves(1), whole, rtol=1e-9, atol=1e-9)
    if sum(counts):  # without any object each process divides by 1, as officially
        torch.testing.assert_close(halves(2) / 2, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_halves_of_a_batch_whose_objects_are_answered_for_by_several_add_up(given: Given, kind: str) -> None:
    counts = [2, 3, 9, 0]
    one = given(kind, counts, queries=12)
    criterion = one.criterion(groups={"one_to_many": Hungarian(repeats=4)})
    whole = criterion({"one_to_many": one.predictions}, one.targets).total
    normalizer, total = Normalizer(torch.tensor(counts, dtype=torch.float64)), torch.zeros((), dtype=torch.float64)
    for half in (slice(0, 2), slice(2, 4)):
        said = Predictions(one.predictions.logits[:, half], one.predictions.boxes[:, half])
        targets = Targets.from_lists(one.labels[half], one.boxes[half])
        total = total + criterion({"one_to_many": said}, targets, normalizer).total
    torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-9)


COPIES = [([2, 3], 4), ([2, 0, 5], 4), ([0, 0], 4), ([9, 1, 12], 4), ([3, 2], 1)]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("counts", "classes"), COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_answer_for_what_they_came_from(
    given: Given, noised: Noised, kind: str, counts: list[int], classes: int, groups: int, others: bool
) -> None:
    """Losses and gradients as a naive loop; a copy without an object takes part only where it is said to."""
    one = given(kind, counts, classes=classes)
    copies = noised(one, groups, others=others)
    losses = one.criterion()({"denoise": copies.predictions, "match": one.predictions}, one.targets)
    for layer in range(3):
        for name, expected in copies.naive_losses(layer).items():
            torch.testing.assert_close(losses.parts[f"denoise/{layer}/{name}"], expected.detach(), rtol=1e-7, atol=1e-9)
    expected_total = one.naive_total() + 0.25 * copies.naive_total()
    torch.testing.assert_close(losses.total, expected_total, rtol=1e-7, atol=1e-9)
    inputs = (copies.predictions.logits, copies.predictions.boxes)
    ours = torch.autograd.grad(losses.total, inputs)
    theirs = torch.autograd.grad(expected_total, inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-6, atol=1e-8)


def test_each_copy_is_assigned_its_own_object(given: Given, noised: Noised) -> None:
    one = given("focal", [2, 3])
    copies = noised(one, 2)
    losses = one.criterion()({"denoise": copies.predictions, "match": one.predictions}, one.targets)
    alone = one.criterion()({"match": one.predictions}, one.targets)
    assignment = losses.assignments["denoise"]
    assert torch.equal(assignment.query, torch.arange(6).expand(3, 2, -1))
    assert assignment.matched[0].tolist() == [[True, True, False] * 2, [True] * 6]
    for name in ("query", "matched"):
        assert torch.equal(getattr(losses.assignments["match"], name), getattr(alone.assignments["match"], name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_goes_without_the_losses_that_it_is_told_to(given: Given, noised: Noised, kind: str) -> None:
    one = given(kind, [2, 3])
    copies = noised(one, 2)
    groups = {"match": Hungarian(left_out=["giou"]), "denoise": Known(weight=2.0, left_out=["class"])}
    losses = one.criterion(groups=groups)({"denoise": copies.predictions, "match": one.predictions}, one.targets)
    assert {part for part in losses.parts if "/1/" in part} == {
        "match/1/class", "match/1/l1", "denoise/1/l1", "denoise/1/giou"
    }  # fmt: skip
    expected = torch.zeros((), dtype=torch.float64)
    for layer in range(3):
        own, theirs = one.naive_losses(layer), copies.naive_losses(layer)
        expected = expected + sum(WEIGHTS[name] * own[name] for name in ("class", "l1"))
        expected = expected + 2 * sum(WEIGHTS[name] * theirs[name] for name in ("l1", "giou"))
    torch.testing.assert_close(losses.total, expected, rtol=1e-7, atol=1e-9)


def test_a_loss_to_be_left_out_is_there(given: Given) -> None:
    with pytest.raises(ValueError, match=r"criterion\.groups\.denoise\.left_out: no loss 'clas'; did you mean 'class'"):
        given("focal", [1]).criterion(groups={"match": Hungarian(), "denoise": Known(left_out=["clas"])})


def test_copies_of_the_last_layer_alone(given: Given, noised: Noised) -> None:
    one = given("focal", [2, 3])
    copies = noised(one, 2)
    losses = one.criterion(aux_loss=False)({"denoise": copies.predictions, "match": one.predictions}, one.targets)
    assert {part.split("/")[1] for part in losses.parts} == {"2"}
    for name, expected in copies.naive_losses(2).items():
        torch.testing.assert_close(losses.parts[f"denoise/2/{name}"], expected.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("counts", [[2, 3, 9, 0], [1, 0, 0, 0], [0, 0, 0, 5], [12, 1, 1, 9]])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_in_halves_of_a_batch_with_a_common_normalizer_add_up(
    given: Given, noised: Noised, kind: str, counts: list[int]
) -> None:
    """Whatever the fullest image of each half is, and so the number of its slots."""
    one = given(kind, counts)
    copies, criterion = noised(one, 2), one.criterion()
    whole = criterion({"match": one.predictions, "denoise": copies.predictions}, one.targets).total
    known, most = copies.predictions.given, max(counts)

    def half_of(half: slice) -> Predictions:
        fullest = max(counts[half])
        slots = torch.cat([torch.arange(fullest) + group * most for group in range(2)])
        part = replace(
            known,
            targets=replace(
                known.targets, labels=known.targets.labels[half, slots], boxes=known.targets.boxes[half, slots]
            ),
            matched=known.matched[half, slots],
            counted=known.counted[half, slots],
        )
        return Predictions(copies.predictions.logits[:, half, slots], copies.predictions.boxes[:, half, slots], part)

    for processes in (1, 2):
        normalizer = Normalizer(torch.tensor(counts, dtype=torch.float64), processes)
        total = torch.zeros((), dtype=torch.float64)
        for half in (slice(0, 2), slice(2, 4)):
            said = Predictions(one.predictions.logits[:, half], one.predictions.boxes[:, half])
            targets = Targets.from_lists(one.labels[half], one.boxes[half])
            total = total + criterion({"match": said, "denoise": half_of(half)}, targets, normalizer).total
        if sum(counts) >= processes:  # fewer objects than processes: each divides by 1, as officially
            torch.testing.assert_close(total / processes, whole, rtol=1e-9, atol=1e-9)


def test_the_last_layer_alone(given: Given) -> None:
    one = given("focal", [2, 3])
    losses = one.criterion(aux_loss=False)({"match": one.predictions}, one.targets)
    assert set(losses.parts) == {"match/2/class", "match/2/l1", "match/2/giou"}
    expected = sum(WEIGHTS[name] * value for name, value in one.naive_losses(2).items())
    torch.testing.assert_close(losses.total, expected, rtol=1e-7, atol=1e-9)
    assert losses.assignments["match"].query.shape == (1, 2, 3)


def test_a_weight_of_zero_leaves_its_loss_out(given: Given) -> None:
    one = given("softmax", [2, 3])
    losses = one.criterion(weights={**WEIGHTS, "giou": 0})({"match": one.predictions}, one.targets)
    assert {part.split("/")[2] for part in losses.parts} == {"class", "l1"}
    expected = sum(
        WEIGHTS[name] * value for n in range(3) for name, value in one.naive_losses(n).items() if name != "giou"
    )
    torch.testing.assert_close(losses.total, expected, rtol=1e-7, atol=1e-9)


def test_a_group_of_weight_zero_is_reported_and_not_trained(given: Given) -> None:
    one, two = given("focal", [2, 3]), given("focal", [2, 3], layers=1)
    groups = {"match": Hungarian(), "proposals": Hungarian(weight=0.0)}
    losses = one.criterion(groups=groups)({"match": one.predictions, "proposals": two.predictions}, one.targets)
    assert "proposals/0/class" in losses.parts
    torch.testing.assert_close(losses.total, one.naive_total(), rtol=1e-7, atol=1e-9)


def test_groups_and_weights_that_make_no_sense(given: Given) -> None:
    one = given("focal", [1])
    with pytest.raises(
        ValueError, match=r"a group 'dn', and criterion\.groups has only \['match', 'proposals', 'denoise'\]"
    ):
        one.criterion()({"dn": one.predictions}, one.targets)
    with pytest.raises(ValueError, match=r"criterion\.weights\.gioo: there is no such loss; did you mean 'giou'"):
        one.criterion(weights={"class": 1, "l1": 1, "gioo": 1})
    with pytest.raises(ValueError, match=r"criterion\.losses\.l1 has no weight: pass criterion\.weights\.l1"):
        one.criterion(losses={"l1": L1Loss()}, weights={})
    with pytest.raises(ValueError, match="all zero: nothing would be trained"):
        one.criterion(losses={"l1": L1Loss()}, weights={"l1": 0})
