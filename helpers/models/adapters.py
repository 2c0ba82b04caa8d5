"""What of a model is trained, and how that is saved: the axis whose members are `lora`, `full`, `bitfit` and
`controlnet`."""

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


def parameter_groups(denoiser: Denoiser) -> list[list[torch.nn.Parameter]]:
    """What is trained, in groups that may have learning rates of their own: the text encoder's, if any, comes last."""
    if denoiser.text_encoder is None:
        return [trainable_parameters(denoiser)]
    texts = trainable_parameters(denoiser.text_encoder)
    known = {id(parameter) for parameter in texts}
    return [[one for one in trainable_parameters(denoiser) if id(one) not in known], texts]


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
