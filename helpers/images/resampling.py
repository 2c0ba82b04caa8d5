"""Several resizes by Lanczos as one: the same filter in the same steps, multiplied out and rounded once.

Pillow's resize is linear and separable: along each axis a step is a matrix of few numbers a row. The product of those of
all steps says how each pixel of the result hangs on those of the source; so nothing in between is computed, rounded to
8 bits or clipped, and a result takes a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from helpers.sizes import Size

LOBES = 3
"""Of the filter, on either side."""

ROWS = 32
"""Of a matrix that are multiplied at a time, with the columns that any of them is not 0 in."""


@dataclass(frozen=True, eq=False)
class _Block:
    """Some rows of a matrix, float32 [rows, columns], of the columns from `start` to `stop`: all others are 0."""

    start: int
    stop: int
    weights: np.ndarray


def resize_in_steps(
    image: Image.Image, sizes: Sequence[Size], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """Resize through all of the sizes.

    Args:
        image: of 8-bit channels: mode L, RGB, CMYK or LAB.
        box: the part of the image to take, (left, top, right, bottom), in its pixels.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    across = _chain(width, left, right, tuple(size.width for size in sizes))
    down = _chain(height, top, bottom, tuple(size.height for size in sizes))
    target = sizes[-1]
    rows = pixels.reshape(height, -1)
    shrunk = np.concatenate([block.weights @ rows[block.start : block.stop].astype(np.float32) for block in down])
    columns = np.ascontiguousarray(shrunk.reshape(target.height, width, -1).swapaxes(0, 1)).reshape(width, -1)
    made = np.concatenate([block.weights @ columns[block.start : block.stop] for block in across])
    made = made.reshape(target.width, target.height, -1).swapaxes(0, 1)
    rounded = np.clip(made + np.float32(0.5), 0, 255).astype(np.uint8)
    return Image.frombytes(image.mode, target, rounded.tobytes())


@lru_cache(maxsize=256)
def _chain(length: int, low: float, high: float, lengths: tuple[int, ...]) -> tuple[_Block, ...]:
    """The matrix of all steps along one axis, of which the first takes the pixels from `low` to `high`."""
    sources = [(length, low, high), *((before, 0.0, float(before)) for before in lengths)]
    band = _Band(np.arange(lengths[-1]), np.ones((lengths[-1], 1)))
    for source, after in reversed(list(zip(sources, lengths))):
        band = _times_step(band, *source, after)
    return tuple(_blocks(band, length))


class _Band(NamedTuple):
    """A matrix whose row i is `weights[i]`, float64, in the columns from `start[i]` on, and 0 elsewhere."""

    start: np.ndarray
    weights: np.ndarray


def _times_step(band: _Band, before: int, low: float, high: float, after: int) -> _Band:
    """A matrix of `after` columns times that of a step, whose coefficients are Pillow's (libImaging/Resample.c)."""
    if (low, high, after) == (0, before, before):
        return band
    scale = (high - low) / after
    reach = max(scale, 1)  # of the filter, which is as wide as a pixel of the result, or of the source if that is larger
    centres = low + (np.arange(after) + 0.5) * scale
    begin = np.maximum(np.floor(centres - LOBES * reach + 0.5).astype(int), 0)
    end = np.minimum(np.floor(centres + LOBES * reach + 0.5).astype(int), before)
    taps = np.arange((end - begin).max())
    places = begin[:, None] + taps
    step = _lanczos((places - centres[:, None] + 0.5) / reach) * (places < end[:, None])
    step /= step.sum(1, keepdims=True)
    passed = np.minimum(band.start[:, None] + np.arange(band.weights.shape[1]), after - 1)  # beyond it weights are 0
    start = begin[passed[:, 0]]
    weights = np.zeros((len(start), (begin[passed[:, -1]] - start).max() + len(taps)))
    rows = np.arange(len(start))[:, None]
    for own, column in zip(band.weights.T, passed.T):
        weights[rows, (begin[column] - start)[:, None] + taps] += own[:, None] * step[column]
    return _Band(start, weights)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LOBES, np.sinc(x) * np.sinc(x / LOBES), 0.0)


def _blocks(band: _Band, length: int) -> Iterator[_Block]:
    span = np.arange(band.weights.shape[1])
    for first in range(0, len(band.start), ROWS):
        starts, weights = band.start[first : first + ROWS], band.weights[first : first + ROWS]
        low, high = int(starts.min()), int(starts.max()) + len(span)
        dense = np.zeros((len(starts), high - low), np.float32)
        dense[np.arange(len(starts))[:, None], (starts - low)[:, None] + span] = weights
        yield _Block(low, min(high, length), np.ascontiguousarray(dense[:, : length - low]))
