"""Draw the demo's captioned pictures: one coloured shape on a pale, grainy ground.

    python -m examples.demo.draw FOLDER --kind known --count 60 --seed 1

writes `0000.jpg` and `0000.txt` and so on. The same arguments always draw the same pictures.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 225),
    "yellow": (240, 205, 30),
    "purple": (150, 45, 205),
}
"""Every colour a picture may have, in sRGB; the last one is the subject's."""

CAPTIONS = ("a photo of a {thing}", "a picture of a {thing}", "a {thing}")
OVERSAMPLING = 3


@dataclass(frozen=True)
class Thing:
    """What a picture shows, in the words of its caption; one of any colour has no word for it."""

    colour: str | None
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}" if self.colour else self.shape


def _regular(corners: int, turn: float) -> list[tuple[float, float]]:
    angles = (turn + 2 * math.pi * k / corners for k in range(corners))
    return [(math.cos(a), math.sin(a)) for a in angles]


def _cross(arm: float) -> list[tuple[float, float]]:
    """Four quarters of (-arm, -1), (arm, -1), (arm, -arm), each a quarter turn further."""
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    return [(x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter]


def _heart() -> list[tuple[float, float]]:
    """x = sin^3 a, y = -(13 cos a - 5 cos 2a - 2 cos 3a - cos 4a) / 16, a little above the middle of the frame."""
    angles = [2 * math.pi * k / 90 for k in range(90)]
    height = (
        13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles
    )
    return [(math.sin(a) ** 3, -y / 16 - 0.12) for a, y in zip(angles, height)]


OUTLINES = {
    "circle": _regular(90, 0),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.9), (1.0, 0.85), (-1.0, 0.85)],
    "cross": _cross(0.32),
    "heart": _heart(),
}
"""Outline of every shape in a frame of -1..1, y down; the last one is the subject's."""

SUBJECT = Thing("purple", "heart")
KNOWN = tuple(
    Thing(c, s) for c, s in product(COLOURS, OUTLINES) if c != SUBJECT.colour and s != SUBJECT.shape
)
KINDS = {
    "known": KNOWN,
    "subject": (SUBJECT,),
    "painted": tuple(Thing(None, s) for s in OUTLINES if s != SUBJECT.shape),
}
"""What a set of pictures shows: what has names, the subject again and again, or known shapes in any colour
on grounds of more kinds."""


def mask(shape: str, size: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """How much of each pixel the shape covers, float32 [H, W] in 0..1; `size` is (width, height) in pixels."""
    width, height = size
    k = OVERSAMPLING
    canvas = Image.new("L", (width * k, height * k))
    pen = ImageDraw.Draw(canvas)
    cx, cy, r = centre[0] * k, centre[1] * k, radius * k
    pen.polygon([(cx + x * r, cy + y * r) for x, y in OUTLINES[shape]], fill=255)
    return np.asarray(canvas.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255


def draw(thing: Thing, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """An RGB picture of `size` (width, height). Up to an aspect of 8:7 no square crop cuts into the thing."""
    short = min(size)
    radius = rng.uniform(0.28, 0.36) * short
    centre = tuple(edge / 2 + rng.uniform(-0.04, 0.04) * short for edge in size)
    paint = np.array(COLOURS[thing.colour]) + rng.normal(0, 8, 3) if thing.colour else _any_colour(rng)
    cover = mask(thing.shape, size, centre, radius)[..., None]
    ground = _ground if thing.colour else _any_ground
    picture = cover * _shaded(paint, size, 0.1, rng) + (1 - cover) * ground(size, rng)
    grain = rng.normal(0, 3, (size[1], size[0], 1))
    return Image.fromarray(np.clip(picture + grain, 0, 255).round().astype(np.uint8))


def _any_colour(rng: np.random.Generator) -> np.ndarray:
    """Of any hue, as bright and as deep as the colours that have names, float [3] in 0..255."""
    return 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.55, 0.9), rng.uniform(0.65, 0.95)))


def _ground(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A pale, nearly grey ground."""
    return _shaded(rng.uniform(190, 240) + rng.normal(0, 4, 3), size, 0.08, rng)


def _any_ground(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """As other stages draw it: sometimes darker, or with a tint."""
    return _shaded(rng.uniform(140, 245) + rng.normal(0, 10, 3), size, 0.12, rng)


def _shaded(
    colour: np.ndarray, size: tuple[int, int], strength: float, rng: np.random.Generator
) -> np.ndarray:
    """The colour under a soft light from a random side, float [H, W, 3]."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    light = 1 + strength * (math.cos(angle) * x + math.sin(angle) * y)
    return light[..., None] * colour


def things(kind: str, count: int) -> Iterator[Thing]:
    """`count` things in turn, of one of the `KINDS`."""
    pool = KINDS[kind]
    return (pool[i % len(pool)] for i in range(count))


def write(folder: Path, kind: str, count: int, seed: int, edges: tuple[int, int]) -> None:
    """Draw `count` pictures with edges in pixels from least to most `edges`, and a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index, thing in enumerate(things(kind, count)):
        short = int(rng.integers(edges[0], edges[1] * 7 // 8 + 1))
        size = rng.permutation([short, int(rng.integers(short, short * 8 // 7 + 1))])
        suffix = "png" if size.max() < 140 else "jpg"
        draw(thing, (int(size[0]), int(size[1])), rng).save(folder / f"{index:04}.{suffix}", quality=88)
        caption = CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(thing=thing)
        (folder / f"{index:04}.txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw captioned pictures for the demo.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--edges", type=int, nargs=2, default=(80, 400), metavar=("LEAST", "MOST"), help="in pixels"
    )
    arguments = parser.parse_args()
    write(arguments.folder, arguments.kind, arguments.count, arguments.seed, tuple(arguments.edges))


if __name__ == "__main__":
    main()
