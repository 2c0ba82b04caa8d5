"""The forward process q(x_t | x_0) and the tables that training needs of it (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.diffusion.draws import Draws


@dataclass(frozen=True)
class Schedule:
    """Tables over the T timesteps, each `[T]` in float32, computed in float64.

    float32 is the least that works: with bfloat16 tables `add_noise` adds nothing at all for t = 0..20 on IF's schedule.
    """

    betas: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor  # of x_0 in the mean of q(x_{t-1} | x_t, x_0): DDPM eq. 7
    posterior_mean_coef2: Tensor  # of x_t in it
    log_betas: Tensor
    posterior_log_variance: Tensor  # log beta~_t, with t = 0 taken from t = 1, where it would be log 0

    @property
    def timesteps(self) -> int:
        return len(self.betas)

    def first(self, timesteps: int | None) -> Schedule:
        """The tables of the first so many timesteps; of all of them if that is None."""
        return Schedule(**{name: table[:timesteps] for name, table in vars(self).items()})

    def to(self, device: torch.device) -> Schedule:
        return Schedule(**{name: table.to(device) for name, table in vars(self).items()})


def schedule_from_betas(betas: Tensor) -> Schedule:
    """Build the tables from `betas` `[T]`, each in (0, 1), but that the last one may be 1."""
    betas = betas.detach().to("cpu", torch.float64)
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(0)
    alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1]
    tables = dict(
        betas=betas,
        sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
        posterior_mean_coef1=betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod),
        log_betas=betas.log(),
        posterior_log_variance=posterior_variance.log(),
    )
    return Schedule(**{name: table.float() for name, table in tables.items()})


def at(table: Tensor, t: Tensor) -> Tensor:
    """The table's values at timesteps `t` `[B]`, shaped `[B, 1, 1, 1]` to scale images."""
    return table[t].reshape(-1, 1, 1, 1)


def gaussian(shape: Sequence[int], offset: float, draws: Draws) -> Tensor:
    """eps ~ N(0, 1) of `shape` `[B, C, H, W]`, float32, on the device of the draws.

    Args:
        offset: adds as much of a second draw that is the same over each channel of an image, so that its brightness is
            learned too (Guttenberg 2023, offset noise). 0: none.
    """
    eps = draws.normal(shape)
    if not offset:
        return eps
    return eps + offset * draws.normal((*shape[:2], 1, 1))


def add_noise(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(ac_t) x_0 + sqrt(1 - ac_t) eps (DDPM eq. 4), in float32.

    Args:
        x_0: float32 `[B, C, H, W]`.
        eps: standard normal noise of the same shape.
        t: int64 `[B]`, 0 <= t < T.
    """
    return at(schedule.sqrt_alphas_cumprod, t) * x_0 + at(schedule.sqrt_one_minus_alphas_cumprod, t) * eps


def predict_x_0(schedule: Schedule, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The x_0 that `eps` implies: the inverse of `add_noise`. Not clipped."""
    return (x_t - at(schedule.sqrt_one_minus_alphas_cumprod, t) * eps) / at(schedule.sqrt_alphas_cumprod, t)


def velocity(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """v = sqrt(ac_t) eps - sqrt(1 - ac_t) x_0 (Salimans & Ho 2022, appendix D)."""
    return at(schedule.sqrt_alphas_cumprod, t) * eps - at(schedule.sqrt_one_minus_alphas_cumprod, t) * x_0


def posterior_mean(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
    return at(schedule.posterior_mean_coef1, t) * x_0 + at(schedule.posterior_mean_coef2, t) * x_t
