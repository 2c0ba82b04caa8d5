"""The step schedules that DeepFloyd IF was published with: where to denoise with how fine steps."""

from __future__ import annotations

from diffusers.pipelines.deepfloyd_if import timesteps


def timesteps_of(name: str) -> list[int]:
    """The timesteps of a schedule of `inference_options.SCHEDULES`, of 1000, falling."""
    return list(getattr(timesteps, f"{name}_timesteps"))
