"""What the UNet's output is held against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import mse_loss

from helpers.diffusion.noising import Schedule
from helpers.diffusion.variance import variational_bound


@dataclass(frozen=True)
class EpsilonObjective:
    """Epsilon prediction: L = mean((eps - eps_hat)^2), plus vb_t * T / 1000 where the predicted variance is trained.

    That second weight is Improved DDPM's L_hybrid in the scale that DeepFloyd IF was trained with.
    """

    schedule: Schedule
    trains_variance: bool

    def __call__(self, output: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The loss of a batch: a float32 scalar.

        Args:
            output: float32 `[B, C, H, W]`, or `[B, 2C, H, W]` as [eps_hat, v] where the UNet predicts a variance.
            x_0, x_t, eps: float32 `[B, C, H, W]`.
            t: int64 `[B]`.
        """
        eps_hat, v = output[:, : eps.shape[1]], output[:, eps.shape[1] :]
        if not self.trains_variance:
            return mse_loss(eps_hat, eps)
        bound = variational_bound(self.schedule, x_0, x_t, t, eps_hat, v)
        return mse_loss(eps_hat, eps) + bound.mean() * self.schedule.timesteps / 1000
