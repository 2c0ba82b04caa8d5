"""PNG files that say how they were made, as text that runs nothing when it is read."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from helpers.files import printable, write_whole

KEY = "floydtuner"
"""The keyword of the PNG's text chunk."""

HALVES = re.compile("[\ud800-\udfff]")
"""Halves of UTF-16 pairs, which stand for bytes that are no UTF-8."""

LONGEST = 500_000
"""Letters of a recipe that is read: 16 pictures made together, each with the longest prompt, have fewer."""


class NoRecipe(ValueError):
    """An image that does not say how it was made; `str()` says why, without the file's name."""


def save_png(image: Image.Image, path: Path, recipe: Mapping[str, Any]) -> None:
    """Write an image and its recipe, whole or not at all; equal ones give equal bytes.

    Args:
        recipe: plain JSON values.

    Raises:
        DiskFull: there is no room for it.
    """
    chunks = PngImagePlugin.PngInfo()
    text = json.dumps(recipe, ensure_ascii=False, sort_keys=True)
    # Of names of files that are no UTF-8, which PNG cannot hold.
    chunks.add_itxt(KEY, HALVES.sub(lambda half: f"\\u{ord(half[0]):04x}", text))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    write_whole(path, file.getvalue())


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe of an image, from its header: no pixel is decoded.

    Raises:
        OSError: the file cannot be read.
        NoRecipe: it is no PNG, or it has no recipe that can be read.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(KEY)
    except (Image.UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise NoRecipe("it is no PNG, or it is damaged") from error
    if not isinstance(text, str):
        raise NoRecipe("no recipe is in it: it was not made here, or a program that saved it again left that out")
    if len(text) > LONGEST:
        raise NoRecipe(f"its recipe has {len(text):,} letters: it is damaged")
    try:
        recipe = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise NoRecipe("its recipe is damaged") from error
    if not isinstance(recipe, dict):
        raise NoRecipe("its recipe is damaged")
    return recipe


def compared(made: Path, before: Path) -> str:
    """What to say of a picture that was made again, beside the file whose recipe it was made by.

    Raises:
        OSError: one of them cannot be read.
    """
    if made.read_bytes() == before.read_bytes():
        return f"The same bytes as {printable(before)}."
    with Image.open(made) as one, Image.open(before) as other:
        if (one.size, one.mode) != (other.size, other.mode):
            return f"Not the picture in {printable(before)}: that has {other.width}x{other.height} pixels."
        apart = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
    if not apart.any():
        return f"The same pixels as {printable(before)}; what stands beside them differs."
    words = f"up to {apart.max()} of 255 apart, in {(apart > 0).mean():.1%} of its values"
    return f"Not quite the picture in {printable(before)}: {words}."
