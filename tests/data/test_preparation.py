"""What is done before a UNet is loaded: once, and said where it matters."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers.captions.cleaning import clean
from helpers.config.backends import Backends, TextEmbedsBackend
from helpers.data.dataset import Dataset
from helpers.data.preparation import cache_texts, caption_notes, fitting_batch, open_text_caches, prepare_captions
from helpers.data.scan import Record
from helpers.images.geometry import Rules
from helpers.models.published import ARCHITECTURES
from helpers.models.text import T5
from helpers.sizes import Size


def dataset(*captions: str) -> Dataset:
    folder = Path("/photos")
    records = tuple(
        Record("dogs", folder / f"{number}.jpg", "", Size(64, 64), (caption,)) for number, caption in enumerate(captions)
    )
    return Dataset("dogs", folder, Rules(64), records, ((),) * len(records))


def notes(*captions: str) -> list[str]:
    return caption_notes(dataset(*captions), prepare_captions(T5(), captions))


@pytest.mark.parametrize("caption", ["jc6640", "写真"])
def test_captions_that_clean_to_nothing_are_said_with_the_words_that_go(caption):
    empty, erased = notes("a photo of a dog", caption)
    assert "'dogs'" in empty and "1 captions are empty" in empty and caption in empty
    assert caption in erased and "trigger word" in erased


def test_ordinary_captions_need_no_note():
    assert notes("A photo of a dog", "a cat & 2 dogs") == []


def test_captions_are_prepared_as_the_model_reads_them_and_the_empty_one_always_is():
    captions = ["A Photo of a DOG", "a cat", "a cat"]
    assert prepare_captions(T5(), captions) == {"": "", "A Photo of a DOG": "a photo of a dog", "a cat": "a cat"}


def test_a_caption_that_stays_as_it_is_takes_no_memory_twice():
    caption = "a cat on a mat"
    assert prepare_captions(T5(), [caption])[caption] is caption


def test_a_start_cleans_each_caption_once(trainer, monkeypatch):
    cleaned: Counter[str] = Counter()
    monkeypatch.setattr(T5, "prepare", lambda self, caption: (cleaned.update([caption]), clean(caption))[1])
    assert trainer(validation_prompt="a prompt of its own", validation_steps=2) == 0
    assert len(cleaned) > 3 and "a prompt of its own" in cleaned and set(cleaned.values()) == {1}


def test_captions_that_the_encoder_cuts_are_told(tmp_path, tiny_model, capsys):
    entry = TextEmbedsBackend(id="text", dataset_type="text_embeds", cache_dir=tmp_path, default=True)
    captions = ["a dog", "a " + "very " * 99 + "small dog", "A cat"]
    texts = open_text_caches(T5(), tiny_model, Backends((), (entry,)), prepare_captions(T5(), captions))
    cache_texts(T5(), tiny_model, texts, {"text": captions}, 2, torch.device("cpu"))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "77 tokens" in line]
    assert "1 captions" in line and "'a very very" in line and "dog" not in line
    assert texts.default.missing(["a dog", "a cat"]) == [] and texts.default.missing(["A cat"])


@pytest.mark.parametrize("free_gb, captions", [(9.6, 1), (10.1, 7), (12, 64), (80, 64)])
def test_on_a_gpu_as_many_captions_are_encoded_at_a_time_as_fit(tmp_path, monkeypatch, free_gb, captions):
    """T5-XXL takes 9.52 GB, each caption 0.0096 more, and kernels get 0.5."""
    (tmp_path / "text_encoder").mkdir()
    shutil.copy(ARCHITECTURES / "t5-v1_1-xxl_text_encoder.json", tmp_path / "text_encoder" / "config.json")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), 0))
    assert fitting_batch(tmp_path, torch.device("cuda")) == captions
    assert fitting_batch(tmp_path, torch.device("cpu")) == 8
