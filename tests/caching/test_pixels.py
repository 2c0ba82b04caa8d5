"""An image is decoded once, whatever its name; those that cannot be are left out alike in every run."""

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.caching import images as images_module
from helpers.caching.pixels import PixelCache, PixelJob, pixel_key
from helpers.caching.store import Writer
from helpers.images.loading import load
from helpers.sizes import Size

SIZE = Size(40, 30)


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (120, 90)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path, quality=95)
    return path


def job(path: Path, size: Size = SIZE, method: str = "stepwise") -> PixelJob:
    return PixelJob(path, hashlib.sha256(path.read_bytes()).hexdigest(), size, method)


def read(cache: PixelCache, one: PixelJob) -> np.ndarray:
    out = np.empty((one.size.height, one.size.width, 3), np.uint8)
    cache.read([one.key], [(0, 0)], out[None])
    return out


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The paths that were decoded, in the order in which that began."""
    paths: list[Path] = []

    def counted(path: Path, *rest: object) -> np.ndarray:
        paths.append(path)
        return load(path, *rest)

    monkeypatch.setattr(images_module, "load", counted)
    return paths


def test_cached_pixels_are_those_of_the_loader(tmp_path):
    jobs = [job(photo(tmp_path / f"{seed}.jpg", seed), size, method)
            for seed, size, method in [(0, SIZE, "stepwise"), (1, Size(33, 64), "single"), (2, Size(8, 8), "stepwise")]]
    cache = PixelCache(tmp_path / "cache")
    assert cache.build(jobs) == {}
    for one in jobs:
        np.testing.assert_array_equal(read(PixelCache(tmp_path / "cache"), one), load(one.path, one.size, one.method))


def test_a_part_can_be_read_from_anywhere_but_not_beyond_the_image(tmp_path):
    one = job(photo(tmp_path / "a.png"))
    cache = PixelCache(tmp_path / "cache")
    cache.build([one])
    parts = np.empty((2, 7, 9, 3), np.uint8)
    cache.read([one.key] * 2, [(5, 11), (31, 23)], parts)
    np.testing.assert_array_equal(parts[0], load(one.path, SIZE)[11:18, 5:14])
    np.testing.assert_array_equal(parts[1], load(one.path, SIZE)[23:30, 31:40])
    with pytest.raises(ValueError, match="40x30"):
        cache.read([one.key] * 2, [(5, 11), (32, 23)], parts)


def test_the_second_run_decodes_no_image_even_if_none_could_be(tmp_path, decoded):
    jobs = [job(photo(tmp_path / f"{seed}.jpg", seed)) for seed in range(5)]
    PixelCache(tmp_path / "cache").build(jobs)
    assert len(decoded) == 5
    for one in jobs:
        one.path.write_bytes(b"no image any more")
    assert PixelCache(tmp_path / "cache").build(jobs) == {} and len(decoded) == 5


def test_the_same_content_under_two_names_is_decoded_once(tmp_path, decoded):
    first = photo(tmp_path / "a.jpg")
    second = tmp_path / "b.jpg"
    second.write_bytes(first.read_bytes())
    cache = PixelCache(tmp_path / "cache")
    cache.build([job(first), job(second)])
    assert len(decoded) == len(cache.store) == 1
    first.rename(tmp_path / "renamed.jpg")
    cache.build([job(tmp_path / "renamed.jpg")])
    assert len(decoded) == 1


def test_content_size_and_method_make_the_key():
    base = ("c0ffee", SIZE, "stepwise")
    others = [("c0ffef", SIZE, "stepwise"), ("c0ffee", Size(30, 40), "stepwise"), ("c0ffee", SIZE, "single")]
    assert len({pixel_key(*entry) for entry in [base, *others]}) == 4 and pixel_key(*base) == pixel_key(*base)


def test_files_that_fail_are_returned_with_the_reason_and_the_others_are_built(tmp_path):
    good, cut = photo(tmp_path / "good.jpg", 1), photo(tmp_path / "cut.jpg", 2)
    cut.write_bytes(cut.read_bytes()[:-900])
    cache = PixelCache(tmp_path / "cache")
    failures = cache.build([job(cut), job(good)])
    assert list(failures) == [cut] and "damaged" in failures[cut]
    np.testing.assert_array_equal(read(cache, job(good)), load(good, SIZE))


def test_a_file_that_failed_is_left_out_again_without_being_tried(tmp_path, decoded):
    cut = photo(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-900])
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(cut.read_bytes())
    first = PixelCache(tmp_path / "cache").build([job(cut), job(copy)])
    again = PixelCache(tmp_path / "cache")
    assert again.failures([job(cut), job(copy)]) == again.build([job(cut), job(copy)]) == first
    assert set(first) == {cut, copy} and len(decoded) == 1
    photo(cut)  # repaired: other content, so it is tried
    assert again.build([job(cut)]) == {} and len(decoded) == 2


def test_another_version_of_pillow_tries_again(tmp_path, decoded):
    cut = photo(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-900])
    PixelCache(tmp_path / "cache").build([job(cut)])
    remembered = tmp_path / "cache" / "failures.json"
    remembered.write_text(json.dumps({**json.loads(remembered.read_text()), "pillow": "1.0"}))
    PixelCache(tmp_path / "cache").build([job(cut)])
    assert len(decoded) == 2


def test_a_failure_that_is_not_the_files_own_is_not_remembered(tmp_path):
    path = photo(tmp_path / "a.jpg")
    one = job(path)
    path.rename(tmp_path / "away.jpg")
    failures = PixelCache(tmp_path / "cache").build([one])
    assert list(failures) == [path] and "No such file" in failures[path]
    (tmp_path / "away.jpg").rename(path)
    assert PixelCache(tmp_path / "cache").build([one]) == {}


def test_workers_make_the_same_cache_in_the_same_order(tmp_path):
    jobs = [job(photo(tmp_path / f"{seed}.jpg", seed, (100 + 60 * (seed % 3), 90))) for seed in range(12)]
    for workers in (1, 5):
        PixelCache(tmp_path / f"{workers}").build(jobs, workers)
    names = [sorted(path.name for path in (tmp_path / f"{workers}").glob("*.safetensors")) for workers in (1, 5)]
    assert names[0] == names[1] and len(names[0]) == 1


def test_decoding_is_parallel_and_the_images_in_memory_are_bounded(tmp_path, monkeypatch):
    workers, started, written, waiting = 3, [], [], []
    together = threading.Barrier(workers, timeout=20)  # opens only if so many decode at once

    def decode(path: Path, size: Size, method: str) -> np.ndarray:
        if len(started) < workers:
            started.append(path)
            together.wait()
        else:
            started.append(path)
        return np.zeros((size.height, size.width, 3), np.uint8)

    def write(writer: Writer, key: str, array: np.ndarray) -> None:
        time.sleep(0.002)  # slower than decoding, so that images would pile up
        waiting.append(len(started) - len(written))
        written.append(key)

    monkeypatch.setattr(images_module, "load", decode)
    monkeypatch.setattr(Writer, "add", write)
    for number in range(60):
        (tmp_path / f"{number}.jpg").write_bytes(bytes([number]))
    jobs = [job(tmp_path / f"{number}.jpg") for number in range(60)]
    PixelCache(tmp_path / "cache").build(jobs, workers)
    assert len(written) == 60 and max(waiting) <= 4 * workers


# --- What the log says, and what it rests on


def told(cache: PixelCache, jobs: list[PixelJob], capsys) -> str:
    capsys.readouterr()
    cache.build(jobs, name="dogs")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dogs: ")]
    return line.removeprefix("dogs: ")


def damage_the_only_shard(folder: Path) -> None:
    [shard] = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])


def test_the_log_counts_what_was_reused_and_why_the_rest_was_made(tmp_path, capsys):
    folder = tmp_path / "cache"
    paths = [photo(tmp_path / f"{seed}.png", seed) for seed in range(4)]
    first = [job(path) for path in paths]
    assert told(PixelCache(folder), first, capsys) == "0 images cached before, 4 to decode: 4 new"
    assert told(PixelCache(folder), first, capsys) == "4 images cached before, 0 to decode"
    photo(paths[0], 10)
    photo(tmp_path / "more.png", 11)
    changed = [*map(job, paths), job(tmp_path / "more.png"), job(paths[1], Size(20, 15)), job(paths[2], method="single")]
    assert told(PixelCache(folder), changed, capsys) == (
        "3 images cached before, 4 to decode: 1 edited, 1 new, 1 at another size, 1 by another downsample_method"
    )
    assert told(PixelCache(folder), changed, capsys) == "7 images cached before, 0 to decode"


@pytest.mark.parametrize("position", [-1, 20], ids=["in the data", "in the header"])
def test_a_damaged_shard_is_named_told_as_the_reason_and_made_again(tmp_path, capsys, position):
    folder = tmp_path / "cache"
    jobs = [job(photo(tmp_path / f"{seed}.png", seed)) for seed in range(3)]
    PixelCache(folder).build(jobs)
    [shard] = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[position] ^= 0xFF
    shard.write_bytes(content)
    jobs.append(job(photo(tmp_path / "new.png", 9)))
    capsys.readouterr()
    cache = PixelCache(folder)
    cache.build(jobs)
    text = capsys.readouterr().out
    assert "0 images cached before, 4 to decode: 3 of a damaged shard, 1 new" in text and shard.name in text
    for one in jobs:
        np.testing.assert_array_equal(read(cache, one), load(one.path, one.size))
    assert told(PixelCache(folder), jobs, capsys) == "4 images cached before, 0 to decode"


def test_a_shard_that_someone_deleted_is_told_as_the_reason(tmp_path, capsys):
    jobs = [job(photo(tmp_path / "a.png"))]
    PixelCache(tmp_path / "cache").build(jobs)
    next((tmp_path / "cache").glob("*.safetensors")).unlink()
    assert told(PixelCache(tmp_path / "cache"), jobs, capsys).endswith("1 to decode: 1 whose shard is gone")


def test_images_that_cannot_be_read_are_counted_apart(tmp_path, capsys):
    cut, good = photo(tmp_path / "cut.jpg"), photo(tmp_path / "good.jpg", 2)
    cut.write_bytes(cut.read_bytes()[:-900])
    jobs = [job(cut), job(good)]
    PixelCache(tmp_path / "cache").build(jobs)
    assert told(PixelCache(tmp_path / "cache"), jobs, capsys) == (
        "1 images cached before, 0 to decode; 1 known not to be readable"
    )


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"pillow": 1}', b"\xff\xfe", b"[" * 100_000])
def test_notes_that_a_bad_disk_broke_cost_nothing_but_their_words(tmp_path, decoded, broken):
    folder = tmp_path / "cache"
    cut, good = photo(tmp_path / "cut.jpg"), photo(tmp_path / "good.jpg", 2)
    cut.write_bytes(cut.read_bytes()[:-900])
    jobs = [job(cut), job(good)]
    first = PixelCache(folder).build(jobs)
    for name in ("failures.json", "made.jsonl"):
        (folder / name).write_bytes(broken)
    damage_the_only_shard(folder)
    assert PixelCache(folder).build(jobs) == first and len(decoded) == 4
    assert PixelCache(folder).build(jobs) == first and len(decoded) == 4


@pytest.mark.parametrize("edited", ["whole", "cut short"])
def test_a_file_that_is_edited_after_it_was_found_is_not_cached_as_what_it_was(tmp_path, monkeypatch, edited):
    path = photo(tmp_path / "a.jpg")
    one, before = job(path), path.read_bytes()

    def edit_and_load(*arguments: object) -> np.ndarray:
        photo(path, seed=5)
        if edited == "cut short":
            path.write_bytes(path.read_bytes()[:-900])
        return load(*arguments)

    monkeypatch.setattr(images_module, "load", edit_and_load)
    failures = PixelCache(tmp_path / "cache").build([one])
    assert "was changed" in failures[path]
    monkeypatch.undo()
    path.write_bytes(before)
    cache = PixelCache(tmp_path / "cache")
    assert cache.build([one]) == {}, "nothing was remembered against the content that was found"
    np.testing.assert_array_equal(read(cache, one), load(path, SIZE))


def test_paths_of_any_name_are_noted(tmp_path, capsys):
    path = photo(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \n\".png")))
    assert PixelCache(tmp_path / "cache").build([job(path)]) == {}
    photo(path, 7)
    assert re.search("1 edited$", told(PixelCache(tmp_path / "cache"), [job(path)], capsys))
