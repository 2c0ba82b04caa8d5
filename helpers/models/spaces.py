"""The space that a UNet's x lives in, and the way from an image into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from helpers.diffusion.draws import Draws
from helpers.models.errors import load_whole, unfit
from helpers.models.fingerprints import fingerprint_model
from helpers.sizes import Size

VAE_BYTES = 334_600_000
"""The weights of the published VAEs in float32; all of them have one architecture."""

ENCODING_BYTES = 2_570
"""What its encoder holds at the most for each pixel that it is shown: 5 tensors of 128 channels at full size."""


@dataclass(frozen=True)
class Pixels:
    """x is the image itself, as in DeepFloyd IF.

    Attributes:
        component: the folder of the pipeline that leads into the space, where there is one.
        crops_once: whether an image keeps the crop that was drawn for it, since what is cached is made of the crop.
        cached: what is cached of images, in a word.
    """

    channels: int = 3
    component: str | None = None
    crops_once: bool = False
    cached: str = "pixels"

    def encode(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` in [-1, 1], on the same device."""
        return to_float(images)

    def size(self, image: Size) -> Size:
        """The extent of x for an image, both in pixels."""
        return image

    def cached_bytes(self, image: Size) -> int:
        """What an image of this size takes in its cache."""
        return self.channels * image.width * image.height


@dataclass(frozen=True)
class Latents:
    """x is drawn from what a VAE makes of the image (Rombach et al. 2022, section 3.1), as in Stable Diffusion.

    What is cached is the Gaussian that the VAE's encoder gives, not a sample of it: so each step draws another one.

    Attributes:
        factor: pixels of an image's edge for one of x.
    """

    channels: int = 4
    factor: int = 8
    component: str | None = "vae"
    crops_once: bool = True
    cached: str = "latents"

    def encode(self, moments: Tensor, draws: Draws) -> Tensor:
        """x ~ N(mean, std^2), float32 `[B, C, h, w]`.

        Args:
            moments: `[B, 2C, h, w]` as [mean, std], both scaled so that latents have about unit variance.
        """
        mean, std = moments.float().chunk(2, dim=1)
        return mean + std * draws.normal(mean.shape)

    def size(self, image: Size) -> Size:
        return Size(image.width // self.factor, image.height // self.factor)

    def cached_bytes(self, image: Size) -> int:
        width, height = self.size(image)
        return 2 * self.channels * width * height * torch.float16.itemsize

    def encoding_bytes(self, images: int, size: Size) -> int:
        """About what a published VAE takes to encode so many images of this size, in pixels, at a time."""
        return VAE_BYTES + ENCODING_BYTES * images * size.width * size.height

    def fingerprint(self, folder: Path, variant: str | None = None) -> dict[str, str]:
        """What determines the cached moments besides the image: those of another VAE are made anew."""
        return {"vae": fingerprint_model(folder / "vae", variant)}

    def load(self, folder: Path, device: torch.device, variant: str | None = None) -> AutoencoderKL:
        """The VAE, in float32: SD's own lose detail or overflow in less."""
        try:
            vae = load_whole(AutoencoderKL, folder / "vae", dtype=torch.float32, variant=variant)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a config of any content makes diffusers raise
            raise unfit("the VAE", folder, error) from error
        return vae.to(device).eval()

    @staticmethod
    @torch.inference_mode()
    def moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` on any device to the moments `[B, 2C, H / 8, W / 8]`, float16 on the CPU.

        float16 keeps 11 bits of each, which is less than sampling blurs.
        """
        posterior = vae.encode(to_float(images.to(vae.device))).latent_dist
        scaled = torch.cat([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor
        return scaled.to("cpu", torch.float16)


def to_float(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` in [-1, 1], on the same device."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
