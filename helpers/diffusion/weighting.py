"""How much each timestep counts in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.diffusion.noising import Schedule


def signal_to_noise(schedule: Schedule) -> Tensor:
    """snr_t = ac_t / (1 - ac_t), float32 `[T]`, falling from thousands to nearly 0, or to 0 with zero terminal SNR."""
    return (schedule.sqrt_alphas_cumprod / schedule.sqrt_one_minus_alphas_cumprod) ** 2


def min_snr(schedule: Schedule, gamma: float, soft: bool = False, of_velocity: bool = False) -> Tensor:
    """Weights of the squared error of epsilon by timestep, float32 `[T]` in 0..1; or of that of v.

    min(snr, gamma) / snr, and for v min(snr, gamma) / (snr + 1) (Hang et al. 2023, Min-SNR); or the same with
    snr gamma / (snr + gamma) in place of the minimum (Crowson et al. 2024, soft Min-SNR), which has no corner.

    Args:
        gamma: above 0; the smaller, the more the noisy timesteps count against the clear ones. 0: all count the same.
    """
    snr = signal_to_noise(schedule)
    if gamma == 0:
        return torch.ones_like(snr)
    if of_velocity:
        return (snr * gamma / (snr + gamma) if soft else torch.clamp(snr, max=gamma)) / (snr + 1)
    return gamma / (snr + gamma) if soft else torch.clamp(gamma / snr, max=1)
