"""The scorer is only worth its figures if it names drawn pictures, whose truth is known, correctly."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from examples.demo.draw import KNOWN, SUBJECT, Thing, draw, write
from examples.demo.score import Seen, see, tally

EVERYTHING = (*KNOWN, SUBJECT)


def pictures(thing: Thing, count: int) -> list[np.ndarray]:
    """Drawn pictures of a thing, reduced to the 64 px that the model draws."""
    rng = np.random.default_rng(7)
    edges = rng.integers(80, 200, count)
    drawn = [draw(thing, (int(edge), int(edge)), rng) for edge in edges]
    return [np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS)) for picture in drawn]


@pytest.mark.parametrize("thing", EVERYTHING, ids=str)
def test_drawn_things_are_named_rightly_and_as_nothing_else(thing):
    drawn = np.stack(pictures(thing, 20))
    assert tally([thing] * 20, drawn).both >= 0.98
    for other in EVERYTHING:
        if other != thing:
            assert tally([other] * 20, drawn).both <= 0.02


def test_half_resolution_still_tells_shapes_apart():
    for thing in EVERYTHING:
        small = [np.asarray(Image.fromarray(p).resize((32, 32)).resize((64, 64))) for p in pictures(thing, 5)]
        assert tally([thing] * 5, np.stack(small)).both >= 0.8


def test_pictures_of_nothing_are_not_named():
    rng = np.random.default_rng(0)
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flood = np.full((64, 64, 3), (220, 40, 40), np.uint8)
    assert see(grey) == see(flood) == Seen(None, None)
    assert see(noise).shape is None


def test_a_blot_of_the_right_colour_has_no_shape():
    blot = np.full((64, 64, 3), 200, np.uint8)
    blot[10:50, 20:32] = (150, 45, 205)
    assert see(blot) == Seen("purple", None)


@pytest.mark.parametrize(
    "hue, name", [((90, 20, 140), "purple"), ((255, 120, 120), "red"), ((20, 230, 230), None)]
)
def test_shades_keep_the_name_of_their_colour_and_strange_hues_have_none(hue, name):
    picture = np.full((64, 64, 3), 220, np.uint8)
    picture[16:48, 16:48] = hue
    assert see(picture) == Seen(name, "square")


def test_tally_counts_colour_and_shape_apart():
    rng = np.random.default_rng(1)
    drawn = np.stack([np.asarray(draw(Thing("red", "circle"), (64, 64), rng)) for _ in range(2)])
    scored = tally([Thing("red", "square"), Thing("blue", "circle")], drawn)
    assert (scored.colour, scored.shape, scored.both) == (0.5, 0.5, 0.0)


def test_the_same_seed_draws_the_same_files_at_odd_sizes_with_captions(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, "known", 20, seed=3, edges=(80, 400))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 40
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    sizes = {Image.open(path).size for path in (tmp_path / "a").iterdir() if path.suffix != ".txt"}
    assert len(sizes) > 15
    assert all(80 <= edge <= 400 for size in sizes for edge in size)
    captions = [(tmp_path / "a" / n).read_text(encoding="utf-8") for n in names if n.endswith(".txt")]
    assert all(str(thing) in caption for thing, caption in zip(KNOWN, captions))


@pytest.mark.parametrize("corner", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_every_square_crop_shows_the_whole_thing(corner):
    rng = np.random.default_rng(4)
    for thing in EVERYTHING:
        for size in ((105, 120), (120, 105)):
            left, top = (round(c * (edge - min(size))) for c, edge in zip(corner, size))
            box = (left, top, left + min(size), top + min(size))
            seen = see(np.asarray(draw(thing, size, rng).resize((64, 64), box=box)))
            assert seen.shows(thing)
