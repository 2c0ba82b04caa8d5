"""The space that a UNet's x lives in, and the way from an image into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from helpers.diffusion.draws import Draws
from helpers.models.conditioning import reduce
from helpers.models.errors import load_whole, unfit
from helpers.models.fingerprints import fingerprint_model
from helpers.sizes import Size

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

    def reduced(self, images: Tensor, scale: int) -> Tensor:
        """The images of `encode`, so many times smaller: see `conditioning.reduce`."""
        return reduce(images, scale)

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
        scaling_factor: what the family's pipeline scales latents by, whatever the VAE's configuration says; None: what
            that says.
        with_image: whether the image itself is cached too, in the size of its latents, for what is conditioned on it.
        vae_bytes: the weights of the published VAEs in float32; all of one factor have one architecture.
    """

    channels: int = 4
    factor: int = 8
    scaling_factor: float | None = None
    with_image: bool = False
    vae_bytes: int = 334_600_000
    component: str | None = "vae"
    crops_once: bool = True
    cached: str = "latents"

    def encode(self, moments: Tensor, draws: Draws) -> Tensor:
        """x ~ N(mean, std^2), float32 `[B, C, h, w]`.

        Args:
            moments: `[B, 2C, h, w]` as [mean, std], both scaled so that latents have about unit variance; further
                channels are not looked at.
        """
        mean, std = moments[:, : 2 * self.channels].float().chunk(2, dim=1)
        return mean + std * draws.normal(mean.shape)

    def reduced(self, cached: Tensor, scale: int) -> Tensor:
        """The images, so many times smaller as they were cached beside their moments: uint8 `[B, 3, h, w]`.

        Raises:
            ValueError: they were not.
        """
        if not self.with_image or scale != self.factor:
            raise ValueError(f"of latents {self.factor} times smaller, no images {scale} times smaller are cached")
        return cached[:, 2 * self.channels :].to(torch.uint8)

    def size(self, image: Size) -> Size:
        return Size(image.width // self.factor, image.height // self.factor)

    def cached_bytes(self, image: Size) -> int:
        width, height = self.size(image)
        return (2 * self.channels + 3 * self.with_image) * width * height * torch.float16.itemsize

    def encoding_bytes(self, images: int, size: Size) -> int:
        """About what a published VAE takes to encode so many images of this size, in pixels, at a time."""
        return self.vae_bytes + ENCODING_BYTES * images * size.width * size.height

    def fingerprint(self, folder: Path, variant: str | None = None) -> dict[str, str]:
        """What determines the cached moments besides the image: those of another VAE are made anew."""
        image = {"image": f"{self.factor} times smaller"} if self.with_image else {}
        return {"vae": fingerprint_model(folder / "vae", variant)} | image

    def load(self, folder: Path, device: torch.device, variant: str | None = None) -> AutoencoderKL:
        """The VAE, in float32: SD's own lose detail or overflow in less."""
        try:
            vae = load_whole(AutoencoderKL, folder / "vae", dtype=torch.float32, variant=variant)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a config of any content makes diffusers raise
            raise unfit("the VAE", folder, error) from error
        if self.scaling_factor is not None:
            vae.register_to_config(scaling_factor=self.scaling_factor)
        return vae.to(device).eval()

    @torch.inference_mode()
    def cached_of(self, vae: AutoencoderKL, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` on any device to what is cached: the moments, float16 `[B, 2C, h, w]` on the CPU.

        float16 keeps 11 bits of each, which is less than sampling blurs. The image beside them, with values of 0..255,
        is three channels more, and exact.
        """
        images = images.to(vae.device)
        posterior = vae.encode(to_float(images)).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor
        cached = torch.cat([moments, reduce(images, self.factor)], dim=1) if self.with_image else moments
        return cached.to("cpu", torch.float16)


def to_float(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` in [-1, 1], on the same device."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
