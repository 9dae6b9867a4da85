from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from detfamily.engine.runtime import Runtime, keep_freed_memory, plan, rng_state, seed_all, set_rng_state
from detfamily.engine.schedule import CosineSchedule, StepSchedule
from detfamily.errors import ConfigError


def schedule(total=16, **more):
    return StepSchedule(epochs=3, total_batch_size=total, **more)


def test_the_total_batch_is_spread_over_processes_and_micro_batches():
    made = plan(schedule(16), Runtime(batch_size_per_device=2), world_size=4, dataset_size=100)
    assert (made.batch_size_per_device, made.accumulation, made.steps_per_epoch) == (2, 2, 6)
    assert (made.total_batch_size, made.total_steps, made.total_images) == (16, 18, 288)
    assert made.describe_batch() == "16 = 2 images at once x 4 processes x 2 micro-batches"


def test_without_a_batch_per_device_each_process_takes_its_share_at_once():
    made = plan(schedule(16), Runtime(), world_size=2, dataset_size=100)
    assert (made.batch_size_per_device, made.accumulation) == (8, 1)
    assert plan(schedule(16), Runtime(), 1, 100).describe_batch() == "16"


def test_an_epoch_may_be_another_number_of_images_than_the_data_set():
    assert plan(schedule(16, images_per_epoch=500), Runtime(), 1, dataset_size=10).steps_per_epoch == 31


@pytest.mark.parametrize(
    ("total", "per_device", "world", "images", "words"),
    [
        (16, None, 3, 100, "multiple of 3 .the next is 18.*1, 2, 4, 8, 16"),
        (16, 3, 2, 100, "batch_size_per_device=3 does not divide the 8 images.*1, 2, 4, 8$"),
        (16, 16, 2, 100, "valid values: 1, 2, 4, 8$"),
        (16, None, 1, 15, "15 images, fewer than one step"),
    ],
)
def test_what_does_not_divide_is_refused_with_values_that_do(total, per_device, world, images, words):
    with pytest.raises(ConfigError, match=words):
        plan(schedule(total), Runtime(batch_size_per_device=per_device), world, images)


def test_a_warm_up_as_long_as_the_run_is_refused():
    long = CosineSchedule(epochs=2, total_batch_size=4, warmup_steps=10)
    with pytest.raises(ConfigError, match="warm-up of 10 steps.*10 steps"):
        plan(long, Runtime(), 1, dataset_size=20)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"device": "gpu"}, "runtime.device='gpu'"),
        ({"on_non_finite": "ignore"}, "stop"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"batch_size_per_device": 0}, "batch_size_per_device is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Runtime(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_when_it_is_needed():
    with pytest.raises(ConfigError, match="no CUDA device"):
        Runtime(device="cuda").apply()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_run_in_the_chosen_precision(precision, dtype):
    with Runtime(device="cpu", precision=precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_apply_sets_threads_and_determinism():
    before = torch.get_num_threads()
    try:
        Runtime(device="cpu", threads=1, deterministic=True).apply()
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
        Runtime(device="cpu").apply()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before)


def test_glibc_takes_the_memory_settings_or_there_is_no_glibc():
    import platform

    assert keep_freed_memory() == (platform.system() == "Linux" and platform.libc_ver()[0] == "glibc")


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_random_states_go_through_a_checkpoint(tmp_path):
    seed_all(3)
    draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = draw()
    seed_all(4)
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first
    seed_all(3)
    draw()
    assert draw() == first
