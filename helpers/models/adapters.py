"""What of a UNet is trained, and how that is saved: the axis whose members are `lora`, `full` and `bitfit`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel

from helpers.models.facts import Origin


class Adapter(Protocol):
    """A way of training a UNet.

    Attributes:
        origin: what is trained on; None until the weights are at hand. Saving needs it.
    """

    origin: Origin | None

    def attach(self, unet: UNet2DConditionModel, weights_dtype: torch.dtype) -> None:
        """Mark what is trained, with those parameters in `weights_dtype`."""

    def save_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        """Write the trained weights into a checkpoint's folder."""

    def load_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        """Take them back from there, bit for bit."""

    def export(self, unet: UNet2DConditionModel, base: Path, output: Path) -> Path:
        """Write the finished result into the output folder; returns its path."""


def trainable_parameters(unet: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]
