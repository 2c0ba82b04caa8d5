"""The schedulers of a pipeline: what they say of its training, and those that pictures are sampled with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from helpers.diffusion.noising import Schedule, schedule_from_betas

SCHEDULER_CONFIG = "scheduler_config.json"
"""The name of a scheduler's file, in which diffusers writes -Infinity for DPM-Solver's `lambda_min_clipped`."""

SAMPLERS: Mapping[str, type[SchedulerMixin]] = MappingProxyType({
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
})
"""By the words of the option validation_noise_scheduler; each reads the configuration of any other."""

ZERO_TERMINAL_SNR: Mapping[str, Any] = MappingProxyType({
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False
})
"""What a scheduler is told where the last timestep is noise alone, at which sampling then begins (Lin et al. 2024).

It may become a DDIM, which clips x_0 if it is not told otherwise.
"""


def prediction_type_of(folder: Path) -> str:
    """What the UNet of the pipeline in `folder` predicts, as diffusers names it."""
    return DDPMScheduler.load_config(folder / "scheduler").get("prediction_type", "epsilon")


def schedule_of(folder: Path, component: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Schedule:
    """The training's schedule, from the betas of one of a pipeline's schedulers."""
    return schedule_from_betas(DDPMScheduler.from_pretrained(folder / component, **changes).betas)


def sampler(name: str, folder: Path, changes: Mapping[str, Any]) -> SchedulerMixin:
    """A scheduler to sample with, made as the one of the pipeline in `folder` but for `changes`."""
    return SAMPLERS[name].from_pretrained(folder / "scheduler", **changes)
