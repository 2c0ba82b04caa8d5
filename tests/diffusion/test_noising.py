"""The forward process, against numbers derived here in float64 from the cosine schedule's definition."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import add_noise, gaussian, posterior_mean, predict_x_0, schedule_from_betas

SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def cosine_betas() -> list[float]:
    """Improved DDPM eq. 17, capped at 0.999."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]


def alphas_cumprod() -> list[float]:
    product, table = 1.0, []
    for beta in cosine_betas():
        product *= 1 - beta
        table.append(product)
    return table


@pytest.fixture(scope="module")
def schedule():
    return schedule_from_betas(DDPMScheduler(**SCHEDULER).betas)


@pytest.mark.parametrize("t", [0, 1, 20, 52, 500, 998, 999])
def test_add_noise_is_exact_at_every_timestep(schedule, t):
    x_0, eps = torch.full((1, 3, 2, 2), 0.37), torch.full((1, 3, 2, 2), -1.21)
    ac = alphas_cumprod()[t]
    expected = math.sqrt(ac) * 0.37 - math.sqrt(1 - ac) * 1.21
    x_t = add_noise(schedule, x_0, eps, torch.tensor([t]))
    assert x_t.dtype == torch.float32
    assert x_t.flatten().tolist() == pytest.approx([expected] * 12, rel=1e-4)


def test_noise_is_added_at_low_timesteps_where_bfloat16_adds_none(schedule):
    x_0, eps = torch.full((1, 1, 1, 1), 0.5), torch.ones(1, 1, 1, 1)
    added = [(add_noise(schedule, x_0, eps, torch.tensor([t])) - x_0).abs().item() for t in range(21)]
    assert min(added) > 0.005
    assert schedule.sqrt_one_minus_alphas_cumprod.dtype == torch.float32


def test_predict_x_0_inverts_add_noise(schedule):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(8, 3, 4, 4, generator=generator), torch.randn(8, 3, 4, 4, generator=generator)
    t = torch.arange(0, 960, 120)
    x_t = add_noise(schedule, x_0, eps, t)
    torch.testing.assert_close(predict_x_0(schedule, x_t, eps, t), x_0, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_mean_agrees_with_bayes_rule(schedule, t):
    """q(x_{t-1}|x_t, x_0) from the product of the two Gaussians N(sqrt(ac_prev) x_0, .) and N(x_t / sqrt(alpha), .)."""
    betas, ac = cosine_betas(), alphas_cumprod()
    x_0, x_t, beta, alpha = 0.3, -0.8, betas[t], 1 - betas[t]
    precision_prior, precision_likelihood = 1 / (1 - ac[t - 1]), alpha / beta
    expected = (math.sqrt(ac[t - 1]) * x_0 * precision_prior + x_t / math.sqrt(alpha) * precision_likelihood) / (
        precision_prior + precision_likelihood
    )
    mean = posterior_mean(schedule, torch.full((1, 1, 1, 1), x_0), torch.full((1, 1, 1, 1), x_t), torch.tensor([t]))
    assert mean.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    variance = 1 / (precision_prior + precision_likelihood)
    assert schedule.posterior_log_variance[t].item() == pytest.approx(math.log(variance), abs=1e-3)
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


def test_offset_noise_is_drawn_afresh_for_each_channel_of_each_image():
    generator = torch.Generator().manual_seed(0)
    shape = (500, 3, 32, 32)
    plain, offset = (gaussian(shape, strength, Draws(generator)) for strength in (0.0, 0.5))
    assert plain.mean(dim=(2, 3)).std() == pytest.approx(1 / 32, rel=0.1)
    means = offset.mean(dim=(2, 3))
    assert means.std() == pytest.approx((0.5**2 + 1 / 32**2) ** 0.5, rel=0.1)
    assert abs(torch.corrcoef(means.T)[0, 1]) < 0.1, "channels are offset apart from each other"
    assert (offset - means[..., None, None]).std() == pytest.approx(1, rel=0.01)


def test_without_offset_the_noise_is_plain():
    drawn = gaussian((2, 3, 4, 4), 0.0, Draws(torch.Generator().manual_seed(1)))
    assert torch.equal(drawn, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
