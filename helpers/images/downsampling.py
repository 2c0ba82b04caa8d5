"""Shrinking an image 25 % at a time, or at once."""

from __future__ import annotations

from PIL import Image

from helpers.images.resampling import resize_in_steps
from helpers.sizes import Size

METHODS = ("stepwise", "single")
MODES = ("L", "RGB", "CMYK", "LAB")
"""Of images whose steps are taken at once."""


def steps(source: Size, target: Size) -> list[Size]:
    """The sizes to pass through from source to target, the target last.

    While both edges can lose a quarter and stay above the target they do, by one factor; the height follows from the
    source's own ratio, so that rounding never adds up to a drift of the aspect. Enlarging takes one step.
    """
    sizes = []
    width, height = source
    while 3 * width > 4 * target.width and 3 * height > 4 * target.height:
        width = max(target.width, 3 * width // 4)
        height = max(target.height, (2 * source.height * width + source.width) // (2 * source.width))
        sizes.append(Size(width, height))
    return sizes if sizes and sizes[-1] == target else [*sizes, target]


def resize(
    image: Image.Image, target: Size, method: str = "stepwise", box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """Resize by Pillow's antialiased Lanczos filter; several steps as the one that they come to.

    Args:
        method: "stepwise" (25 % at a time) or "single" (one leap).
        box: the part of the image to take, in its pixels, fractions allowed: the picture proper inside a JPEG that was
            decoded at a reduced size.

    Raises:
        ValueError: if the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"downsample_method {method!r} is unknown: use {' or '.join(METHODS)}")
    sizes = steps(Size(*image.size), target) if method == "stepwise" else [target]
    if len(sizes) > 1 and image.mode in MODES:
        return resize_in_steps(image, sizes, box)
    for size in sizes:
        image = image.resize(size, Image.Resampling.LANCZOS, box=box)
        box = None
    return image
