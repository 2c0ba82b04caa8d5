"""Downsampling: the documented 25 % steps, without aspect drift and without darkening."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from helpers.images.downsampling import resize, steps
from helpers.sizes import Size


def random_pairs(count: int) -> list[tuple[Size, Size]]:
    """A source and a smaller target of the same aspect but for rounding."""
    draw = random.Random(0)
    pairs = []
    for _ in range(count):
        source = Size(draw.randint(64, 6000), draw.randint(64, 6000))
        factor = draw.uniform(40 / min(source), 1)
        pairs.append((source, Size(round(source.width * factor), round(source.height * factor))))
    return pairs


def test_the_steps_of_a_known_case() -> None:
    assert steps(Size(400, 300), Size(96, 72)) == [
        Size(300, 225),
        Size(225, 169),
        Size(168, 126),
        Size(126, 95),
        Size(96, 72),
    ]


def test_each_step_but_the_last_loses_a_quarter_and_never_more() -> None:
    for source, target in random_pairs(500):
        sizes = [source, *steps(source, target)]
        for before, after in zip(sizes[:-2], sizes[1:-1]):
            assert after.width == 3 * before.width // 4 >= target.width and after.height >= target.height
        # The last may lose a little more than a quarter on one axis, by rounding.
        assert sizes[-1] == target
        assert target.width >= 0.75 * sizes[-2].width - 1 or target.height >= 0.75 * sizes[-2].height - 1


def test_rounding_never_adds_up_to_a_drift_of_the_aspect() -> None:
    for source, target in random_pairs(500):
        for size in steps(source, target)[:-1]:
            assert abs(size.height - size.width * source.height / source.width) <= 0.5 or size.height == target.height


@pytest.mark.parametrize(
    "source, target, expected",
    [
        ((64, 64), (64, 64), [(64, 64)]),
        ((64, 64), (128, 128), [(128, 128)]),
        ((64, 64), (60, 60), [(60, 60)]),
        ((128, 128), (96, 96), [(96, 96)]),
        ((64, 256), (64, 64), [(64, 64)]),
    ],
)
def test_small_changes_and_enlargements_take_one_step(source: tuple, target: tuple, expected: list) -> None:
    assert steps(Size(*source), Size(*target)) == expected


def in_float_steps(image: Image.Image, sizes: list[Size], box: tuple | None = None) -> np.ndarray:
    """Pillow's own steps, of each channel in float32, where nothing is rounded or cut off before the end."""
    made = []
    for channel in image.split():
        channel, part = channel.convert("F"), box
        for size in sizes:
            channel, part = channel.resize(size, Image.Resampling.LANCZOS, box=part), None
        made.append(np.asarray(channel))
    return np.clip(np.stack(made, -1), 0, 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("source, target, box", [
    ((500, 375), (85, 64), None),
    ((531, 354), (64, 96), None),  # a last step that enlarges one edge
    ((530, 354), (96, 64), (0, 0, 529.25, 353.5)),  # as a JPEG of 4234x2828 is decoded
    ((400, 300), (64, 64), (30, 0, 290, 270)),
    ((300, 2000), (48, 128), None),
    ((97, 89), (64, 64), None),
])  # fmt: skip
def test_steps_at_once_are_pillows_own_rounded_once(mode, source, target, box):
    rng = np.random.default_rng(1)
    soft = Image.fromarray(rng.integers(0, 256, (9, 9, 4), dtype=np.uint8), "RGBA").resize(source)
    noisy = np.clip(np.asarray(soft, np.int16) + rng.integers(-30, 31, (source[1], source[0], 4)), 0, 255)
    channels = len(Image.new(mode, (1, 1)).getbands())
    image = Image.merge(mode, Image.fromarray(noisy.astype(np.uint8), "RGBA").split()[:channels])
    made = np.asarray(resize(image, Size(*target), box=box)).reshape(target[1], target[0], -1)
    expected = in_float_steps(image, steps(Size(*source), Size(*target)), box)
    assert np.abs(made - expected).max() < 0.51


@pytest.mark.parametrize("method", ["stepwise", "single"])
def test_downsampling_keeps_the_mean_of_noise(method: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 768, 3), dtype=np.uint8)
    small = np.asarray(resize(Image.fromarray(noise), Size(96, 64), method))
    assert small.shape == (64, 96, 3)
    assert abs(small.mean() - noise.mean()) < 0.5
    # An average of 64 pixels; a resampler without antialiasing would keep the spread of 74.
    assert small.std() < 15


def test_stepwise_really_goes_in_steps_and_single_in_one() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    by_hand = in_float_steps(noise, steps(Size(512, 512), Size(64, 64)))
    stepwise, single = (np.asarray(resize(noise, Size(64, 64), method)) for method in ("stepwise", "single"))
    assert np.abs(stepwise - by_hand).max() < 0.51
    assert np.array_equal(single, np.asarray(noise.resize((64, 64), Image.Resampling.LANCZOS)))
    assert not np.array_equal(stepwise, single)


@pytest.mark.parametrize("method", ["stepwise", "single"])
def test_only_the_box_is_taken(method: str) -> None:
    picture = Image.new("RGB", (400, 400), "red")
    picture.paste("blue", (0, 0, 300, 400))
    # 20 pixels of blue beyond the box, which the filter may look at.
    small = np.asarray(resize(picture, Size(64, 64), method, box=(0, 0, 280, 400)))
    assert np.array_equal(small, np.broadcast_to(np.uint8((0, 0, 255)), (64, 64, 3)))


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ValueError, match="stepwise or single"):
        resize(Image.new("RGB", (8, 8)), Size(4, 4), "nearest")
