from __future__ import annotations

import math

import pytest

from detfamily.engine.schedule import CosineSchedule, StepSchedule
from detfamily.errors import ConfigError

STEPS_PER_EPOCH = 10


def factors(schedule, steps):
    total = schedule.epochs * STEPS_PER_EPOCH
    return [schedule.factor(step, STEPS_PER_EPOCH, total) for step in steps]


def test_step_schedule_drops_at_the_start_of_the_epoch():
    schedule = StepSchedule(epochs=50, drop_epochs=[40], total_batch_size=2)
    assert factors(schedule, [0, 399, 400, 499]) == pytest.approx([1, 1, 0.1, 0.1])


def test_step_schedule_multiplies_drops_and_warms_up():
    schedule = StepSchedule(epochs=4, drop_epochs=[2, 3], drop_factor=0.5, warmup_steps=4, total_batch_size=2)
    assert factors(schedule, [0, 1, 2, 3, 4, 19, 20, 30]) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.25])


def test_cosine_schedule_against_hand_computed_values():
    schedule = CosineSchedule(epochs=10, warmup_steps=20, total_batch_size=2)
    assert factors(schedule, [0, 9, 19]) == pytest.approx([0.05, 0.5, 1.0])
    # 80 steps of half a cosine: full at its start, (1 + cos 60 degrees) / 2 after a third, half in the middle.
    assert factors(schedule, [20, 60, 100]) == pytest.approx([1.0, 0.5, 0.0])
    assert factors(schedule, [99])[0] == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))


def test_cosine_schedule_ends_at_its_final_factor_and_stays_there():
    schedule = CosineSchedule(epochs=3, warmup_fraction=0.1, final_factor=0.2, total_batch_size=2)
    assert schedule.warmup_length(30) == 3
    assert factors(schedule, [2, 3, 30, 40]) == pytest.approx([1.0, 1.0, 0.2, 0.2])


@pytest.mark.parametrize("schedule", [StepSchedule, CosineSchedule])
def test_no_warmup_starts_at_full_rate(schedule):
    assert factors(schedule(epochs=3, total_batch_size=2), [0]) == [1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StepSchedule(epochs=12, drop_epochs=[40], total_batch_size=2), r"40.*12 epochs.*drop_epochs=\[10\] "),
        (lambda: StepSchedule(epochs=2, drop_epochs=[40], total_batch_size=2), r"drop_epochs=\[1\] "),
        (lambda: StepSchedule(epochs=1, drop_epochs=[40], total_batch_size=2), r"drop_epochs=\[\] never"),
        (lambda: StepSchedule(epochs=12, drop_epochs=[12], total_batch_size=2), "never take effect"),
        (lambda: StepSchedule(epochs=12, drop_epochs=[0], total_batch_size=2), "has 0, but"),
        (lambda: StepSchedule(epochs=12, drop_epochs=[4], drop_factor=0, total_batch_size=2), "drop_factor"),
        (lambda: StepSchedule(epochs=0, total_batch_size=2), "epochs is 0"),
        (lambda: StepSchedule(epochs=1, total_batch_size=0), "total_batch_size is 0"),
        (lambda: StepSchedule(epochs=1, total_batch_size=8, images_per_epoch=7), "images_per_epoch is 7"),
        (lambda: StepSchedule(epochs=1, total_batch_size=8, warmup_steps=-1), "warmup_steps is -1"),
        (lambda: CosineSchedule(epochs=1, total_batch_size=8, warmup_steps=5, warmup_fraction=0.1), "set one of them"),
        (lambda: CosineSchedule(epochs=1, total_batch_size=8, warmup_fraction=1.0), "warmup_fraction is 1"),
        (lambda: CosineSchedule(epochs=1, total_batch_size=8, final_factor=-0.1), "final_factor is -0.1"),
    ],
)
def test_impossible_schedules_are_refused_with_the_reason(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_recipe_is_told_in_words():
    assert StepSchedule(epochs=50, drop_epochs=[40], total_batch_size=2).describe(100) == "x 0.1 after epoch 40"
    warm = CosineSchedule(epochs=5, warmup_fraction=0.5, total_batch_size=2)
    assert warm.describe(100) == "cosine to x 0 after 50 steps of warm-up"
