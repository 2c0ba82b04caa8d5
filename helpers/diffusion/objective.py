"""What the UNet's output is held against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.diffusion.noising import Schedule, velocity
from helpers.diffusion.variance import variational_bound


@dataclass(frozen=True)
class EpsilonObjective:
    """Epsilon prediction: L = mean(w_t (eps - eps_hat)^2), plus vb_t * T / 1000 where the predicted variance is trained.

    That second weight is Improved DDPM's L_hybrid in the scale that DeepFloyd IF was trained with.

    Args:
        weights: w_t, float32 `[T]`.
    """

    schedule: Schedule
    trains_variance: bool
    weights: Tensor

    def __call__(self, output: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The loss of a batch: a float32 scalar.

        Args:
            output: float32 `[B, C, H, W]`, or `[B, 2C, H, W]` as [eps_hat, v] where the UNet predicts a variance.
            x_0, x_t, eps: float32 `[B, C, H, W]`.
            t: int64 `[B]`.
        """
        eps_hat, v = output[:, : eps.shape[1]], output[:, eps.shape[1] :]
        squared_error = (eps_hat - eps).square().mean(dim=(1, 2, 3))
        loss = (self.weights[t] * squared_error).mean()
        if not self.trains_variance:
            return loss
        bound = variational_bound(self.schedule, x_0, x_t, t, eps_hat, v)
        return loss + bound.mean() * self.schedule.timesteps / 1000

    def to(self, device: torch.device) -> EpsilonObjective:
        return replace(self, schedule=self.schedule.to(device), weights=self.weights.to(device))


@dataclass(frozen=True)
class VelocityObjective:
    """v-prediction: L = mean(w_t (v - v_hat)^2) (Salimans & Ho 2022, appendix D).

    Args:
        weights: w_t, float32 `[T]`.
    """

    schedule: Schedule
    weights: Tensor

    def __call__(self, output: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The loss of a batch: a float32 scalar. All tensors are float32 `[B, C, H, W]`, t is int64 `[B]`."""
        squared_error = (output - velocity(self.schedule, x_0, eps, t)).square().mean(dim=(1, 2, 3))
        return (self.weights[t] * squared_error).mean()

    def to(self, device: torch.device) -> VelocityObjective:
        return replace(self, schedule=self.schedule.to(device), weights=self.weights.to(device))
