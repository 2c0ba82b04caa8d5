"""Which timesteps a batch is trained at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.diffusion.draws import Draws


@dataclass(frozen=True)
class TimestepBias:
    """Makes a part of the timesteps come up more often, or less.

    Args:
        strategy: "none", "earlier" (the clear end, t = 0), "later" (the noisy end), or "range".
        multiplier: how much more often than the others, above 0; below 1 is less often.
        portion: the part that "earlier" and "later" mean, 0..1.
        begin, end: what "range" means, begin <= t < end.
    """

    strategy: str = "none"
    multiplier: float = 1.0
    portion: float = 0.25
    begin: int = 0
    end: int = 1000

    def weights(self, timesteps: int) -> Tensor:
        """How often each timestep is drawn beside the others, float32 `[T]`."""
        weights = torch.ones(timesteps)
        weights[BIASED[self.strategy](self, timesteps)] *= self.multiplier
        return weights


BIASED: dict[str, Callable[[TimestepBias, int], slice]] = {
    "none": lambda bias, timesteps: slice(0),
    "earlier": lambda bias, timesteps: slice(round(bias.portion * timesteps)),
    "later": lambda bias, timesteps: slice(timesteps - round(bias.portion * timesteps), None),
    "range": lambda bias, timesteps: slice(bias.begin, bias.end),
}
"""The timesteps that a strategy means."""


def draw(weights: Tensor, batch_size: int, draws: Draws) -> Tensor:
    """t in 0..T-1 as often as `weights` `[T]` say, int64 `[B]`.

    Never a float: a bfloat16 cast changes 494 of 1,000 values.
    """
    # Not `torch.multinomial`: it reads back whether its weights are sound, and so waits for all that a GPU has to do.
    dtype = torch.float32 if weights.device.type == "mps" else torch.float64
    cumulative = weights.to(dtype).cumsum(0)
    drawn = draws.uniform(batch_size, dtype, weights.device)
    return torch.searchsorted(cumulative / cumulative[-1], drawn, right=True)  # drawn < 1, the last one's value
