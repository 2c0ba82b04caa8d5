"""Any export, any JSON file and any image file is used, or refused in words: nothing ends in a traceback.

The examples are the same in every run. `FLOYDTUNER_FUZZ=5000 ./tests/run.sh tests/test_fuzz.py` tries 5,000 new ones a
test instead.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.config.backends import KINDS, ImageBackend
from helpers.config.env import command_line, known_exports, strange
from helpers.config.jsonfile import read_json
from helpers.config.load import as_json, describe, load, load_all, read_prompt_library
from helpers.config.options import ROWS
from helpers.config.problems import ConfigError
from helpers.data.scan import Captions, DatasetError, scan
from helpers.images.loading import Unreadable, inspect
from helpers.images.loading import load as load_image
from helpers.sizes import Size

WANTED = int(os.environ.get("FLOYDTUNER_FUZZ", "0"))
settings.register_profile(
    "here", deadline=None, database=None, derandomize=not WANTED,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("here")

NOTHING = frozenset()


def examples(count: int) -> Callable:
    return settings(max_examples=WANTED or count)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a dataset of one image, and its dataloader JSON."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "images").mkdir()
    Image.new("RGB", (80, 80), "red").save(folder / "images" / "a.png")
    entry = {"id": "a", "instance_data_dir": str(folder / "images")}
    (folder / "data.json").write_text(json.dumps([entry]), "utf-8")
    return folder


def told_well(error: ConfigError) -> bool:
    """Whether every problem is one line of reasonable length, whatever was found."""
    lines = str(error).splitlines()
    assert len(lines) <= 40 and len(lines[0]) < 100
    for line in lines:
        assert len(line) < 3000 and all(letter >= " " and letter != "\x7f" for letter in line), line
    return True


numbers = st.one_of(
    st.integers(), st.integers(-2, 100), st.floats(), st.sampled_from([10**30, 2**63, 2**64, 1e308, -1e308, 5e-324])
)
bytes_as_the_environment_has_them = st.binary(max_size=40).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"?")))
words = st.sampled_from([
    "true", "off", "none", "latest", "checkpoint-1", "checkpoint-²", "..", "../../x", "/", "~nobody/x", "-", "--help",
    "64", "64x96", "64,96x64", "0x0", "1e999", "NaN", "infinity", "9" * 5000, "$(touch x)", "`x`", "a\nb", "'", '"',
    "\x1b[2J", "🐈" * 90, "x" * 300, "/" + "x/" * 3000, "to_q=4", "to_q=", "=", "deepfloyd-full",
    "deepfloyd-stage2-lora",
    "deepfloyd", "conditioning", "text_embeds", "i-large-900m", "prodigy", "lion", "sine", "range", "area", "DeepFloyd/nothing", "bf16", "no", "١",
])
values_of_exports = st.one_of(
    words, numbers.map(str), bytes_as_the_environment_has_them,
    st.text(max_size=30).filter(lambda text: "\0" not in text),
).filter(lambda text: not any("\ud800" <= letter < "\udc80" for letter in text))


@examples(250)
@given(exports=st.dictionaries(st.sampled_from(sorted(known_exports() - {"ENV_FILE"})), values_of_exports, max_size=6))
def test_any_export_becomes_a_flag_or_is_refused_in_words(room, exports):
    environ = {"MODEL_TYPE": "deepfloyd-lora", "DATALOADER_CONFIG": str(room / "data.json"), **exports}
    try:
        line = command_line([], environ, NOTHING, "python")
        strange(environ, NOTHING)
    except ConfigError as error:
        assert told_well(error)
        return
    assert shlex.split(shlex.join(line)) == line
    assert "train_sd2x.py" in line
    resolved = load(line[line.index("train_sd2x.py") + 1 :], environ)
    json.dumps(as_json(resolved), allow_nan=False)
    describe(resolved)


keys_of_options = st.sampled_from(sorted(ROWS))
keys_of_entries = st.sampled_from(sorted({
    field.alias or name for model in (ImageBackend, *KINDS.values()) for name, field in model.model_fields.items()
}))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words, st.text(max_size=20), st.just("\ud800"), st.just("a\0b")),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
options_objects = st.one_of(
    st.dictionaries(keys_of_options, st.one_of(numbers, words), max_size=6),
    st.dictionaries(st.one_of(keys_of_options, st.text(max_size=12)), json_values, max_size=6),
)
entry_objects = st.dictionaries(st.one_of(keys_of_entries, st.text(max_size=12)), json_values, max_size=6)


def mutated(contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The contents with bytes replaced, put in, taken out, doubled and cut off."""
    kinds = st.sampled_from(["put", "insert", "delete", "double", "cut"])
    change = st.tuples(st.floats(0, 1), kinds, st.binary(max_size=8))

    def apply(content: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
        for place, kind, data in changes:
            at = int(place * len(content))
            if kind == "put":
                content = content[:at] + data + content[at + len(data) :]
            elif kind == "insert":
                content = content[:at] + data + content[at:]
            elif kind == "delete":
                content = content[:at] + content[at + len(data) :]
            elif kind == "double":
                content = content[:at] + content[at : at + 64] + content[at:]
            elif data[:1] < b"\x20":
                content = content[:at]
        return content

    return st.builds(apply, contents, st.lists(change, max_size=5))


def as_file(values: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    written = values.map(lambda value: json.dumps(value).encode())
    return st.one_of(written, written, mutated(written), st.binary(max_size=60))


def refused_or(action: Callable[[], object]) -> None:
    try:
        action()
    except ConfigError as error:
        assert told_well(error)


@examples(250)
@given(content=as_file(options_objects), complete=st.booleans())
@example(b'{"output_dir": "' + b"x" * 1000 + b'"}', True)
@example(b'{"resolution": 1e308, "resolution_type": "area"}', True)
@example(b'{"lr_num_cycles": 1e308}', True)
@example(b'{"cache_dir": "~nobody"}', True)
def test_any_config_json_is_used_or_refused_in_words(room, content, complete):
    (room / "config.json").write_bytes(content)
    flags = [f"--data_backend_config={room / 'data.json'}", f"--config={room / 'config.json'}"]
    flags += ["--model_type=deepfloyd-lora"] if complete else []
    refused_or(lambda: describe(load_all(flags)[0]))


@examples(250)
@given(content=as_file(st.one_of(st.lists(entry_objects, max_size=3), json_values)), complete=st.booleans())
@example(b'[{"id": "a", "crop_aspect": "random", "crop_aspect_buckets": [{"aspect": 1, "weight": 1e308}]}]', True)
def test_any_dataloader_json_is_used_or_refused_in_words(room, content, complete):
    try:
        entries = json.loads(content) if complete else None
    except (ValueError, RecursionError):
        entries = None
    if isinstance(entries, list):  # past the checks of what every entry needs
        folder = {"instance_data_dir": str(room / "images")}
        entries = [{"id": str(place), **folder, **e} if isinstance(e, dict) else e for place, e in enumerate(entries)]
        content = json.dumps(entries).encode()
    (room / "fuzzed.json").write_bytes(content)
    flags = ["--model_type=deepfloyd-lora", f"--data_backend_config={room / 'fuzzed.json'}"]
    refused_or(lambda: load_all(flags))


@examples(150)
@given(content=as_file(st.one_of(st.dictionaries(st.text(max_size=12), st.text(max_size=12)), json_values)))
def test_any_prompt_library_is_used_or_refused_in_words(room, content):
    (room / "prompts.json").write_bytes(content)
    refused_or(lambda: read_prompt_library(room / "prompts.json"))


@examples(300)
@given(content=as_file(json_values))
def test_what_is_read_as_json_can_be_written_as_json(room, content):
    (room / "any.json").write_bytes(content)
    try:
        value = read_json(room / "any.json", "--config")
    except ConfigError as error:
        assert told_well(error)
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    json.dumps(value, ensure_ascii=False).encode()


def pictures() -> dict[str, bytes]:
    """A small file of each format, with what makes readers do more: EXIF, profiles, palettes, frames, 16 bits."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 17, 4), np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    other = rgb.rotate(90)
    files = {
        "a.jpg": (rgb, {"exif": exif, "quality": 80}),
        "progressive.jpg": (rgb, {"progressive": True, "icc_profile": b"\0" * 200}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "a.png": (rgba, {"exif": exif}),
        "palette.png": (rgb.convert("P"), {"transparency": 3}),
        "deep.png": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}),
        "a.webp": (rgba, {"lossless": True, "exif": exif}),
        "lossy.webp": (rgb, {"save_all": True, "append_images": [other]}),
        "a.gif": (rgb.convert("P"), {"save_all": True, "append_images": [other.convert("P")]}),
        "a.tif": (rgb, {"compression": "tiff_lzw", "exif": exif}),
        "packed.tif": (rgba, {"compression": "tiff_adobe_deflate", "save_all": True, "append_images": [other]}),
        "wide.tif": (Image.fromarray(noise[..., 0].astype(np.float32) / 255), {}),
        "a.bmp": (rgb, {}),
        "a.jp2": (rgb, {}),
        "a.ppm": (rgb, {}),
        "a.pcx": (rgb, {}),
        "a.sgi": (rgb, {}),
        "a.dds": (rgba, {}),
        "a.ico": (rgba, {"sizes": [(16, 16), (24, 24)]}),
        "a.qoi": (rgba, {}),
        "a.avif": (rgb, {"speed": 10}),
    }
    made = {}
    for name, (image, options) in files.items():
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[f".{name.split('.')[1]}"], **options)
        made[name] = buffer.getvalue()
    return made


PICTURES = pictures()


@st.composite
def broken_pictures(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name and the content of an image file with some of its bytes changed, most of them in its header."""
    name = draw(st.sampled_from(sorted(PICTURES)))
    content = bytearray(PICTURES[name])
    reach = draw(st.sampled_from([64, 256, len(content)]))
    for place in draw(st.lists(st.integers(0, min(reach, len(content)) - 1), max_size=6)):
        content[place] = draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 255])))
    content = content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    return name, bytes(content)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_the_pictures_that_are_broken_here_are_whole_before(room, name):
    (room / name).write_bytes(PICTURES[name])
    assert load_image(room / name, Size(16, 16)).shape == (16, 16, 3)


