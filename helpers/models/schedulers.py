"""The schedulers of a pipeline: what they say of its training, and those that pictures are sampled with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
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


LAMBDA_MIN_OF_COSINE = -5.1
"""The least half log-SNR at which DPM-Solver begins on a cosine schedule, which goes to -10: beyond, its steps burst."""


def prediction_type_of(folder: Path) -> str:
    """What the UNet of the pipeline in `folder` predicts, as diffusers names it."""
    return DDPMScheduler.load_config(folder / "scheduler").get("prediction_type", "epsilon")


def schedule_of(folder: Path, component: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Schedule:
    """The training's schedule, from the betas of one of a pipeline's schedulers."""
    return schedule_from_betas(DDPMScheduler.from_pretrained(folder / component, **changes).betas)


def sampler(name: str | None, folder: Path, changes: Mapping[str, Any]) -> SchedulerMixin:
    """A scheduler to sample with, made as the one of the pipeline in `folder` but for `changes`.

    Args:
        name: a key of `SAMPLERS`; None: of the same kind too.

    Raises:
        ValueError: the folder's is of no kind that diffusers has.
    """
    config = DDPMScheduler.load_config(folder / "scheduler")
    kind = SAMPLERS[name] if name else _kind_of(config)
    own = {**config, **changes}
    # Only DDPM draws with a variance that was learned: for others the pipeline is to leave it out.
    if kind is not DDPMScheduler and str(own.get("variance_type")).startswith("learned"):
        own["variance_type"] = "fixed_small"
    if kind is DPMSolverMultistepScheduler and own.get("beta_schedule") == "squaredcos_cap_v2":
        own["lambda_min_clipped"] = LAMBDA_MIN_OF_COSINE
    return kind.from_config(own)


def _kind_of(config: Mapping[str, Any]) -> type[SchedulerMixin]:
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"its scheduler is {config.get('_class_name')!r}, which is none of diffusers'")
    return kind
