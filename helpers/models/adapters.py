"""What of a model is trained, and how that is saved: the axis whose members are `lora`, `full` and `bitfit`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from helpers.models.denoiser import Denoiser
from helpers.models.facts import Origin


class Adapter(Protocol):
    """A way of training a denoiser.

    Attributes:
        origin: what is trained on; None until the weights are at hand. Saving needs it.
    """

    origin: Origin | None

    def attach(self, denoiser: Denoiser, weights_dtype: torch.dtype) -> None:
        """Mark what is trained, with those parameters in `weights_dtype`."""

    def save_weights(self, denoiser: Denoiser, folder: Path) -> None:
        """Write the trained weights into a checkpoint's folder."""

    def load_weights(self, denoiser: Denoiser, folder: Path) -> None:
        """Take them back from there, bit for bit."""

    def export(self, denoiser: Denoiser, base: Path, output: Path) -> Path:
        """Write the finished result into the output folder; returns its path."""


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
