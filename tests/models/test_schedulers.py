"""Samplers for models whose UNet predicts a variance too."""

from __future__ import annotations

import pytest
import torch

from helpers.models.schedulers import SAMPLERS, sampler


@pytest.mark.parametrize("name", [None, "ddpm"])
def test_ddpm_keeps_the_learned_variance(tiny_model, name):
    assert sampler(name, tiny_model, {}).config.variance_type == "learned_range"


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"ddpm", "euler", "euler-a"}))
def test_other_samplers_of_if_get_no_variance_and_keep_the_thresholding(tiny_model, name):
    """Euler's have no thresholding: IF is not offered them."""
    made = sampler(name, tiny_model, {})
    assert made.config.variance_type == "fixed_small"
    assert made.config.thresholding and made.config.sample_max_value == 1.5
    assert made.config.dynamic_thresholding_ratio == 0.95


def test_dpm_solver_begins_where_a_cosine_schedule_has_signal(tiny_model):
    made = sampler("dpm++", tiny_model, {})
    assert made.config.lambda_min_clipped == -5.1
    made.set_timesteps(20)
    assert torch.isfinite(made.sigmas[:-1]).all() and made.timesteps[0] < 999


def test_a_change_is_heeded_and_the_own_kind_kept(tiny_sd):
    made = sampler(None, tiny_sd, {"clip_sample": False, "prediction_type": "v_prediction"})
    assert made.config.prediction_type == "v_prediction" and type(made).__name__ == "PNDMScheduler"


def test_a_scheduler_that_diffusers_has_not_is_refused(tiny_sd, tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = (tiny_sd / "scheduler" / "scheduler_config.json").read_text("utf-8")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(config.replace("PNDMScheduler", "os"), "utf-8")
    with pytest.raises(ValueError, match="none of diffusers'"):
        sampler(None, tmp_path, {})
