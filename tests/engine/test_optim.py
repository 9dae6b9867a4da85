from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from detfamily.engine.distributed import World
from detfamily.engine.optim import (
    AdamW,
    Ema,
    FiniteGuard,
    RunningStatistics,
    assign,
    clip_gradients,
    gated_step,
    load_moments,
    moments,
    set_lr,
)
from detfamily.errors import ConfigError, NonFiniteError


class Toy(nn.Module):
    """The names of a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.sampling_offsets = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.sampling_offsets(self.backbone(x)))


BACKBONE = {"pattern": r"^backbone\.", "lr_factor": 0.1}
SAMPLING = {"pattern": "sampling_offsets", "lr_factor": 0.5, "weight_decay": 0.0}


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy()


def names_of(model, group):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


def test_each_trainable_parameter_is_in_exactly_one_group_with_its_settings():
    model = toy()
    model.head.bias.requires_grad_(False)
    optimizer = AdamW(lr=1e-3, weight_decay=1e-2, groups={"backbone": BACKBONE, "sampling": SAMPLING}).build(model)
    found = {(round(g["lr"], 9), g["weight_decay"]): names_of(model, g) for g in optimizer.param_groups}
    assert found == {
        (1e-3, 1e-2): {"head.weight"},
        (1e-4, 1e-2): {f"backbone.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")},
        (5e-4, 0.0): {"sampling_offsets.weight", "sampling_offsets.bias"},
    }


def test_a_group_may_take_all_parameters_of_few_axes():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 4, bias=False))
    model.scale = torch.nn.Parameter(torch.zeros(()))
    groups = {"flat": {"pattern": "2.weight", "max_dim": 1, "weight_decay": 0.0}}
    found = assign(model, AdamW(lr=1.0, groups=groups).groups)
    assert set(found["flat"]) == {"scale", "0.bias", "1.weight", "1.bias", "2.weight"}
    assert set(found["default"]) == {"0.weight"}
    found = assign(model, AdamW(lr=1.0, groups={"named": {"pattern": "2.weight"}}).groups)
    assert set(found["named"]) == {"2.weight"}
    alone = {"flat": {"pattern": "no such name", "max_dim": 0}}
    assert set(assign(model, AdamW(lr=1.0, groups=alone).groups)["flat"]) == {"scale"}


def test_groups_with_equal_settings_are_merged():
    groups = {"backbone": BACKBONE, "sampling": {"pattern": "sampling", "lr_factor": 0.1}}
    assert len(AdamW(lr=1e-3, groups=groups).build(toy()).param_groups) == 2
    assert len(AdamW(lr=1e-3).build(toy()).param_groups) == 1


def test_a_parameter_of_two_groups_is_an_error_that_names_both():
    with pytest.raises(ConfigError, match=r"sampling_offsets.weight .*sampling.*second .*disjoint"):
        AdamW(lr=1e-3, groups={"sampling": SAMPLING, "second": {"pattern": "offsets"}}).build(toy())


def test_a_pattern_without_a_match_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'sampling_offsets'"):
        AdamW(lr=1e-3, groups={"sampling": {"pattern": "sampling_ofsets"}}).build(toy())


def test_a_group_of_frozen_parameters_is_no_error_and_empty():
    model = toy()
    model.backbone.requires_grad_(False)
    recipe = AdamW(lr=1e-3, groups={"backbone": BACKBONE})
    assert assign(model, recipe.groups)["backbone"] == {}
    assert len(recipe.build(model).param_groups) == 1


def test_a_group_set_to_null_is_gone():
    assert AdamW(lr=1e-3, groups={"backbone": None}).groups == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0}, "optimizer.lr is 0"),
        ({"lr": 1e-3, "weight_decay": -1}, "weight_decay is -1"),
        ({"lr": 1e-3, "betas": [0.9]}, "expected two numbers"),
        ({"lr": 1e-3, "clip_norm": 0}, "null for no clipping"),
        ({"lr": 1e-3, "ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"lr": 1e-3, "groups": {"a": {"patern": "x"}}}, "did you mean 'pattern'"),
        ({"lr": 1e-3, "groups": {"a": {"lr_factor": 1}}}, "has no pattern"),
        ({"lr": 1e-3, "groups": {"a": {"pattern": "("}}}, "no regular expression"),
        ({"lr": 1e-3, "groups": {"a": {"pattern": "x", "lr_factor": -1}}}, "must not be negative"),
        ({"lr": 1e-3, "groups": {"default": {"pattern": "x"}}}, "this name is taken"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        AdamW(**settings)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        AdamW(lr=1e-3).build(toy().requires_grad_(False))


def test_the_schedule_scales_every_group():
    optimizer = AdamW(lr=1e-3, groups={"backbone": BACKBONE}).build(toy())
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.25)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.25e-4, 0.25e-3])


def test_clipping_against_hand_computed_values():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    unused = nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients([first, second, unused], 1.0).item() == pytest.approx(5.0)
    assert first.grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert second.grad.tolist() == pytest.approx([0.8], abs=1e-5)
    assert clip_gradients([first, second], None).item() == pytest.approx(1.0, abs=1e-5)
    assert first.grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)


def backward(model):
    torch.manual_seed(7)
    model.zero_grad()
    model(torch.randn(6, 3)).square().sum().backward()


def everything(model, optimizer):
    return [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(steps_before):
    model = toy()
    optimizer = AdamW(lr=1e-2, groups={"backbone": BACKBONE}).build(model)
    for _ in range(steps_before):
        backward(model)
        gated_step(optimizer, torch.tensor(True))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    kept = copy.deepcopy(moments(model, optimizer))
    backward(model)
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    gated_step(optimizer, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for name, state in kept.items():
        assert all(torch.equal(value, moments(model, optimizer)[name][key]) for key, value in state.items())


def test_a_finite_step_is_torch_adamw():
    ours, theirs = toy().eval(), toy().eval()  # batch statistics would cancel a bias, whose gradient is then noise
    optimizer = AdamW(lr=1e-2, weight_decay=0.1).build(ours)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=False, foreach=False)
    for _ in range(3):
        backward(ours)
        backward(theirs)
        gated_step(optimizer, torch.tensor(True))
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_moments_follow_their_parameters_into_other_groups():
    model = toy()
    optimizer = AdamW(lr=1e-2).build(model)
    backward(model)
    gated_step(optimizer, torch.tensor(True))
    other = AdamW(lr=1e-2, groups={"head": {"pattern": "head"}, "backbone": BACKBONE}).build(model)
    load_moments(model, other, moments(model, optimizer))
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)


def test_ema_against_hand_computed_values():
    model = nn.BatchNorm1d(1)
    ema = Ema(model, decay=0.5)
    expected_weight = expected_mean = None
    for n, value in enumerate([1.0, 3.0, 7.0, 2.0]):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(-value)
        ema.update(model)
        decay = 0.0 if n == 0 else min(0.5, (1 + n) / (10 + n))
        expected_weight = value if n == 0 else decay * expected_weight + (1 - decay) * value
        expected_mean = -value if n == 0 else decay * expected_mean - (1 - decay) * value
    assert ema.model.weight.item() == pytest.approx(expected_weight)
    assert ema.model.running_mean.item() == pytest.approx(expected_mean)
    assert ema.updates == 4
    assert not ema.model.training and not ema.model.weight.requires_grad
    assert model.weight.requires_grad


def test_ema_goes_on_from_its_state():
    model = toy()
    whole, first = Ema(model, 0.9), Ema(model, 0.9)
    for step in range(6):
        with torch.no_grad():
            model.head.weight.add_(0.1 * step)
        whole.update(model)
        if step == 3:
            second = Ema(toy(seed=1), 0.9)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            first = second
        first.update(model)
    for a, b in zip(whole.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


def board(guard, loss=1.0, norm=1.0, step=5):
    return bool(guard.board(torch.tensor(loss), torch.tensor(norm), step, [11, 12]))


NAN, INF = float("nan"), float("inf")


def test_the_guard_lets_finite_steps_through_in_silence(capsys):
    guard = FiniteGuard(World(), skip=False)
    assert board(guard)
    guard.look(np.array([1.0, 1.0]))
    guard.look()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("loss", "norm", "what"), [(NAN, 1.0, "the loss"), (1.0, INF, "a gradient")])
def test_the_guard_stops_with_step_and_images(loss, norm, what):
    guard = FiniteGuard(World(), skip=False)
    assert not board(guard, loss, norm)
    with pytest.raises(NonFiniteError, match=f"step 5: {what} is not finite .images 11, 12.*on_non_finite=skip"):
        guard.look()


def test_the_guard_skips_but_not_forever(capsys):
    guard = FiniteGuard(World(), skip=True)
    for _ in range(FiniteGuard.PATIENCE - 1):
        assert not board(guard, NAN)
        guard.look()
    assert capsys.readouterr().out.count("the weights were left as they were") == FiniteGuard.PATIENCE - 1
    board(guard, NAN)
    with pytest.raises(NonFiniteError, match="steps in a row"):
        guard.look()


def test_the_guard_explains_what_it_reports():
    guard = FiniteGuard(World(), skip=False, explain=lambda: "First is the third")
    board(guard, NAN)
    with pytest.raises(NonFiniteError, match="left as they were. First is the third. To leave such steps out"):
        guard.look()


@pytest.mark.parametrize("finite", [True, False])
def test_running_statistics_keep_no_trace_of_a_step_that_was_not_finite(finite):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    statistics = RunningStatistics(model)
    model(torch.rand(2, 3, 5, 5))
    statistics.remember()
    before = [one.clone() for one in model.buffers()]
    model(torch.full((2, 3, 5, 5), 1.0 if finite else NAN))
    statistics.settle(torch.tensor(finite))
    assert [torch.equal(one, other) for one, other in zip(before, model.buffers(), strict=True)] == [not finite] * 3
    assert all(one.isfinite().all() for one in model.buffers())


def test_a_finite_step_ends_the_row():
    guard = FiniteGuard(World(), skip=True)
    for loss in [NAN] * (FiniteGuard.PATIENCE - 1) + [1.0] + [NAN] * (FiniteGuard.PATIENCE - 1):
        board(guard, loss)
        guard.look()
    assert guard.in_a_row == FiniteGuard.PATIENCE - 1


def test_overflowing_scaled_gradients_are_no_event_until_they_do_not_end(capsys):
    guard = FiniteGuard(World(), skip=False, scaled=True)
    for _ in range(FiniteGuard.PATIENCE - 1):
        assert not board(guard, norm=INF)
        guard.look()
    assert capsys.readouterr().out == ""
    board(guard, norm=INF)
    with pytest.raises(NonFiniteError, match="in a row"):
        guard.look()
