"""What is changed between two runs makes exactly that anew which depends on it, and the log says why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.caching import images as images_module
from helpers.config.backends import Backends, ImageBackend, TextEmbedsBackend
from helpers.data.preparation import cache_pixels, cache_texts, open_text_caches, prepare_captions, scan_and_plan
from helpers.models import text as text_module
from helpers.models.text import T5, TextEncoder

SQUARE, WIDE = ("a.png", "b.png"), ("c.png", "d.png")
NAMES = {*SQUARE, *WIDE}
CAPTIONS = {f"a photo of {letter}" for letter in "abcd"} | {""}


class Made(NamedTuple):
    """What a run decoded and encoded, and what it said of it."""

    images: set[str]
    captions: set[str]
    said: str


class Setting:
    """A folder of four captioned images, a model, and runs that fill the caches."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        self.images, self.cache, self.model = folder / "images", folder / "cache", model
        self.patch, self.capsys = monkeypatch, capsys
        self.images.mkdir()
        for name in sorted(NAMES):
            self.draw(name, {"a": "red", "b": "green", "c": "yellow", "d": "white"}[name[0]])
            (self.images / name).with_suffix(".txt").write_text(f"a photo of {name[0]}")

    def draw(self, name: str, colour: str) -> None:
        Image.new("RGB", (120, 120) if name in SQUARE else (150, 100), colour).save(self.images / name)

    def run(self, variant: str | None = None, storage: str = "bf16", **keys: object) -> Made:
        images, captions = set(), set()
        load, encode = images_module.load, TextEncoder.__call__
        with self.patch.context() as patch:
            patch.setattr(images_module, "load", lambda path, *rest: (images.add(path.name), load(path, *rest))[1])
            patch.setattr(TextEncoder, "__call__", lambda own, texts: (captions.update(texts), encode(own, texts))[1])
            self.fill(variant, storage, {"resolution": 64, "caption_strategy": "textfile", **keys})
        return Made(images, captions, self.capsys.readouterr().out)

    def fill(self, variant: str | None, storage: str, keys: dict[str, object]) -> None:
        entry = ImageBackend(id="set", instance_data_dir=self.images, cache_dir=self.cache / "pixels", **keys)
        texts = TextEmbedsBackend(id="t", dataset_type="text_embeds", cache_dir=self.cache / "text", default=True)
        planned, _ = scan_and_plan(entry, 8)
        dataset, _ = cache_pixels(planned, entry)
        captions = ["", *dataset.captions()]
        prepared = prepare_captions(T5(), captions)
        caches = open_text_caches(T5(), self.model, Backends((entry,), (texts,)), prepared, variant, storage)
        cache_texts(T5(), self.model, caches, {"t": captions}, 4, torch.device("cpu"), variant)


@pytest.fixture
def setting(tmp_path, tiny_model, monkeypatch, capsys) -> Setting:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    setting = Setting(tmp_path, model, monkeypatch, capsys)
    first = setting.run()
    assert (first.images, first.captions) == (NAMES, CAPTIONS)
    assert "0 images cached before, 4 to decode: 4 new" in first.said
    assert "0 captions encoded before, 5 captions to encode (5 new)" in first.said
    return setting


def edit_weights(setting: Setting) -> None:
    path = setting.model / "text_encoder" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def edit_tokenizer(setting: Setting) -> None:
    path = setting.model / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")


def caption(setting: Setting) -> None:
    (setting.images / "a.txt").write_text("another photo")


CHANGES: dict[str, tuple[Callable[[Setting], object], dict[str, object], set[str], set[str], str]] = {
    "nothing": (lambda s: None, {}, set(), set(), "4 images cached before, 0 to decode"),
    "an image in place": (
        lambda s: s.draw("a.png", "blue"), {}, {"a.png"}, set(), "3 images cached before, 1 to decode: 1 edited"),
    "an image's name": (
        lambda s: [(s.images / f"a{end}").rename(s.images / f"z{end}") for end in (".png", ".txt")], {}, set(), set(),
        "4 images cached before, 0 to decode"),
    "a caption": (caption, {}, set(), {"another photo"}, "4 captions encoded before, 1 captions to encode (1 new)"),
    "the resolution": (lambda s: None, {"resolution": 72}, NAMES, set(), "4 to decode: 4 at another size"),
    "where crops are taken": (lambda s: None, {"crop_style": "center"}, set(), set(), "0 to decode"),
    "the crops' aspect": (
        lambda s: None, {"crop_aspect": "preserve", "aspect_bucket_rounding": 1}, set(), set(), "0 to decode"),
    "the size before the crop": (
        lambda s: None, {"maximum_image_size": 140, "target_downsample_size": 80}, NAMES, set(), "another size"),
    "how it is shrunk": (
        lambda s: None, {"downsample_method": "single"}, NAMES, set(), "4 by another downsample_method"),
    "repeats": (lambda s: None, {"repeats": 3}, set(), set(), "0 to decode"),
    "the encoder": (edit_weights, {}, set(), CAPTIONS, "(5 so far with another text_encoder)"),
    "the tokenizer": (edit_tokenizer, {}, set(), CAPTIONS, "(5 so far with another tokenizer)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_exactly_that_anew_which_depends_on_it(setting, change):
    act, keys, images, captions, words = CHANGES[change]
    act(setting)
    made = setting.run(**keys)
    assert (made.images, made.captions) == (images, captions) and words in made.said
    again = setting.run(**keys)
    assert not again.images and not again.captions
    assert re.search(r"[1-9] images cached before, 0 to decode", again.said)
    assert "5 captions encoded before, 0 to encode" in again.said


def test_the_dtype_of_the_encoder_is_a_part_of_what_made_an_embed(setting, monkeypatch):
    monkeypatch.setattr(text_module, "DTYPE", torch.float16)
    cache = T5().fingerprint(setting.model)
    monkeypatch.undo()
    assert {name for name, value in T5().fingerprint(setting.model).items() if value != cache[name]} == {"dtype"}


def test_another_variant_of_the_encoder_is_another_encoder_though_both_lie_in_one_folder(setting):
    folder = setting.model / "text_encoder"
    halves = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.fp16.safetensors", {"format": "pt"})
    assert setting.run().captions == set(), "a variant that is not used changes nothing"
    other = setting.run(variant="fp16")
    assert other.captions == CAPTIONS and "(5 so far with another text_encoder)" in other.said
    assert setting.run(variant="fp16").captions == setting.run().captions == set()


def test_another_storage_of_embeds_makes_them_anew_but_8_bits_are_made_of_exact_ones(setting):
    made = setting.run(storage="int8")
    assert not made.captions and "5 captions are stored as int8" in made.said
    assert "5 captions encoded before, 0 to encode" in made.said
    caption(setting)
    made = setting.run(storage="int8")
    assert made.captions == {"another photo"} and "are stored as" not in made.said
    made = setting.run()
    assert made.captions == {"another photo"} and "(1 so far with another storage)" in made.said
