from __future__ import annotations

import math

import pytest
import torch

from detfamily.engine.distributed import World
from detfamily.engine.meter import LossMeter


def scalars(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_micro_batches_add_up_and_steps_are_averaged():
    meter = LossMeter(World())
    for step in ([1.0, 2.0], [5.0]):
        for value in step:
            meter.add(scalars(loss=value, part=10 * value))
        meter.step_done()
    assert meter.read() == pytest.approx({"loss": 4.0, "part": 40.0})
    assert meter.read() == {}
    meter.add(scalars(loss=1.0, part=1.0))
    meter.step_done()
    assert meter.read() == pytest.approx({"loss": 1.0, "part": 1.0})
    assert meter.epoch() == pytest.approx({"loss": 3.0, "part": 27.0})
    meter.reset()
    assert meter.epoch() == {}


def test_values_that_are_not_finite_are_left_out():
    meter = LossMeter(World())
    for value in (2.0, float("nan"), float("inf"), 4.0):
        meter.add(scalars(loss=value))
        meter.step_done()
    assert meter.read() == {"loss": 3.0}
    meter.add(scalars(loss=float("nan")))
    meter.step_done()
    assert math.isnan(meter.read()["loss"])


def test_parts_may_come_and_go():
    meter = LossMeter(World())
    for parts in (scalars(a=1.0), scalars(a=3.0, b=5.0), {}):
        meter.add(parts)
        meter.step_done()
    # Two rows of names hold "a": the sums of both belong to it.
    assert meter.read() == pytest.approx({"a": 2.0, "b": 5.0})


def test_an_epoch_goes_on_from_its_state():
    meter, other = LossMeter(World()), LossMeter(World())
    meter.add(scalars(loss=1.0))
    meter.step_done()
    meter.read()
    other.load_state_dict(meter.state_dict())
    for one in (meter, other):
        one.add(scalars(loss=2.0))
        one.step_done()
        one.read()
    assert other.epoch() == meter.epoch() == {"loss": 1.5}


def summed_up(world=None):
    meter = LossMeter(world or World())
    for value in (1.0, 0.1):
        meter.add(scalars(loss=value))
        meter.step_done()
    return meter


def test_a_window_goes_on_in_the_middle_with_the_same_bits():
    whole, first, second = summed_up(), summed_up(), LossMeter(World())
    second.load_state_dict(first.state_dict(), [first.window()])
    for meter in (whole, second):
        meter.add(scalars(loss=0.7))
        meter.step_done()
    assert second.read() == whole.read() and second.epoch() == whole.epoch()


def test_the_windows_of_other_processes_are_not_lost():
    states = [summed_up().window() for _ in range(3)]
    meter = LossMeter(World())
    meter.load_state_dict({}, states)
    ((names, sums),) = meter.window()
    assert names == ["loss"] and sums[:, 0].tolist() == pytest.approx([3.3, 6.0])
    other = LossMeter(World(rank=1, size=2))
    other.load_state_dict({}, states)
    assert other.window() == []
    same = LossMeter(World(rank=1, size=3))
    same.load_state_dict({}, states)
    assert torch.equal(same.window()[0][1], states[1][0][1])
