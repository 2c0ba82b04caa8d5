import numpy as np
from PIL import Image

from helpers.validation.sheet import Cell, sheet


def solid(colour: str, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)


def count(page: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(page) == colour).all(-1).sum())


def test_every_picture_is_shown_whole_and_small_ones_enlarged_by_a_whole_factor():
    rows = [
        [Cell(solid("red", (64, 64)), "one"), Cell(solid("lime", (96, 64)), "two")],
        [Cell(solid("blue", (256, 300)), "three")],
    ]
    page = sheet(rows)
    assert count(page, (255, 0, 0)) == 192 * 192
    assert count(page, (0, 255, 0)) == 288 * 192
    assert count(page, (0, 0, 255)) == 256 * 300


def test_labels_are_written_below_the_pictures_and_long_ones_wrap():
    short = sheet([[Cell(solid("white", (192, 192)), "a cat")]])
    long = sheet([[Cell(solid("white", (192, 192)), "a cat " * 30)]])
    assert count(short, (0, 0, 0)) > 0
    assert long.width == short.width and long.height > short.height
