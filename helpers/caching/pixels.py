"""The pixel cache: images at the size that they are cropped from, uint8, decoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from helpers.caching.images import ImageCache
from helpers.sizes import Size

_RECIPE = {"kind": "pixels", "version": "2"}  # raise the version when `load` gives other pixels than before


class PixelJob(NamedTuple):
    """An image to be cached; see `images.Job`."""

    path: Path
    content: str
    size: Size
    method: str

    @property
    def key(self) -> str:
        return pixel_key(self.content, self.size, self.method)


class PixelCache(ImageCache):
    """Decoded images by content, size and method."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _RECIPE)

    def read(self, keys: Sequence[str], corners: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """Fill `out` (uint8 [B, H, W, 3]) with the parts of B images that begin at these corners, (left, top).

        Raises:
            KeyError: an image was not built.
            ValueError: a part reaches out of its image.
        """
        _, height, width, _ = out.shape
        for key, (left, top), record, row in zip(keys, corners, self.store.records(keys), out):
            part = record.content.reshape(record.shape)[top : top + height, left : left + width]
            if part.shape != row.shape:
                size = f"{record.shape[1]}x{record.shape[0]}"
                raise ValueError(f"image {key} is {size}: no {width}x{height} at ({left}, {top})")
            row[:] = part


def pixel_key(content: str, intermediate: Size, method: str) -> str:
    """The key of an image in the cache: `content` is the hash of the file's bytes."""
    return hashlib.blake2b(f"{content} {intermediate} {method}".encode(), digest_size=16).hexdigest()
