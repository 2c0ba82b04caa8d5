"""What the UNet's output is held against, for both predictions."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import Schedule, add_noise, at, schedule_from_betas, velocity
from helpers.diffusion.objective import EpsilonObjective, VelocityObjective
from helpers.diffusion.weighting import min_snr, signal_to_noise

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OBJECTIVES = {
    "epsilon": lambda schedule, weights: EpsilonObjective(schedule, False, weights),
    "v_prediction": VelocityObjective,
}
STEPS = 600
OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}


@pytest.fixture
def schedule() -> Schedule:
    return schedule_from_betas(DDPMScheduler(**SD).betas)


def batch(count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(count, 4, 4, 4, generator=generator) for _ in range(2))
    return x_0, eps, torch.randint(1000, (count,), generator=generator)


def test_velocity_is_that_of_diffusers(schedule):
    x_0, eps, t = batch()
    theirs = DDPMScheduler(**SD, prediction_type="v_prediction").get_velocity(x_0, eps, t)
    torch.testing.assert_close(velocity(schedule, x_0, eps, t), theirs)


def test_velocity_and_x_t_give_x_0_and_eps_back(schedule):
    x_0, eps, t = batch()
    x_t, v = add_noise(schedule, x_0, eps, t), velocity(schedule, x_0, eps, t)
    signal, noise = at(schedule.sqrt_alphas_cumprod, t), at(schedule.sqrt_one_minus_alphas_cumprod, t)
    torch.testing.assert_close(signal * x_t - noise * v, x_0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise * x_t + signal * v, eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_v_are_those_of_the_same_error_in_epsilon(schedule, soft):
    """v's error is eps's over the signal: (v - v_hat)^2 = (snr + 1) / snr (eps - eps_hat)^2 at the same x_t."""
    snr = signal_to_noise(schedule)
    of_v, of_epsilon = (min_snr(schedule, 5, soft, of_velocity) for of_velocity in (True, False))
    torch.testing.assert_close(of_v * (snr + 1) / snr, of_epsilon, rtol=1e-4, atol=1e-5)


def test_with_zero_terminal_snr_all_weights_are_finite():
    schedule = schedule_from_betas(DDPMScheduler(**SD, rescale_betas_zero_snr=True).betas)
    assert schedule.sqrt_alphas_cumprod[-1] == 0
    for of_velocity in (False, True):
        for soft in (False, True):
            assert min_snr(schedule, 5, soft, of_velocity).isfinite().all()
    x_0, eps, _ = batch(2)
    last = torch.tensor([999, 999])
    torch.testing.assert_close(velocity(schedule, x_0, eps, last), -x_0)


class Affine(nn.Module):
    """The smallest model that can learn one picture at all timesteps: a (t) x_t + b (t) picture, its tables learned."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.zeros(shape))
        self.of_x_t, self.of_picture = (nn.Embedding(1000, 1) for _ in range(2))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        scale, share = (table(t).reshape(-1, 1, 1, 1) for table in (self.of_x_t, self.of_picture))
        return scale * x_t + share * self.picture


@pytest.fixture(scope="module", params=OBJECTIVES)
def learned(request) -> tuple[str, Affine, torch.Tensor]:
    """A model that was trained on one picture, with what it predicts."""
    torch.manual_seed(0)
    schedule = schedule_from_betas(DDPMScheduler(**SD).betas)
    objective = OBJECTIVES[request.param](schedule, torch.ones(1000))
    picture, draws = torch.randn(1, 4, 4, 4), Draws(torch.Generator().manual_seed(1))
    model = Affine(picture.shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=STEPS)
    for _ in range(STEPS):
        x_0, t = picture.expand(256, -1, -1, -1), 50 * draws.integers(20, 256) + 49  # those that are sampled at
        eps = draws.normal(x_0.shape)
        x_t = add_noise(schedule, x_0, eps, t)
        objective(model(x_t, t), x_0, x_t, eps, t).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return request.param, model, picture


def sampled(model: Affine, prediction: str, shape: torch.Size) -> torch.Tensor:
    scheduler = DDIMScheduler(**SD, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = torch.randn(8, *shape[1:], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(8)), t, x).prev_sample
    return x


def test_a_model_learns_what_it_is_asked_to_predict_and_no_other_thing(learned):
    prediction, model, picture = learned
    right = (sampled(model, prediction, picture.shape) - picture).abs().mean()
    wrong = (sampled(model, OTHER[prediction], picture.shape) - picture).abs().mean()
    assert right < 0.04 and wrong > 2 * right
