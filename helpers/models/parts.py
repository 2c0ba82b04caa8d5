"""What a training step needs of a model, put together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import PreTrainedModel

from helpers.diffusion.noising import Schedule
from helpers.diffusion.objective import EpsilonObjective, VelocityObjective
from helpers.diffusion.timesteps import TimestepBias
from helpers.diffusion.weighting import min_snr
from helpers.models.denoiser import Denoiser
from helpers.models.spec import Spec


@dataclass(frozen=True)
class LossSettings:
    """What the user may choose of what is trained.

    Args:
        trains_variance: train the variance too, where the UNet predicts one.
        snr_gamma, soft_min_snr: see `weighting.min_snr`.
        noise_offset: see `noising.gaussian`.
        zero_terminal_snr: see `schedulers.ZERO_TERMINAL_SNR`.
    """

    trains_variance: bool = True
    snr_gamma: float = 0.0
    soft_min_snr: bool = False
    noise_offset: float = 0.0
    zero_terminal_snr: bool = False
    timestep_bias: TimestepBias = TimestepBias()


@dataclass(frozen=True)
class Parts:
    """A model and what it is trained on.

    Attributes:
        low_res_schedule: how the low-resolution image is noised that joins x_t; None for models without one.
        timestep_weights: how often each timestep is drawn, float32 `[T]`.
    """

    spec: Spec
    denoiser: Denoiser
    schedule: Schedule
    low_res_schedule: Schedule | None
    objective: EpsilonObjective | VelocityObjective
    timestep_weights: Tensor
    noise_offset: float

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.denoiser.unet

    def to(self, device: torch.device) -> Parts:
        return replace(
            self,
            denoiser=self.denoiser.to(device),
            schedule=self.schedule.to(device),
            low_res_schedule=self.low_res_schedule and self.low_res_schedule.to(device),
            objective=self.objective.to(device),
            timestep_weights=self.timestep_weights.to(device),
        )


def put_together(
    spec: Spec,
    unet: UNet2DConditionModel,
    schedule: Schedule,
    low_res_schedule: Schedule | None = None,
    loss: LossSettings = LossSettings(),
    prediction_type: str = "epsilon",
    text_encoder: PreTrainedModel | None = None,
) -> Parts:
    """The parts of a model; whether it predicts a variance is seen from its UNet.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        text_encoder: where it is trained too.
    """
    predicts_variance = unet.config.out_channels == 2 * spec.space.channels
    of_velocity = prediction_type == "v_prediction"
    weights = min_snr(schedule, loss.snr_gamma, loss.soft_min_snr, of_velocity)
    if of_velocity:
        objective = VelocityObjective(schedule, weights)
    else:
        objective = EpsilonObjective(schedule, predicts_variance and loss.trains_variance, weights)
    return Parts(
        spec=spec,
        denoiser=Denoiser(unet, text_encoder).eval(),
        schedule=schedule,
        low_res_schedule=low_res_schedule,
        objective=objective,
        timestep_weights=loss.timestep_bias.weights(schedule.timesteps),
        noise_offset=loss.noise_offset,
    )
