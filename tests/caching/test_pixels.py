"""An image is decoded once, whatever its name; those that cannot be are left out alike in every run."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.caching import pixels as pixels_module
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
    cache.read_into(one.key, out)
    return out


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The paths that were decoded, in the order in which that began."""
    paths: list[Path] = []

    def counted(path: Path, *rest: object) -> np.ndarray:
        paths.append(path)
        return load(path, *rest)

    monkeypatch.setattr(pixels_module, "load", counted)
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
    part = np.empty((7, 9, 3), np.uint8)
    cache.read_into(one.key, part, left=5, top=11)
    np.testing.assert_array_equal(part, load(one.path, SIZE)[11:18, 5:14])
    with pytest.raises(ValueError, match="40x30"):
        cache.read_into(one.key, part, left=32, top=11)


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
    names = [sorted(os.listdir(tmp_path / f"{workers}")) for workers in (1, 5)]
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

    monkeypatch.setattr(pixels_module, "load", decode)
    monkeypatch.setattr(Writer, "add", write)
    jobs = [PixelJob(Path(f"{number}.jpg"), f"{number:064x}", SIZE, "stepwise") for number in range(60)]
    PixelCache(tmp_path / "cache").build(jobs, workers)
    assert len(written) == 60 and max(waiting) <= 4 * workers
