"""Score the demo's stage II or III: by how much does it beat bicubic upscaling, on pictures that it never saw?

    python -m examples.demo.score_stage2 MODEL_FOLDER [--lora LORA_FOLDER] [--pictures 16]

makes new pictures of the known things small, has the model's pipeline make them large again, and prints their PSNR.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image

from examples.demo.draw import CAPTIONS, draw, things
from helpers.models.results import load_adapter
from helpers.validation.eval_images import low_resolution, psnr

SCALE = 4


def held_out(count: int, edge: int, seed: int) -> list[tuple[str, Image.Image]]:
    """`count` new pictures of `edge` pixels with their captions; no picture of the training sets has this seed."""
    rng = np.random.default_rng(seed)
    return [
        (CAPTIONS[0].format(thing=thing), draw(thing, (edge, edge), rng))
        for thing in things("known", count)
    ]


def upscale(
    pipeline: DiffusionPipeline,
    caption: str,
    small: Image.Image,
    size: tuple[int, int],
    options: argparse.Namespace,
) -> Image.Image:
    """The small picture at `size` (width, height), by the model; the same arguments give the same picture.

    Stage II has to be told the size, and is shown more noise unless the options say otherwise.
    """
    arguments = inspect.signature(pipeline.__call__).parameters
    own = {"width": size[0], "height": size[1]} if "width" in arguments else {}
    level = options.noise_level if options.noise_level is not None else arguments["noise_level"].default
    return pipeline(
        prompt=caption,
        image=small,
        **own,
        noise_level=level,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]


def gain(pipeline: DiffusionPipeline, options: argparse.Namespace) -> tuple[float, float]:
    """The mean PSNR in dB of the model's pictures, and of bicubic upscaling."""
    scores = []
    for caption, original in held_out(options.pictures, options.edge, options.seed):
        small = low_resolution(original, SCALE)
        mine = psnr(upscale(pipeline, caption, small, original.size, options), original)
        bicubic = psnr(small.resize(original.size, Image.Resampling.BICUBIC), original)
        print(f"{caption:>32}   model {mine:6.2f} dB   bicubic {bicubic:6.2f} dB", flush=True)
        scores.append((mine, bicubic))
    model, bicubic = np.mean(scores, axis=0)
    return float(model), float(bicubic)


def load_pipeline(model: Path, lora: Path | None = None) -> DiffusionPipeline:
    """The pipeline in a folder, with an adapter if one is given."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        load_adapter(pipeline, lora)
    return pipeline


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score the demo's stage II or III against bicubic upscaling.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--edge", type=int, default=64, help="of the large pictures, in pixels")
    parser.add_argument("--noise-level", type=int, help="unset: diffusers' default, 250 or 20")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--gain-at-least", type=float, default=-100.0, help="in dB over bicubic; less exits with 1")
    return parser.parse_args(argv)


def main() -> int:
    options = parse()
    model, bicubic = gain(load_pipeline(options.model, options.lora), options)
    print(f"{'mean':>32}   model {model:6.2f} dB   bicubic {bicubic:6.2f} dB   gain {model - bicubic:+.2f} dB")
    return int(model - bicubic < options.gain_at_least)


if __name__ == "__main__":
    sys.exit(main())
