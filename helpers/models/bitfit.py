"""BitFit: only the biases of the UNet are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from helpers.models.denoiser import Denoiser
from helpers.models.facts import Origin, metadata
from helpers.models.pipelines import read_unet, write_pipeline

BIASES_FILE = "bitfit_biases.safetensors"


@dataclass(frozen=True)
class BitFit:
    """Every bias of the UNet, and nothing else (Ben Zaken et al. 2022).

    Attributes:
        variant: the variant of the base's weight files ("fp16"), or None for the plain ones.
    """

    variant: str | None = None
    origin: Origin | None = None

    def attach(self, denoiser: Denoiser, weights_dtype: torch.dtype) -> None:
        denoiser.requires_grad_(False)
        for module in denoiser.unet.modules():
            own = dict(module.named_parameters(recurse=False))
            if "bias" not in own:
                continue
            own["bias"].requires_grad_(True)
            for parameter in own.values():
                if parameter.ndim == 1:  # with the bias a norm's weight, since norms take both in one dtype only
                    parameter.data = parameter.data.to(weights_dtype)

    def save_weights(self, denoiser: Denoiser, folder: Path) -> None:
        """Write the biases under the names that the UNet's `load_state_dict(..., strict=False)` takes."""
        biases = {name: bias.detach().contiguous() for name, bias in _biases(denoiser.unet).items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(biases, folder / BIASES_FILE, metadata(self.origin, kind="bitfit"))

    def load_weights(self, denoiser: Denoiser, folder: Path) -> None:
        saved, biases = load_file(folder / BIASES_FILE), _biases(denoiser.unet)
        if saved.keys() != biases.keys():
            raise ValueError(f"{folder / BIASES_FILE} does not fit: {sorted(saved.keys() ^ biases.keys())}")
        denoiser.unet.load_state_dict(saved, strict=False)

    def export(self, denoiser: Denoiser, base: Path, output: Path) -> Path:
        """Write the biases, and beside them a whole pipeline, which diffusers can load by itself.

        It is the base but for the biases, in the base's own dtype: what training kept frozen it may have kept rounded.
        """
        self.save_weights(denoiser, output)
        tuned = read_unet(base, self.variant)
        tuned.load_state_dict(_biases(denoiser.unet), strict=False)
        return write_pipeline(tuned, base, output, self.variant, self.origin)


def _biases(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in unet.named_parameters() if name.endswith(".bias")}
