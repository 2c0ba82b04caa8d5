"""Which timesteps a batch is trained at."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(batch_size: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """t ~ U{0..T-1}, int64 `[B]`. Never a float: a bfloat16 cast changes 494 of 1,000 values."""
    return torch.randint(timesteps, (batch_size,), generator=generator, device=generator.device)
