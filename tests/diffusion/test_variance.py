"""The variational bound, against numbers derived here by numerical integration and by the standard library."""

import math
from statistics import NormalDist

import pytest
import torch
from diffusers import DDPMScheduler

from helpers.diffusion.noising import add_noise, schedule_from_betas
from helpers.diffusion.objective import EpsilonObjective
from helpers.diffusion.variance import discretised_log_likelihood, log_variance, normal_kl, variational_bound


@pytest.fixture(scope="module")
def schedule():
    return schedule_from_betas(DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").betas)


def scalar(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


@pytest.mark.parametrize("moments", [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.8), (1.0, 0.1, 1.1, 0.12)])
def test_kl_is_the_integral_of_p_log_p_over_q(moments):
    mean_1, std_1, mean_2, std_2 = moments
    p, q = NormalDist(mean_1, std_1), NormalDist(mean_2, std_2)
    width = std_1 / 500
    points = [mean_1 + width * i for i in range(-4000, 4001)]
    integral = sum(p.pdf(x) * math.log(p.pdf(x) / q.pdf(x)) for x in points) * width
    kl = normal_kl(scalar(mean_1), scalar(2 * math.log(std_1)), scalar(mean_2), scalar(2 * math.log(std_2)))
    assert kl.item() == pytest.approx(integral, abs=1e-4)


@pytest.mark.parametrize("x_0, mean, std", [(0.0, 0.01, 0.02), (0.5, 0.45, 0.1), (-1.0, -0.9, 0.05), (1.0, 1.05, 0.1)])
def test_likelihood_is_the_mass_of_the_8_bit_bin(x_0, mean, std):
    normal = NormalDist(mean, std)
    upper = 1.0 if x_0 == 1 else normal.cdf(x_0 + 1 / 255)
    lower = 0.0 if x_0 == -1 else normal.cdf(x_0 - 1 / 255)
    found = discretised_log_likelihood(scalar(x_0), scalar(mean), scalar(2 * math.log(std)))
    assert found.item() == pytest.approx(math.log(upper - lower), rel=1e-3)


def test_the_8_bit_bins_share_out_all_of_the_probability():
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(256, 1, 1, 1)
    log_likelihood = discretised_log_likelihood(levels, scalar(0.2).double(), scalar(2 * math.log(0.3)).double())
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_v_runs_from_the_posterior_variance_to_beta(schedule):
    t = torch.tensor([700])
    assert log_variance(schedule, scalar(-1.0), t).item() == pytest.approx(schedule.posterior_log_variance[700].item())
    assert log_variance(schedule, scalar(1.0), t).item() == pytest.approx(schedule.log_betas[700].item())


def test_bound_is_zero_for_the_true_noise_and_the_true_variance(schedule):
    x_0, eps, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.tensor([1, 50, 500, 900])
    x_t = add_noise(schedule, x_0, eps, t)
    bound = variational_bound(schedule, x_0, x_t, t, eps, torch.full_like(eps, -1.0))
    assert bound.abs().max().item() < 1e-3
    wrong = variational_bound(schedule, x_0, x_t, t, eps, torch.full_like(eps, 0.5))
    assert (wrong > bound).all()


@pytest.mark.parametrize("t", [0, 1, 30, 400, 999])
def test_bound_agrees_with_a_scalar_derivation(schedule, t):
    x_0, eps, eps_hat, v = 0.21, 0.7, 0.55, -0.3
    betas = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").betas.double()
    ac = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), ac])[t]
    beta, alpha_bar = betas[t], ac[t]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    guess = (x_t - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()
    c1 = beta * previous.sqrt() / (1 - alpha_bar)
    c2 = (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar)
    index = max(t, 1)
    pv = betas[index] * (1 - ac[index - 1]) / (1 - ac[index])
    fraction = (v + 1) / 2
    log_var = fraction * beta.log() + (1 - fraction) * pv.log()
    mean, true_mean = c1 * guess + c2 * x_t, c1 * x_0 + c2 * x_t
    if t == 0:
        normal = NormalDist(mean.item(), math.exp(log_var.item() / 2))
        nats = -math.log(max(normal.cdf(x_0 + 1 / 255) - normal.cdf(x_0 - 1 / 255), 1e-12))
    else:
        ratio = (pv.log() - log_var).item()
        nats = 0.5 * (math.exp(ratio) - 1 - ratio + (true_mean - mean).item() ** 2 / math.exp(log_var.item()))
    found = variational_bound(schedule, scalar(x_0), scalar(x_t.item()), torch.tensor([t]), scalar(eps_hat), scalar(v))
    assert found.item() == pytest.approx(nats / math.log(2), rel=2e-2, abs=1e-4)


def test_the_bound_trains_the_variance_and_not_the_mean(schedule):
    eps_hat, v = torch.randn(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 3, 4, 4, requires_grad=True)
    x_0 = torch.rand(2, 3, 4, 4) * 2 - 1
    t = torch.tensor([100, 600])
    x_t = add_noise(schedule, x_0, torch.randn_like(x_0), t)
    variational_bound(schedule, x_0, x_t, t, eps_hat, v).sum().backward()
    assert eps_hat.grad is None
    assert v.grad.abs().sum() > 0


def test_objective_is_the_mean_squared_error_plus_the_bound(schedule):
    x_0, eps, t = torch.rand(3, 3, 4, 4) * 2 - 1, torch.randn(3, 3, 4, 4), torch.tensor([5, 300, 800])
    x_t, output = add_noise(schedule, x_0, eps, t), torch.randn(3, 6, 4, 4)
    eps_hat, v = output[:, :3], output[:, 3:]
    plain = ((eps - eps_hat) ** 2).mean()
    bound = variational_bound(schedule, x_0, x_t, t, eps_hat, v).mean()
    both = EpsilonObjective(schedule, True, torch.ones(1000))(output, x_0, x_t, eps, t)
    assert both.item() == pytest.approx((plain + bound).item(), rel=1e-6)
    for untrained in (eps_hat, output):
        only = EpsilonObjective(schedule, False, torch.ones(1000))(untrained, x_0, x_t, eps, t)
        assert only.item() == pytest.approx(plain.item(), rel=1e-6)
