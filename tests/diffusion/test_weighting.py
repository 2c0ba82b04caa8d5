"""Min-SNR weights, by their formula and by what they do to a loss."""

import pytest
import torch
from diffusers import DDPMScheduler

from helpers.diffusion.noising import add_noise, schedule_from_betas
from helpers.diffusion.objective import EpsilonObjective
from helpers.diffusion.weighting import min_snr, signal_to_noise


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


@pytest.fixture(scope="module")
def schedule(scheduler):
    return schedule_from_betas(scheduler.betas)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_weights_are_their_formulas_at_every_timestep(scheduler, schedule, gamma):
    alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    hard, soft = min_snr(schedule, gamma), min_snr(schedule, gamma, soft=True)
    torch.testing.assert_close(hard.double(), torch.minimum(snr, torch.tensor(gamma)) / snr, rtol=1e-4, atol=0)
    torch.testing.assert_close(soft.double(), snr * gamma / (snr + gamma) / snr, rtol=1e-4, atol=0)


def test_without_gamma_all_timesteps_count_the_same(schedule):
    assert torch.equal(min_snr(schedule, 0), torch.ones(1000))
    assert torch.equal(min_snr(schedule, 0, soft=True), torch.ones(1000))


def test_the_ratio_falls_from_clear_to_noisy(schedule):
    snr = signal_to_noise(schedule)
    assert snr[0] > 1000 and 0 < snr[-1] < 1e-4
    assert (snr.diff() < 0).all()


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_of_a_batch_is_the_weighted_mean(schedule, soft):
    x_0, eps, t = torch.rand(3, 3, 4, 4) * 2 - 1, torch.randn(3, 3, 4, 4), torch.tensor([0, 300, 900])
    x_t, eps_hat = add_noise(schedule, x_0, eps, t), torch.randn(3, 3, 4, 4)
    weights = min_snr(schedule, 2.0, soft)
    objective = EpsilonObjective(schedule, False, weights)
    expected = sum(weights[step] * (a - b).square().mean() for a, b, step in zip(eps, eps_hat, t))
    assert objective(eps_hat, x_0, x_t, eps, t).item() == pytest.approx(expected.item() / 3, rel=1e-5)
