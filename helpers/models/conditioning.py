"""What joins x_t at the UNet's input besides timestep and text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TextOnly:
    """Nothing joins: the UNet sees x_t, and the text through its attention."""

    inputs: int = 1  # tensors of the space's channel count that the UNet's first convolution takes

    def __call__(self, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The UNet's input `[B, C, H, W]` and its class labels, of which there are none."""
        return x_t, None