@examples(1200)
@given(picture=broken_pictures())
@example(("wide.tif", PICTURES["wide.tif"].replace(b"\x11\x01\x04\x00", b"\x11\x01\x02\x00")))  # text for an offset
def test_any_image_file_is_decoded_or_refused_in_words(room, picture):
    name, content = picture
    path = room / f"broken-{name}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for action in (lambda: inspect(path), lambda: load_image(path, Size(13, 7))):
            try:
                action()
            except Unreadable as error:
                assert error.reason and str(path) not in error.reason


@examples(40)
@given(some=st.lists(st.tuples(st.text("ab ._-'\"$(\n\té🐈", min_size=1, max_size=20), broken_pictures()), max_size=6))
def test_a_scan_uses_or_lists_every_file(tmp_path_factory, some):
    folder = tmp_path_factory.mktemp("scanned")
    (folder / "images").mkdir()
    for place, (stem, (name, content)) in enumerate(some):
        (folder / "images" / f"{place}{stem}{Path(name).suffix}").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = scan("any", folder / "images", folder / "index.jsonl", Captions("filename"), workers=1)
        except DatasetError as error:
            assert "'any'" in str(error)
        else:
            assert found.found == len(some)


@examples(100)
@given(lines=st.lists(as_file(
    st.one_of(json_values, st.fixed_dictionaries({"path": json_values, "entry": json_values}))
)))
def test_any_index_of_a_scan_is_used_or_made_anew(room, lines):
    index = room / "index.jsonl"
    index.unlink(missing_ok=True)
    (record,) = scan("any", room / "images", index, Captions("filename"), workers=1).records
    header = index.read_bytes().splitlines()[0]
    index.write_bytes(b"\n".join([header, *lines]))
    assert scan("any", room / "images", index, Captions("filename"), workers=1).records == (record,)
