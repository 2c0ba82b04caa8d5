"""What the UNet's output is held against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import mse_loss

from helpers.diffusion.noising import Schedule
from helpers.diffusion.variance import variational_bound


@dataclass(frozen=True)
class EpsilonObjective:
    """Epsilon prediction: L = mean((eps - eps_hat)^2), plus vb_t * T / 1000 where the UNet also predicts a variance.

    That second weight is Improved DDPM's L_hybrid in the scale that DeepFloyd IF was trained with.
    """

    schedule: Schedule
    learns_variance: bool

    def __call__(self, output: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The loss of a batch: a float32 scalar.

        Args:
            output: float32 `[B, C, H, W]`, or `[B, 2C, H, W]` as [eps_hat, v] where the variance is learned.
            x_0, x_t, eps: float32 `[B, C, H, W]`.
            t: int64 `[B]`.
        """
        if not self.learns_variance:
            return mse_loss(output, eps)
        eps_hat, v = output.chunk(2, dim=1)
        bound = variational_bound(self.schedule, x_0, x_t, t, eps_hat, v)
        return mse_loss(eps_hat, eps) + bound.mean() * self.schedule.timesteps / 1000
