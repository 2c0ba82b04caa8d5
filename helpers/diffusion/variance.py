"""The learned-range variance and its bound, from Nichol & Dhariwal 2021 (Improved DDPM), section 3.1.

diffusers' `_get_variance` does not serve for training: it clamps at t = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helpers.diffusion.noising import Schedule, at, posterior_mean, predict_x_0

HALF_BIN = 1 / 255  # half the distance of two 8-bit values on the scale [-1, 1]
SMALLEST_LIKELIHOOD = 1e-12


def log_variance(schedule: Schedule, v: Tensor, t: Tensor) -> Tensor:
    """log of the model's variance: v in [-1, 1] runs from log beta~_t to log beta_t (eq. 15, IF's scale)."""
    fraction = (v + 1) / 2
    return fraction * at(schedule.log_betas, t) + (1 - fraction) * at(schedule.posterior_log_variance, t)


def variational_bound(
    schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor, eps_hat: Tensor, v: Tensor
) -> Tensor:
    """One term of the variational bound for each sample, in bits per dimension.

    For t > 0 it is the KL divergence from the true posterior, for t = 0 the negative log-likelihood of the 8-bit image.
    `eps_hat` is detached: this term trains the variance, the plain loss trains the mean (section 3.1 there).

    Args:
        x_0, x_t, eps_hat, v: float32 `[B, C, H, W]`; x_0 in [-1, 1].
        t: int64 `[B]`.

    Returns:
        float32 `[B]`.
    """
    mean = posterior_mean(schedule, predict_x_0(schedule, x_t, eps_hat.detach(), t), x_t, t)
    log_var = log_variance(schedule, v, t)
    divergence = normal_kl(
        posterior_mean(schedule, x_0, x_t, t), at(schedule.posterior_log_variance, t), mean, log_var
    )
    nats = torch.where(t.reshape(-1, 1, 1, 1) == 0, -discretised_log_likelihood(x_0, mean, log_var), divergence)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def normal_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise."""
    ratio = log_var_1 - log_var_2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean_1 - mean_2).square() * (-log_var_2).exp())


def discretised_log_likelihood(x_0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log of the probability that N(mean, var) gives to the 8-bit bin around `x_0`, in nats (DDPM eq. 13)."""
    inverse_std = (-0.5 * log_var).exp()
    below_upper = torch.special.ndtr((x_0 - mean + HALF_BIN) * inverse_std)
    below_lower = torch.special.ndtr((x_0 - mean - HALF_BIN) * inverse_std)
    # The outermost bins reach to infinity, since every value beyond them would be clipped into them.
    below_upper = torch.where(x_0 > 0.999, 1.0, below_upper)
    below_lower = torch.where(x_0 < -0.999, 0.0, below_lower)
    return (below_upper - below_lower).clamp(min=SMALLEST_LIKELIHOOD).log()
