from itertools import pairwise
from typing import get_args

import pytest

from helpers.config.options import OptimizerOptions
from helpers.training.schedules import SHAPES, LearningRate

HIGHEST, END, STEPS = 4e-5, 4e-6, 101
DECAYS = ["linear", "polynomial", "cosine", "cosine_with_restarts"]


def rate(schedule: str, **settings: float) -> LearningRate:
    return LearningRate(schedule, HIGHEST, END, **{"warmup_steps": 0, "total_steps": STEPS, **settings})


def rates_of(schedule: str, **settings: float) -> list[float]:
    """The rates after the warm-up."""
    whole = rate(schedule, **settings)
    return [whole.at(step) for step in range(whole.warmup_steps, whole.total_steps)]


def is_near(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, rel=1e-9)


def valleys(rates: list[float]) -> list[float]:
    """The lowest rate of each descent."""
    falls = [after < before for before, after in pairwise(rates)] + [False]
    return [rates[step] for step in range(1, len(rates)) if falls[step - 1] and not falls[step]]


def test_the_table_of_options_names_just_these_schedules():
    assert set(SHAPES) == set(get_args(OptimizerOptions.model_fields["lr_scheduler"].annotation))


@pytest.mark.parametrize("schedule", DECAYS)
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_decays_start_at_the_highest_rate_and_reach_the_end_at_the_last_step(schedule, warmup_steps):
    rates = rates_of(schedule, warmup_steps=warmup_steps)
    assert is_near(rates[0], HIGHEST) and is_near(rates[-1], END)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("total_steps", [100, 101, 97])
@pytest.mark.parametrize("warmup_steps", [0, 7])
@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", ["sine", "cosine", "cosine_with_restarts"])
def test_every_valley_goes_down_to_the_end_exactly_whatever_the_steps(schedule, cycles, warmup_steps, total_steps):
    rates = rates_of(schedule, cycles=cycles, warmup_steps=warmup_steps, total_steps=total_steps)
    lowest = valleys(rates)
    assert len(lowest) == cycles and all(is_near(value, END) for value in lowest)
    assert sum(is_near(value, HIGHEST) for value in rates) == (cycles + 1 if schedule == "sine" else cycles)
    assert is_near(rates[0], HIGHEST)
    assert is_near(rates[-1], HIGHEST if schedule == "sine" else END)


def test_sine_and_cosine_are_smooth_and_restarts_jump_up():
    largest_rise = {
        schedule: max(after - before for before, after in pairwise(rates_of(schedule, cycles=3)))
        for schedule in ("sine", "cosine", "cosine_with_restarts")
    }
    assert max(largest_rise["sine"], largest_rise["cosine"]) < 0.15 * (HIGHEST - END)
    assert is_near(largest_rise["cosine_with_restarts"], HIGHEST - END)


def test_half_a_wave_of_the_sine_ends_in_its_valley():
    rates = rates_of("sine", cycles=1.5)
    assert len(valleys(rates)) == 2 and is_near(rates[-1], END)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_constant_schedules_stay_at_the_highest_rate(schedule):
    assert set(rates_of(schedule)) == {HIGHEST}


@pytest.mark.parametrize("schedule", sorted(SHAPES.keys() - {"constant"}))
def test_warm_up_rises_evenly_from_above_zero(schedule):
    rising = [rate(schedule, warmup_steps=4).at(step) for step in range(5)]
    assert rising == pytest.approx([HIGHEST * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])


def test_polynomial_follows_its_power():
    assert rate("polynomial", power=2.0).at(50) == pytest.approx(END + (HIGHEST - END) / 4)


@pytest.mark.parametrize("schedule", sorted(SHAPES))
@pytest.mark.parametrize("steps, warmup_steps", [(1, 0), (1, 5), (5, 5), (2, 0), (3, 0)])
@pytest.mark.parametrize("cycles", [1, 5])
def test_runs_of_a_few_steps_have_a_rate_between_the_bounds(schedule, steps, warmup_steps, cycles):
    short = rate(schedule, total_steps=steps, warmup_steps=warmup_steps, cycles=cycles)
    assert all(0 < short.at(step) <= HIGHEST for step in range(steps))
