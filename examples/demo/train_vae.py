"""Train the VAE of the demo's Stable Diffusion, or of its stage III, on freshly drawn pictures, and set its scale.

    python -m examples.demo.train_vae FOLDER [--steps 1500]
    python -m examples.demo.train_vae FOLDER --any-colour --edge 64 --pieces-of 384 --scaling-factor 0.08333

FOLDER is as examples.demo.make_sd, or make_stage3, writes it. `scaling_factor` becomes 1 / (standard deviation of the
latents over fresh pictures), as diffusers has it: times that, latents have one of 1. Where the pipeline knows only one,
that is given, and the latents are brought to it. The same arguments train the same weights. It takes ten minutes on one
core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
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
ANYTHING = EVERYTHING + tuple(Thing(None, shape) for shape in OUTLINES) * len(COLOURS)
"""Half of it in the colours that have names, half in any."""
OTHER_EDGES = (Fraction(1, 2), Fraction(3, 4), Fraction(1), Fraction(5, 4))
"""By the usual one."""
BATCH = 8
LEARNING_RATE = 2e-3
WARMUP = 100
KL_WEIGHT = 3e-4
"""Against errors of pixels in -1..1: enough to keep the latents smooth, far too little to blur the pictures."""
SPREAD_WEIGHT = 0.01
"""Without it one channel tells nearly all, and the others little else; a UNet learns that badly."""


def pictures(
    count: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    piece_of: int = 0,
    things: Sequence[Thing] = EVERYTHING,
) -> Tensor:
    """Drawn pictures of `size` (width, height), float32 [count, 3, H, W] in -1..1.

    Args:
        piece_of: the edge of the one square picture that all are pieces of; 0: they are whole ones.
    """
    if piece_of:
        whole = np.asarray(draw(things[rng.integers(len(things))], (piece_of, piece_of), rng))
        corners = [[int(rng.integers(piece_of - edge + 1)) for edge in size] for _ in range(count)]
        drawn = np.stack([whole[top : top + size[1], left : left + size[0]] for left, top in corners])
    else:
        chosen = rng.integers(len(things), size=count)
        drawn = np.stack([np.asarray(draw(things[i], size, rng)) for i in chosen])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1


def sizes(rng: np.random.Generator, edge: int, pieces_of: int) -> Iterator[tuple[tuple[int, int], int]]:
    """The usual size, and by turns another, so that the VAE serves buckets of other aspects too.

    With each goes the edge of the picture that it is a piece of, for every third where there are `pieces_of`; else 0.
    """
    while True:
        yield (edge, edge), 0
        width, height = rng.choice([int(edge * other) for other in OTHER_EDGES], 2)
        yield (int(width), int(height)), 0
        if pieces_of:
            yield (edge, edge), int(rng.integers(2 * edge, pieces_of + 1))


def loss_of(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """How far off the pixels are, and the latents: each from a normal one, and their channels from being uncorrelated.

    All of them are means: of absolute and squared errors, KL divergences, squared errors of the covariance.
    """
    latents = vae.encode(images).latent_dist
    errors = vae.decode(latents.sample(generator)).sample - images
    if not latents.mean.requires_grad:  # the decoder is trained alone, for its PSNR
        return errors.square().mean()
    pixels = errors.abs().mean() + errors.square().mean()
    divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
    spread = latents.mean.transpose(0, 1).flatten(1).cov() - torch.eye(latents.mean.shape[1])
    return pixels + KL_WEIGHT * divergence + SPREAD_WEIGHT * spread.square().mean()


def train(vae: AutoencoderKL, options: argparse.Namespace) -> None:
    """Train in place what requires a gradient; the learning rate rises, then falls to 0 along a cosine."""
    steps, batch = options.steps, options.batch
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99))
    vae.train()
    for step, (size, piece_of) in zip(range(steps), sizes(rng, options.edge, options.pieces_of)):
        rise, fall = min(1, (step + 1) / WARMUP), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = options.learning_rate * rise * fall
        loss = loss_of(vae, pictures(batch, size, rng, piece_of, options.things), generator)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trained, 1.0)
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
def stretch(vae: AutoencoderKL, times: float) -> None:
    """Make the latents so many times larger, in the convolutions beside them; pictures stay the same."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= times
    vae.quant_conv.bias[:channels] *= times
    vae.quant_conv.bias[channels:] += 2 * math.log(times)  # the logarithm of their variance
    vae.post_quant_conv.weight /= times


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Sampled latents, not scaled, [N, 4, h, w]."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([vae.encode(part).latent_dist.sample(generator) for part in images.split(BATCH)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Of the pictures after the VAE, in dB."""
    decoded = torch.cat([vae.decode(part).sample for part in latents_of(vae, images).split(BATCH)])
    return 10 * math.log10(4 / functional.mse_loss(decoded.clamp(-1, 1), images).item())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the VAE of a demo.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--edge", type=int, default=128, help="of most pictures, in pixels")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--decoder-alone", action="store_true", help="latents stay what they are")
    parser.add_argument("--pieces-of", type=int, default=0, help="largest edge of pictures to show pieces of; 0: none")
    parser.add_argument("--any-colour", dest="things", action="store_const", const=ANYTHING, default=EVERYTHING)
    parser.add_argument("--scaling-factor", type=float, help="what the pipeline scales all latents by")
    arguments = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(arguments.folder / "vae")
    if arguments.decoder_alone:
        vae.requires_grad_(False).decoder.requires_grad_(True)
    train(vae, arguments)
    fresh = pictures(200, (arguments.edge, arguments.edge), np.random.default_rng([arguments.seed, 1]))
    scaling_factor = vae.config.scaling_factor
    if not arguments.decoder_alone:
        centre(vae, fresh)
        scaling_factor = 1 / latents_of(vae, fresh).std().item()
    if arguments.scaling_factor:
        stretch(vae, scaling_factor / arguments.scaling_factor)
        scaling_factor = arguments.scaling_factor
    vae.register_to_config(scaling_factor=scaling_factor, _name_or_path="")  # that was a path of this machine
    vae.save_pretrained(arguments.folder / "vae")
    print(f"PSNR {psnr(vae, fresh):.1f} dB, scaling factor {scaling_factor:.4f}")


if __name__ == "__main__":
    main()
