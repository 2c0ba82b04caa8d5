"""BitFit: only the biases of the UNet are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

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

    def attach(self, unet: UNet2DConditionModel, weights_dtype: torch.dtype) -> None:
        unet.requires_grad_(False)
        for module in unet.modules():
            own = dict(module.named_parameters(recurse=False))
            if "bias" not in own:
                continue
            own["bias"].requires_grad_(True)
            for parameter in own.values():
                if parameter.ndim == 1:  # with the bias a norm's weight, since norms take both in one dtype only
                    parameter.data = parameter.data.to(weights_dtype)

    def save_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        """Write the biases under the names that the UNet's `load_state_dict(..., strict=False)` takes."""
        biases = {name: bias.detach().contiguous() for name, bias in _biases(unet).items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(biases, folder / BIASES_FILE, metadata(self.origin, kind="bitfit"))

    def load_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        saved, biases = load_file(folder / BIASES_FILE), _biases(unet)
        if saved.keys() != biases.keys():
            raise ValueError(f"{folder / BIASES_FILE} does not fit: {sorted(saved.keys() ^ biases.keys())}")
        unet.load_state_dict(saved, strict=False)

    def export(self, unet: UNet2DConditionModel, base: Path, output: Path) -> Path:
        """Write the biases, and beside them a whole pipeline, which diffusers can load by itself.

        It is the base but for the biases, in the base's own dtype: what training kept frozen it may have kept rounded.
        """
        self.save_weights(unet, output)
        tuned = read_unet(base, self.variant)
        tuned.load_state_dict(_biases(unet), strict=False)
        return write_pipeline(tuned, base, output, self.variant, self.origin)


def _biases(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in unet.named_parameters() if name.endswith(".bias")}
