"""Sizes in pixels, always width x height."""

from __future__ import annotations

import re
from typing import NamedTuple


class Size(NamedTuple):
    """Width and height in pixels, after EXIF orientation."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Read a comma-separated list of edges and sizes: "64,96,64x96" is 64x64, 96x96 and 64x96.

    Raises:
        ValueError: in words, if an entry is neither `N` nor `WxH` with positive whole numbers.
    """
    return tuple(_parse_size(entry.strip()) for entry in text.split(","))


def _parse_size(entry: str) -> Size:
    match = re.fullmatch(r"(\d+)(?:\s*[xX]\s*(\d+))?", entry)
    if match is None:
        raise ValueError(f"{entry!r} is not a size: type an edge like 64 or a size like 96x64")
    width, height = int(match[1]), int(match[2] or match[1])
    if width == 0 or height == 0:
        raise ValueError(f"{entry!r} has an edge of 0 pixels")
    return Size(width, height)
