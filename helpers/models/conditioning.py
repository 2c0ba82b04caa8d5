"""What joins x_t at the UNet's input besides timestep and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import Schedule, add_noise

Reduced = Callable[[int], Tensor]
"""Gives the images of a batch, so many times smaller, as uint8 `[B, 3, H / scale, W / scale]`."""


@dataclass(frozen=True)
class TextOnly:
    """Nothing joins: the UNet sees x_t, and the text through its attention."""

    channels: int = 0
    scheduler: str | None = None
    levels: int | None = None

    def __call__(
        self, x_t: Tensor, reduced: Reduced, schedule: Schedule | None, draws: Draws
    ) -> tuple[Tensor, Tensor | None]:
        """The UNet's input `[B, C, H, W]` and its class labels, of which there are none."""
        return x_t, None

    def mismatch(self, unet: Mapping[str, Any]) -> str | None:
        """Why a UNet of this configuration is shown something else; None if it is not."""
        return _unless_told(unet, None, embeds=False)


@dataclass(frozen=True)
class NoisedLowRes:
    """The image itself in low resolution, noised, as a super-resolution stage sees it when it samples.

    "Noise conditioning augmentation" of Saharia et al. 2022 (Imagen), section 2.5: with its own noise at a level of its
    own, s ~ U{0..levels-1}, which the UNet is told as its class label. Both are independent of eps and of t.

    Attributes:
        channels: of the low-resolution image.
        scale: how many times smaller than the image it is. With latents that many times smaller it keeps its own size.
        scheduler: the component of the pipeline with the noise's schedule.
        levels: how many of the schedule's levels there are, where the pipeline's `max_noise_level` does not say; None:
            all of them.
        embeds_level: whether the UNet learns a vector for each level, or computes one as it does of timesteps.
    """

    channels: int = 3
    scale: int = 4
    scheduler: str | None = "image_noising_scheduler"
    levels: int | None = None
    embeds_level: bool = False

    def __call__(
        self, x_t: Tensor, reduced: Reduced, schedule: Schedule, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """The UNet's input `[B, C + 3, H, W]` as [x_t, the noised low-res image], and s, int64 `[B]`.

        Args:
            x_t: float32 `[B, C, H, W]`.
            schedule: of as many levels as there are.
        """
        low_res = upscale(reduced(self.scale), x_t.shape[2:])
        level, noise = draws.integers(schedule.timesteps, len(x_t)), draws.normal(low_res.shape)
        return torch.cat([x_t, add_noise(schedule, low_res, noise, level)], dim=1), level

    def mismatch(self, unet: Mapping[str, Any]) -> str | None:
        """Why a UNet of this configuration is not told the level; None if it is. It would ignore one."""
        return _unless_told(unet, None if self.embeds_level else "timestep", self.embeds_level)


def _unless_told(unet: Mapping[str, Any], embed_type: str | None, embeds: bool) -> str | None:
    found, count = unet.get("class_embed_type"), unet.get("num_class_embeds")
    if found != embed_type:
        return f"their UNet has class_embed_type {found!r} instead of {embed_type!r}, by which a noise level is told"
    if embeds != isinstance(count, int):
        needed = "a number" if embeds else None
        return f"their UNet has num_class_embeds {count!r} instead of {needed}, by which a noise level is told"
    return None


def reduce(images: Tensor, scale: int) -> Tensor:
    """uint8 `[B, H, W, 3]` made `scale` times smaller by antialiased bicubic, as uint8 `[B, 3, H / scale, W / scale]`.

    What stage I would hand over is 8-bit too.
    """
    size = (images.shape[1] // scale, images.shape[2] // scale)
    pixels = images.permute(0, 3, 1, 2).float()
    return interpolate(pixels, size, mode="bicubic", antialias=True).round_().clamp_(0, 255).to(torch.uint8)


def upscale(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 `[B, 3, h, w]` to float32 `[B, 3, *size]` in [-1, 1], as IFSuperResolutionPipeline does it before noising.

    An image of that size stays as it is, to the bit.
    """
    return interpolate(images.float() / 127.5 - 1, tuple(size), mode="bilinear", align_corners=True)
