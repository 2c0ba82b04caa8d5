"""A run on random weights and a batch that never changes, for measuring the step itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel

from helpers.data.collate import Batch
from helpers.data.sampler import Position
from helpers.diffusion.noising import Schedule, schedule_from_betas
from helpers.models.adapters import Adapter, trainable_parameters
from helpers.models.families import SPECS
from helpers.models.parts import Parts, put_together
from helpers.models.published import ARCHITECTURES
from helpers.models.spaces import Latents
from helpers.training.loop import Run
from helpers.training.optimizers import OPTIMIZERS, AdamSettings
from helpers.training.released import Released
from helpers.training.schedules import LearningRate

UPSCALER = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
# The noise's schedules, of x and of what joins it: files, or what a scheduler is told.
SCHEDULERS = {
    "deepfloyd-i": ("stage1_scheduler.json", None),
    "deepfloyd-ii": ("stage2_scheduler.json", "stage2_image_noising_scheduler.json"),
    "deepfloyd-iii": (UPSCALER, UPSCALER),
    "sd": ({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, None),
}
ADAM = AdamSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.01)
LEARNING_RATE = 1e-5


def random_parts(
    family: str,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    prediction_type: str = "epsilon",
) -> Parts:
    """A model of a family, a key of `SPECS`, with random weights, made on the device in its dtype.

    Args:
        config: that of its UNet, as the file of this name has it.
        prediction_type: see `put_together`.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            unet = UNet2DConditionModel.from_config(config)
    finally:
        torch.set_default_dtype(default)
    schedule, low_res_schedule = (name and _schedule(name) for name in SCHEDULERS[family])
    if low_res_schedule:
        low_res_schedule = low_res_schedule.first(SPECS[family].conditioning.levels)
    parts = put_together(SPECS[family], unet, schedule, low_res_schedule, prediction_type=prediction_type)
    return parts.to(device)


def _schedule(told: str | Mapping[str, Any]) -> Schedule:
    config = DDPMScheduler.load_config(ARCHITECTURES / told) if isinstance(told, str) else told
    return schedule_from_betas(DDPMScheduler.from_config(config).betas)


def random_batch(parts: Parts, size: int, device: torch.device) -> Batch:
    """`size` random images at the UNet's own resolution, with random text embeddings; a batch on the device.

    Of a model of latents it is what its cache would hold of images: means of a variance of 1, and small deviations.
    """
    config, space = parts.unet.config, parts.spec.space
    edge, width = config.sample_size, config.encoder_hid_dim or config.cross_attention_dim
    if isinstance(space, Latents):
        mean = torch.randn(size, space.channels, edge, edge, device=device)
        image = torch.randint(256, (size, 3 * space.with_image, edge, edge), device=device)
        images = torch.cat([mean, torch.full_like(mean, 0.1), image], dim=1).half()
    else:
        images = torch.randint(256, (size, edge, edge, space.channels), dtype=torch.uint8, device=device)
    embeds = torch.randn(size, parts.spec.text.length, width, device=device).bfloat16()
    return Batch(images, embeds, (None,) * size)


def endless(batch: Batch) -> Iterator[tuple[Position, Batch]]:
    return repeat((Position(0, 0), batch))


def create_run(
    parts: Parts,
    adapter: Adapter,
    trained: torch.dtype,
    optimizer: str,
    accelerator: Accelerator,
    releases: bool = False,
) -> Run:
    """A run over the parts, as the trainer makes it, with a constant learning rate and no end in sight.

    Args:
        releases: whether gradients are released, and not clipped.
    """
    adapter.attach(parts.denoiser, trained)
    made = OPTIMIZERS[optimizer](trainable_parameters(parts.denoiser), LEARNING_RATE, ADAM)
    released = Released(made) if releases else None
    denoiser, made = accelerator.prepare(parts.denoiser, made)
    return Run(
        accelerator=accelerator,
        parts=parts,
        denoiser=denoiser,
        optimizer=made,
        learning_rate=LearningRate("constant", LEARNING_RATE, 0.0, 0, 10**9),
        max_grad_norm=0.0 if releases else 1.0,
        released=released,
        generator=torch.Generator(accelerator.device).manual_seed(0),
    )
