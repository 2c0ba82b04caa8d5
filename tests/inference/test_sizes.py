"""Sizes of stages: exact multiples, aligned, near what was asked for."""

from __future__ import annotations

import pytest

from helpers.config.inference_options import InferenceOptions
from helpers.inference.sizes import Extent, Impossible, stage_sizes, upscaled_sizes
from helpers.sizes import Size

I, II, III = Extent(1, 8, 64, 256), Extent(4, 16, 256, 1024), Extent(4, 64, 512, 2048)
SD = Extent(1, 64, 768, 2048)


def shape(text: str):
    return InferenceOptions(size=text).size


@pytest.mark.parametrize("asked, first, last", [
    (None, "64x64", "1024x1024"),
    ("1024", "64x64", "1024x1024"),
    ("1536x1024", "96x64", "1536x1024"),
    ("3:2", "96x64", "1536x1024"),
    ("2:3", "64x96", "1024x1536"),
    ("16:9", "112x64", "1792x1024"),
    ("1000x1100", "64x72", "1024x1152"),
    ("640", "40x40", "640x640"),
])  # fmt: skip
def test_the_cascade_is_cut_from_the_last_size(asked, first, last):
    sizes = stage_sizes([I, II, III], asked and shape(asked))
    assert (str(sizes[0]), str(sizes[-1])) == (first, last)
    for small, large, extent in zip(sizes, sizes[1:], (II, III)):
        assert large == Size(4 * small.width, 4 * small.height)
        assert not large.width % extent.alignment and not large.height % extent.alignment


def test_stages_alone_have_sizes_of_their_own():
    assert stage_sizes([I], None) == (Size(64, 64),)
    assert stage_sizes([I, II], shape("3:2")) == (Size(96, 64), Size(384, 256))
    assert stage_sizes([SD], None) == (Size(768, 768),)


def test_what_no_stage_can_make_is_refused_with_what_can_be():
    with pytest.raises(Impossible, match="at most 2048"):
        stage_sizes([I, II, III], shape("4096x1024"))
    with pytest.raises(Impossible, match="at most 256"):
        stage_sizes([I], shape("512"))


@pytest.mark.parametrize("image, asked, start, last", [
    ((64, 64), None, "64x64", "256x256"),
    ((101, 66), None, "100x64", "400x256"),
    ((400, 300), "256", "64x64", "256x256"),
    ((100, 100), "3:2", "100x64", "400x256"),
])  # fmt: skip
def test_an_image_is_brought_to_what_is_upscaled_exactly(image, asked, start, last):
    sizes = upscaled_sizes([II], Size(*image), asked and shape(asked))
    assert (str(sizes[0]), str(sizes[-1])) == (start, last)


def test_an_image_that_is_too_large_is_refused():
    with pytest.raises(Impossible, match="leave it out|at most 1024"):
        upscaled_sizes([II], Size(3000, 2000), None)
