"""What joins x_t at the UNet's input besides timestep and text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import Schedule, add_noise


@dataclass(frozen=True)
class TextOnly:
    """Nothing joins: the UNet sees x_t, and the text through its attention."""

    inputs: int = 1  # tensors of the space's channel count that the UNet's first convolution takes
    class_embed_type: str | None = None
    scheduler: str | None = None

    def __call__(
        self, x_t: Tensor, images: Tensor, schedule: Schedule | None, draws: Draws
    ) -> tuple[Tensor, Tensor | None]:
        """The UNet's input `[B, C, H, W]` and its class labels, of which there are none."""
        return x_t, None


@dataclass(frozen=True)
class NoisedLowRes:
    """The image itself in low resolution, noised, as a super-resolution stage sees it when it samples.

    "Noise conditioning augmentation" of Saharia et al. 2022 (Imagen), section 2.5: with its own noise at a level of its
    own, s ~ U{0..T-1}, which the UNet is told as its class label. Both are independent of eps and of t.

    Attributes:
        class_embed_type: how the UNet must be built to be told the level; without it, it would ignore one.
        scale: how many times smaller the low-resolution image is.
        scheduler: the component of the pipeline with the noise's schedule.
    """

    inputs: int = 2
    class_embed_type: str | None = "timestep"
    scale: int = 4
    scheduler: str | None = "image_noising_scheduler"

    def __call__(
        self, x_t: Tensor, images: Tensor, schedule: Schedule, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """The UNet's input `[B, 2C, H, W]` as [x_t, the noised low-res image], and s, int64 `[B]`.

        Args:
            x_t: float32 `[B, C, H, W]`.
            images: the images that x_t was made from, uint8 `[B, H, W, 3]`.
        """
        upscaled = upscale(reduce(images, self.scale), images.shape[1:3])
        level, noise = draws.integers(schedule.timesteps, len(x_t)), draws.normal(upscaled.shape)
        return torch.cat([x_t, add_noise(schedule, upscaled, noise, level)], dim=1), level


def reduce(images: Tensor, scale: int) -> Tensor:
    """uint8 `[B, H, W, 3]` made `scale` times smaller by antialiased bicubic, as uint8 `[B, 3, H / scale, W / scale]`.

    What stage I would hand over is 8-bit too.
    """
    size = (images.shape[1] // scale, images.shape[2] // scale)
    pixels = images.permute(0, 3, 1, 2).float()
    return interpolate(pixels, size, mode="bicubic", antialias=True).round_().clamp_(0, 255).to(torch.uint8)


def upscale(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 `[B, 3, h, w]` to float32 `[B, 3, *size]` in [-1, 1], as IFSuperResolutionPipeline does it before noising."""
    return interpolate(images.float() / 127.5 - 1, tuple(size), mode="bilinear", align_corners=True)
