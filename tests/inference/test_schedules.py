"""The published step schedules: known here without diffusers, and what diffusers has."""

from __future__ import annotations

import pytest

from helpers.config.inference_options import SCHEDULES
from helpers.inference.schedules import timesteps_of


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_noise_to_the_picture_in_so_many_steps(name):
    timesteps = timesteps_of(name)
    assert len(timesteps) == SCHEDULES[name]
    assert timesteps == sorted(set(timesteps), reverse=True) and timesteps[0] == 999 and timesteps[-1] == 0
