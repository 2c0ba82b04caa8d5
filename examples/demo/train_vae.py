"""Train the VAE of the demo's Stable Diffusion on freshly drawn pictures, and set its scaling factor.

    python -m examples.demo.train_vae FOLDER [--steps 1500]

FOLDER is as examples.demo.make_sd writes it. `scaling_factor` becomes 1 / (standard deviation of the latents over fresh
pictures), as diffusers has it: times that, latents have one of 1. The same arguments train the same weights. It takes
ten minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from examples.demo.draw import COLOURS, OUTLINES, Thing, draw

EVERYTHING = tuple(Thing(colour, shape) for colour, shape in product(COLOURS, OUTLINES))
EDGE = 128
"""Pixels; the demo's resolution."""
OTHER_EDGES = (64, 96, 128, 160)
BATCH = 8
LEARNING_RATE = 2e-3
WARMUP = 100
KL_WEIGHT = 3e-4
"""Against errors of pixels in -1..1: enough to keep the latents smooth, far too little to blur the pictures."""
SPREAD_WEIGHT = 0.01
"""Without it one channel tells nearly all, and the others little else; a UNet learns that badly."""


def pictures(count: int, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Drawn pictures of `size` (width, height), float32 [count, 3, H, W] in -1..1."""
    chosen = rng.integers(len(EVERYTHING), size=count)
    drawn = np.stack([np.asarray(draw(EVERYTHING[i], size, rng)) for i in chosen])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1


def sizes(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """The demo's own size, and by turns another, so that the VAE serves buckets of other aspects too."""
    while True:
        yield EDGE, EDGE
        width, height = rng.choice(OTHER_EDGES, 2)
        yield int(width), int(height)


def loss_of(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """How far off the pixels are, and the latents: each from a normal one, and their channels from being uncorrelated.

    All of them are means: of absolute and squared errors, KL divergences, squared errors of the covariance.
    """
    latents = vae.encode(images).latent_dist
    errors = vae.decode(latents.sample(generator)).sample - images
    divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
    spread = latents.mean.transpose(0, 1).flatten(1).cov() - torch.eye(latents.mean.shape[1])
    pixels = errors.abs().mean() + errors.square().mean()
    return pixels + KL_WEIGHT * divergence + SPREAD_WEIGHT * spread.square().mean()


def train(vae: AutoencoderKL, steps: int, seed: int) -> None:
    """Train in place; the learning rate rises, then falls to 0 along a cosine."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99))
    vae.train()
    for step, size in zip(range(steps), sizes(rng)):
        rise, fall = min(1, (step + 1) / WARMUP), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rise * fall
        loss = loss_of(vae, pictures(BATCH, size, rng), generator)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    vae.eval()


@torch.no_grad()
def centre(vae: AutoencoderKL, images: Tensor) -> None:
    """Move each channel's mean over the latents to 0, in the convolutions beside them; pictures stay the same."""
    means = latents_of(vae, images).mean((0, 2, 3))
    vae.quant_conv.bias[: len(means)] -= means
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ means


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Sampled latents, not scaled, [N, 4, H/8, W/8]."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([vae.encode(part).latent_dist.sample(generator) for part in images.split(BATCH)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Of the pictures after the VAE, in dB."""
    decoded = torch.cat([vae.decode(part).sample for part in latents_of(vae, images).split(BATCH)])
    return 10 * math.log10(4 / functional.mse_loss(decoded.clamp(-1, 1), images).item())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the VAE of the demo's Stable Diffusion.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(arguments.folder / "vae")
    train(vae, arguments.steps, arguments.seed)
    fresh = pictures(200, (EDGE, EDGE), np.random.default_rng([arguments.seed, 1]))
    centre(vae, fresh)
    scaling_factor = 1 / latents_of(vae, fresh).std().item()
    vae.register_to_config(scaling_factor=scaling_factor, _name_or_path="")  # that was a path of this machine
    vae.save_pretrained(arguments.folder / "vae")
    print(f"PSNR {psnr(vae, fresh):.1f} dB, scaling factor {scaling_factor:.4f}")


if __name__ == "__main__":
    main()
