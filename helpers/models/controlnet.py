"""ControlNet: a copy of the UNet's first half learns to obey conditioning images, and the UNet stays as it is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from helpers.models.denoiser import Denoiser
from helpers.models.facts import Origin, metadata

CONTROLNET = "controlnet"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet (Zhang et al. 2023, section 3.1) that begins as a copy of the UNet's encoder.

    Its zero convolutions make its first output nothing, so that the UNet then draws as it did without.
    """

    origin: Origin | None = None

    def attach(self, denoiser: Denoiser, weights_dtype: torch.dtype) -> None:
        denoiser.requires_grad_(False)
        denoiser.controlnet = ControlNetModel.from_unet(denoiser.unet).to(weights_dtype)

    def save_weights(self, denoiser: Denoiser, folder: Path) -> None:
        """Write `controlnet/`, in diffusers' layout."""
        controlnet = denoiser.controlnet
        controlnet.save_config(folder / CONTROLNET)
        weights = {name: tensor.detach().contiguous() for name, tensor in controlnet.state_dict().items()}
        save_file(weights, folder / CONTROLNET / WEIGHTS_FILE, metadata(self.origin, kind="controlnet"))

    def load_weights(self, denoiser: Denoiser, folder: Path) -> None:
        denoiser.controlnet.load_state_dict(load_file(folder / CONTROLNET / WEIGHTS_FILE))

    def export(self, denoiser: Denoiser, base: Path, output: Path) -> Path:
        partial = output / f".{CONTROLNET}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.save_weights(denoiser, partial)
        shutil.rmtree(output / CONTROLNET, ignore_errors=True)
        result = (partial / CONTROLNET).rename(output / CONTROLNET)
        partial.rmdir()
        return result
