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
    by_hand = noise
    for size in steps(Size(512, 512), Size(64, 64)):
        by_hand = by_hand.resize(size, Image.Resampling.LANCZOS)
    stepwise, single = (np.asarray(resize(noise, Size(64, 64), method)) for method in ("stepwise", "single"))
    assert np.array_equal(stepwise, np.asarray(by_hand))
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
