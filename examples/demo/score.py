"""Score pictures of the demo: is the thing that the prompt names there, in its colour and its shape?

    python -m examples.demo.score MODEL_FOLDER [--lora LORA_FOLDER] [--samples 4]

draws samples for every known prompt and for the subject's, and prints how many are right.
"""

from __future__ import annotations

import argparse
import colorsys
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image, ImageFilter

from examples.demo.draw import CAPTIONS, COLOURS, KNOWN, OUTLINES, SUBJECT, Thing, mask
from helpers.models.results import load_adapter

CONTRAST = 60
"""A pixel belongs to the thing when a channel differs by more than this (of 255) from the ground."""
AREA = (0.03, 0.6)
"""Least and most share of the picture that a thing may cover."""
HUE_ERROR = 25
"""Degrees by which a colour may miss its hue."""
OVERLAP = 0.78
"""Least intersection over union with the ideal shape."""
FRAME = 32
"""Edge in pixels of the square in which shapes are compared."""
BATCH = 16


@dataclass(frozen=True)
class Seen:
    """What a picture shows; None where it shows nothing that has a name."""

    colour: str | None
    shape: str | None

    def shows(self, thing: Thing) -> bool:
        """Whether colour and shape are both the thing's."""
        return (self.colour, self.shape) == (thing.colour, thing.shape)


def see(picture: np.ndarray) -> Seen:
    """Name the colour and shape in a uint8 picture [H, W, 3]."""
    thing = foreground(picture)
    if not AREA[0] <= thing.mean() <= AREA[1]:
        return Seen(None, None)
    return Seen(colour_of(picture[thing].mean(axis=0)), shape_of(thing))


def foreground(picture: np.ndarray) -> np.ndarray:
    """Where the picture differs from the ground at its border, bool [H, W], without lone pixels."""
    pixels = picture.astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    contrast = np.abs(pixels - np.median(border, axis=0)).max(axis=2)
    stands_out = Image.fromarray((contrast > CONTRAST).astype(np.uint8) * 255)
    return np.asarray(stands_out.filter(ImageFilter.MedianFilter(3))) > 0


def colour_of(rgb: Sequence[float]) -> str | None:
    """The colour whose hue is nearest to `rgb` (0..255)."""
    error, name = min((_hue_distance(rgb, paint), name) for name, paint in COLOURS.items())
    return name if error <= HUE_ERROR else None


def _hue_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Degrees between two hues, 0..180."""
    turn = abs(_hue(a) - _hue(b)) % 1
    return 360 * min(turn, 1 - turn)


def _hue(rgb: Sequence[float]) -> float:
    return colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in rgb))[0]


def shape_of(thing: np.ndarray) -> str | None:
    """The shape that overlaps best with a bool mask [H, W], compared in a square frame around it."""
    left, top, right, bottom = _box(thing)
    if not 0.75 <= (right - left) / (bottom - top) <= 4 / 3:
        return None
    framed = _framed(thing)
    overlap, name = max((_overlap(framed, ideal), name) for name, ideal in _ideals())
    return name if overlap >= OVERLAP else None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / (a | b).sum())


@cache
def _ideals() -> tuple[tuple[str, np.ndarray], ...]:
    """Every shape by name, stretched to fill the frame."""
    return tuple((name, _framed(mask(name, (96, 96), (48, 48), 44) > 0.5)) for name in OUTLINES)


def _framed(thing: np.ndarray) -> np.ndarray:
    """The part of a mask around its thing, stretched to a square frame."""
    left, top, right, bottom = _box(thing)
    part = Image.fromarray(thing.astype(np.uint8) * 255).crop((left, top, right, bottom))
    return np.asarray(part.resize((FRAME, FRAME), Image.Resampling.BILINEAR)) > 127


def _box(thing: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is set in a mask."""
    rows, columns = np.flatnonzero(thing.any(axis=1)), np.flatnonzero(thing.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def generate(
    pipeline: DiffusionPipeline, prompts: Sequence[str], steps: int, guidance: float, seed: int
) -> np.ndarray:
    """One picture per prompt, uint8 [N, H, W, 3]; the same arguments give the same pictures."""
    generator = torch.Generator().manual_seed(seed)
    batches = [list(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    pictures = [
        pipeline(
            prompt=batch,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        ).images
        for batch in batches
    ]
    return (np.concatenate(pictures) * 255).round().astype(np.uint8)


def load_pipeline(model: Path, lora: Path | None) -> DiffusionPipeline:
    """The pipeline in a folder, with an adapter if one is given."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        load_adapter(pipeline, lora)
    return pipeline


@dataclass(frozen=True)
class Tally:
    """Shares of samples, 0..1, whose colour, shape and both are right."""

    colour: float
    shape: float
    both: float

    def __str__(self) -> str:
        return f"colour {self.colour:6.1%}   shape {self.shape:6.1%}   both {self.both:6.1%}"


def tally(things: Sequence[Thing], pictures: np.ndarray) -> Tally:
    """Compare what each picture shows with what it should show."""
    pairs = [(thing, see(picture)) for thing, picture in zip(things, pictures, strict=True)]
    return Tally(
        colour=float(np.mean([seen.colour == thing.colour for thing, seen in pairs])),
        shape=float(np.mean([seen.shape == thing.shape for thing, seen in pairs])),
        both=float(np.mean([seen.shows(thing) for thing, seen in pairs])),
    )


def measure(
    pipeline: DiffusionPipeline, things: Sequence[Thing], samples: int, options: argparse.Namespace
) -> Tally:
    """Generate `samples` of every thing, print a line for each, and return the total."""
    wanted = [thing for thing in things for _ in range(samples)]
    prompts = [CAPTIONS[0].format(thing=thing) for thing in wanted]
    pictures = generate(pipeline, prompts, steps=options.steps, guidance=options.guidance, seed=options.seed)
    for index, thing in enumerate(things):
        mine = slice(index * samples, (index + 1) * samples)
        print(f"{thing!s:>16}   {tally(wanted[mine], pictures[mine])}")
    return tally(wanted, pictures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score the demo's model on pictures that it generates.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--samples", type=int, default=4, help="per known prompt")
    parser.add_argument("--subject-samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--known-at-least", type=float, default=0.0, help="share, 0..1; fewer exits with 1")
    parser.add_argument("--subject-at-least", type=float, default=0.0, help="share, 0..1; fewer exits with 1")
    parser.add_argument("--subject-at-most", type=float, default=1.0, help="share, 0..1; more exits with 1")
    return parser.parse_args()


def main() -> int:
    options = parse()
    pipeline = load_pipeline(options.model, options.lora)
    known = measure(pipeline, KNOWN, options.samples, options)
    subject = measure(pipeline, (SUBJECT,), options.subject_samples, options)
    print(f"{'known':>16}   {known}\n{'subject':>16}   {subject}")
    in_bounds = options.subject_at_least <= subject.both <= options.subject_at_most
    return int(known.both < options.known_at_least or not in_bounds)


if __name__ == "__main__":
    sys.exit(main())
