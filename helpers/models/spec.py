"""A model family as one row: its place on the three axes on which families differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

from helpers.models.conditioning import NoisedLowRes, TextOnly
from helpers.models.spaces import Latents, Pixels
from helpers.models.text import CLIP, T5


@dataclass(frozen=True)
class Spec:
    """One family. What the weights decide (widths, betas, variance) is not here: it is read from the weights."""

    space: Pixels | Latents
    text: T5 | CLIP
    conditioning: TextOnly | NoisedLowRes
    pipeline: str  # the class of diffusers that samples it
    controlnet_pipeline: str | None = None  # the class that samples it with a ControlNet, where it can have one

    @property
    def with_controlnet(self) -> Spec:
        """The same family, sampled with a ControlNet."""
        return replace(self, pipeline=self.controlnet_pipeline)

    @property
    def in_channels(self) -> int:
        """Channels that the UNet's first convolution must take."""
        return self.space.channels + self.conditioning.channels
