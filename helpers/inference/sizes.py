"""The size at which each stage works, from the size that is asked for. Whole numbers in, whole numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.config.inference_options import Shape
from helpers.sizes import Size


@dataclass(frozen=True)
class Extent:
    """What a stage does to sizes.

    Attributes:
        scale: how many times larger its picture is than its low-resolution image; 1 where it has none.
        alignment: every edge of its picture is a multiple of so many pixels.
        edge: of the square pictures that it was made for.
        largest: the longest edge that it makes.
    """

    scale: int
    alignment: int
    edge: int
    largest: int


class Impossible(ValueError):
    """A size that the stages cannot make; the message says why and what to type."""


def stage_sizes(extents: Sequence[Extent], shape: Shape | None) -> tuple[Size, ...]:
    """The size of each stage's picture, each an exact multiple of the one before.

    Args:
        shape: of the last picture; as a ratio the shorter edge is what the first stage was made for, as DeepFloyd IF
            has it. None: a square.

    Raises:
        Impossible: an edge would be longer than a stage makes.
    """
    first, *_ = extents
    step = _step(extents)
    if shape is None or shape.is_ratio:
        long, short = (1, 1) if shape is None else (max(shape[:2]), min(shape[:2]))
        edges = _rounded(first.edge * long / short, step), _rounded(first.edge, step)
        wide = shape is None or shape.width >= shape.height
        start = Size(*edges) if wide else Size(*reversed(edges))
    else:
        factor = math.prod(extent.scale for extent in extents)
        start = Size(*(_rounded(edge / factor, step) for edge in shape[:2]))
    return _following(start, extents)


def upscaled_sizes(extents: Sequence[Extent], image: Size, shape: Shape | None) -> tuple[Size, ...]:
    """The size that an image is brought to, and then that of each stage's picture of it.

    Args:
        shape: of the last picture; None, or a ratio: the image stays as large as it is, but for the alignment and what
            is cut off for the ratio.

    Raises:
        Impossible: see `stage_sizes`.
    """
    itself = Extent(1, 1, min(image), max(image))
    step = _step([itself, *extents])
    if shape is None:
        start = Size(*(_floored(edge, step) for edge in image))
    elif shape.is_ratio:
        ratio = shape.width / shape.height
        cut = min(image.width, image.height * ratio), min(image.height, image.width / ratio)
        start = Size(*(_floored(edge, step) for edge in cut))
    else:
        factor = math.prod(extent.scale for extent in extents)
        start = Size(*(_rounded(edge / factor, step) for edge in shape[:2]))
    return (start, *_following(start, extents))


def _following(start: Size, extents: Sequence[Extent]) -> tuple[Size, ...]:
    sizes, size = [], start
    for extent in extents:
        size = Size(size.width * extent.scale, size.height * extent.scale)
        if max(size) > extent.largest:
            most = extent.largest * math.prod(later.scale for later in extents[len(sizes) + 1 :])
            raise Impossible(
                f"would need pictures of {size} of a stage that makes edges of up to {extent.largest}: type --size with"
                f" edges of at most {most}, or leave it out"
            )
        sizes.append(size)
    return tuple(sizes)


def _step(extents: Sequence[Extent]) -> int:
    """What the first picture's edges must be multiples of, so that all later ones are aligned."""
    step, factor = 1, 1
    for extent in extents:
        factor *= extent.scale
        step = math.lcm(step, extent.alignment // math.gcd(extent.alignment, factor))
    return step


def _rounded(edge: float, step: int) -> int:
    return max(1, math.floor(edge / step + 0.5)) * step


def _floored(edge: float, step: int) -> int:
    return max(1, math.floor(edge / step)) * step
