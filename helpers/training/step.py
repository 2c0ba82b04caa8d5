"""One training step's loss, the same for every family."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.data.collate import Batch
from helpers.diffusion import timesteps
from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import add_noise, gaussian
from helpers.models.parts import Parts


class StepLoss(NamedTuple):
    """The loss of a batch, and where it was taken.

    Attributes:
        loss: a float32 scalar.
        timesteps: int64 `[B]`.
    """

    loss: Tensor
    timesteps: Tensor


def training_loss(parts: Parts, denoiser: torch.nn.Module, batch: Batch, generator: torch.Generator) -> StepLoss:
    """Noise the batch at random timesteps and hold the denoiser's output against what it should predict.

    Args:
        denoiser: that of `parts`, possibly wrapped for several processes.
        batch: on its device.
        generator: gives noise and timesteps; on the same device, and in the same state in all processes.
    """
    draws = Draws(generator, batch.share)
    x = parts.spec.space.encode(batch.images, draws)
    noise = gaussian(x.shape, parts.noise_offset, draws)
    t = timesteps.draw(parts.timestep_weights, len(x), draws)
    # Everything around the denoiser is float32; it casts what it takes.
    x_t = add_noise(parts.schedule, x, noise, t)
    reduced = partial(parts.spec.space.reduced, batch.images)
    unet_input, class_labels = parts.spec.conditioning(x_t, reduced, parts.low_res_schedule, draws)
    output = denoiser(unet_input, t, batch.prompt_embeds, class_labels=class_labels, control=batch.control)
    return StepLoss(parts.objective(output.float(), x, x_t, noise, t), t)
