"""One training step's loss, the same for every family."""

from __future__ import annotations

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


def training_loss(parts: Parts, unet: torch.nn.Module, batch: Batch, generator: torch.Generator) -> StepLoss:
    """Noise the batch at random timesteps and hold the UNet's output against the noise.

    Args:
        unet: the UNet of `parts`, possibly wrapped for several processes.
        batch: on the UNet's device.
        generator: gives noise and timesteps; on the same device, and in the same state in all processes.
    """
    draws = Draws(generator, batch.share)
    x = parts.spec.space.encode(batch.images)
    noise = gaussian(x.shape, parts.noise_offset, draws)
    t = timesteps.draw(parts.timestep_weights, len(x), draws)
    # Everything around the UNet is float32; only what goes into it takes its dtype.
    x_t = add_noise(parts.schedule, x, noise, t)
    unet_input, class_labels = parts.spec.conditioning(x_t, batch.images, parts.low_res_schedule, draws)
    dtype = parts.unet.dtype
    # No attention mask: IF's pipelines never pass one, and the UNet was trained to see all positions.
    output = unet(unet_input.to(dtype), t, batch.prompt_embeds.to(dtype), class_labels=class_labels).sample
    return StepLoss(parts.objective(output.float(), x, x_t, noise, t), t)
