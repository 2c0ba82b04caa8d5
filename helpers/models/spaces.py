"""The space that a UNet's x lives in, and the way from an image into it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """x is the image itself, as in DeepFloyd IF."""

    channels: int = 3

    def encode(self, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` in [-1, 1], on the same device."""
        return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
