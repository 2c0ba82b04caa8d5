"""The pixel cache: images at the size that they are cropped from, uint8, decoded once."""

from __future__ import annotations

import hashlib
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

    def read_into(self, key: str, out: np.ndarray, left: int = 0, top: int = 0) -> None:
        """Fill `out` (uint8 [H, W, 3]) with the part of the image that begins at (left, top).

        Raises:
            KeyError: the image was not built.
            ValueError: the part reaches out of the image.
        """
        image = self.store.view(key).reshape(self.store.shape(key))
        part = image[top : top + out.shape[0], left : left + out.shape[1]]
        if part.shape != out.shape:
            raise ValueError(f"image {key} is {image.shape[1]}x{image.shape[0]}: no {out.shape} at ({left}, {top})")
        out[:] = part


def pixel_key(content: str, intermediate: Size, method: str) -> str:
    """The key of an image in the cache: `content` is the hash of the file's bytes."""
    return hashlib.blake2b(f"{content} {intermediate} {method}".encode(), digest_size=16).hexdigest()
