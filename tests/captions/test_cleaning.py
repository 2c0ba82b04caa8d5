"""Captions are cleaned as DeepFloyd IF's were, by diffusers' own code."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from helpers.captions import cleaning
from helpers.captions.cleaning import clean, erased_words


@pytest.mark.parametrize(
    "caption, cleaned",
    [
        ("", ""),
        ("  A Photograph of a CAT  ", "a photograph of a cat"),
        ("<b>A cat</b> and a dog, see https://example.com", "a cat and a dog, see"),
        ("a_cat_on_a_red_mat", "a cat on a red mat"),
        ("a+cat%20here", "a cat here"),
        ("IMG_1234.jpg of a cat 1920x1080 @someone", "of a cat"),
        ("cat \u2014 \u201cbig\u201d", 'cat - "big"'),
        ("\u732b a cat", "a cat"),
    ],
)
def test_known_captions(caption: str, cleaned: str) -> None:
    assert clean(caption) == cleaned


PLAIN_WORDS = (
    "a Dog it's o'clock 3 12345 no page 7 click on for free download shipping worldwide PNG epson steps jpeg images x "
    "com www https person ship amp lt quot"
).split()
OTHER_WORDS = (
    "123456 12:30 0.5 3x4 sks01 well-known snake_case (red) <b> &amp; don't' 'quoted' e.g \u0130stanbul caf\u00e9"
).split() + ["y" * 1001]


def test_plain_captions_are_cleaned_by_a_shorter_way_to_the_same() -> None:
    """Half of these are of plain words, which may mean something together; the others have more."""
    from diffusers import IFPipeline

    pipeline = IFPipeline.__new__(IFPipeline)
    draw, plain = random.Random(0), 0
    for number in range(600):
        words, joints, edges = PLAIN_WORDS, [" ", " ", " ", ", ", ". ", "; ", ": "], ["", ".", " "]
        if number % 2:
            words, joints = words + OTHER_WORDS, joints + [".", ",", " : ", " . ", "  ", "\n", "-"]
            edges = [*edges, "'", "-", ",", "!"]
        caption = "".join(draw.choice(words) + draw.choice(joints) for _ in range(draw.randint(0, 6)))
        caption = draw.choice(edges[2:]) + caption + draw.choice(words) + draw.choice(edges)
        expected = pipeline._text_preprocessing(cleaning.LONG_WORD.sub(r"\1", caption), clean_caption=True)[0]
        assert clean(caption) == expected, caption
        plain += cleaning.is_plain(caption.strip().lower())
    assert 100 < plain < 400


def test_cleaning_is_done_twice_as_the_pipelines_do_it() -> None:
    from diffusers import IFPipeline

    once = IFPipeline.__new__(IFPipeline)._clean_caption
    caption = "a cat &amp;lt;b&amp;gt;here&amp;lt;/b&amp;gt; ((('dog')))"
    assert once(caption) != once(once(caption)) == clean(caption)


def test_without_its_libraries_cleaning_fails_instead_of_doing_half(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ftfy", "bs4"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(ModuleNotFoundError, match=name):
                clean("a cat")


def test_importing_the_module_does_not_import_diffusers() -> None:
    code = "import helpers.captions.cleaning, sys; sys.exit('diffusers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    "caption, erased",
    [
        ("a photo of a dog, 3 years old", set()),
        ("a photo of sks01 dog", set()),
        ("jc6640", {"jc6640"}),
        ("my_dog_v2.png", {"my_dog_v2", "png"}),
        ("写真の犬", {"写真の犬"}),
        ("a photo of <sks> dog", {"sks"}),
        ("a photo of <new-sks-2>.<br>a <i>red</i> dog", {"new", "2", "sks"}),
        ("a <b>bold</b> cat @someone https://example.org/cat", set()),
    ],
)
def test_words_that_cleaning_erases_are_named(caption, erased):
    assert erased_words(caption, clean(caption)) == erased
