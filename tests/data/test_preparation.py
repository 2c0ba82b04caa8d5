from pathlib import Path

import pytest

from helpers.data.dataset import Dataset
from helpers.data.preparation import caption_notes
from helpers.data.scan import Record
from helpers.images.geometry import Rules
from helpers.models.text import T5
from helpers.sizes import Size


def dataset(*captions: str) -> Dataset:
    folder = Path("/photos")
    records = tuple(
        Record("dogs", folder / f"{number}.jpg", "", Size(64, 64), (caption,)) for number, caption in enumerate(captions)
    )
    return Dataset("dogs", folder, Rules(64), records, ((),) * len(records))


@pytest.mark.parametrize("caption", ["jc6640", "写真"])
def test_captions_that_clean_to_nothing_are_said_with_the_words_that_go(caption):
    empty, erased = caption_notes(dataset("a photo of a dog", caption), T5())
    assert "'dogs'" in empty and "1 captions are empty" in empty and caption in empty
    assert caption in erased and "trigger word" in erased


def test_ordinary_captions_need_no_note():
    assert caption_notes(dataset("A photo of a dog", "a cat & 2 dogs"), T5()) == []
