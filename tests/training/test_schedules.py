import pytest

from helpers.training.schedules import SHAPES, LearningRate

HIGHEST, END, STEPS = 4e-5, 4e-6, 101


def rate(schedule: str, **settings: float) -> LearningRate:
    return LearningRate(schedule, HIGHEST, END, **{"warmup_steps": 0, "total_steps": STEPS, **settings})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_decays_start_at_the_highest_rate_and_reach_the_end_at_the_last_step(schedule, warmup_steps):
    decay = rate(schedule, warmup_steps=warmup_steps)
    assert decay.at(warmup_steps) == pytest.approx(HIGHEST)
    assert decay.at(STEPS - 1) == pytest.approx(END)
    rates = [decay.at(step) for step in range(warmup_steps, STEPS)]
    assert rates == sorted(rates, reverse=True)


def test_sine_comes_down_to_the_end_in_its_valley_and_up_again():
    rates = [rate("sine").at(step) for step in range(STEPS)]
    assert rates[0] == rates[-1] == pytest.approx(HIGHEST)
    assert min(rates) == rates[50] == pytest.approx(END)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_constant_schedules_stay_at_the_highest_rate(schedule):
    assert {rate(schedule, warmup_steps=0).at(step) for step in range(STEPS)} == {HIGHEST}


@pytest.mark.parametrize("schedule", sorted(SHAPES.keys() - {"constant"}))
def test_warm_up_rises_evenly_from_above_zero(schedule):
    rising = [rate(schedule, warmup_steps=4).at(step) for step in range(5)]
    assert rising == pytest.approx([HIGHEST * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])


def test_polynomial_follows_its_power():
    assert rate("polynomial", power=2.0).at(50) == pytest.approx(END + (HIGHEST - END) / 4)


@pytest.mark.parametrize("schedule", sorted(SHAPES))
@pytest.mark.parametrize("steps, warmup_steps", [(1, 0), (1, 5), (5, 5), (2, 0)])
def test_runs_of_a_few_steps_have_a_rate_between_the_bounds(schedule, steps, warmup_steps):
    short = rate(schedule, total_steps=steps, warmup_steps=warmup_steps)
    assert all(0 < short.at(step) <= HIGHEST for step in range(steps))
