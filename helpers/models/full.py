"""Full tuning: every weight of the UNet is trained, and a whole pipeline comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from helpers.models.denoiser import Denoiser
from helpers.models.facts import Origin
from helpers.models.pipelines import save_unet, write_pipeline


@dataclass(frozen=True)
class Full:
    """Every weight of the UNet.

    Attributes:
        variant: the variant of the base's weight files ("fp16"), or None for the plain ones.
    """

    variant: str | None = None
    origin: Origin | None = None

    def attach(self, denoiser: Denoiser, weights_dtype: torch.dtype) -> None:
        for parameter in denoiser.unet.requires_grad_(True).parameters():
            parameter.data = parameter.data.to(weights_dtype)

    def save_weights(self, denoiser: Denoiser, folder: Path) -> None:
        save_unet(denoiser.unet, folder / "unet")

    def load_weights(self, denoiser: Denoiser, folder: Path) -> None:
        saved = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=denoiser.dtype, use_safetensors=True)
        denoiser.unet.load_state_dict(saved.state_dict())

    def export(self, denoiser: Denoiser, base: Path, output: Path) -> Path:
        return write_pipeline(denoiser.unet, base, output, self.variant, self.origin)
