"""Several runs that fill one cache folder at the same time, as real processes: nothing is lost, nothing is wrong."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.caching import store as store_module
from helpers.caching.embeds import EmbedCache
from helpers.caching.pixels import PixelCache, PixelJob
from helpers.data.scan import Captions, scan
from helpers.images.loading import load
from helpers.sizes import Size

RUNS = 3
FINGERPRINT = {"text_encoder": "aa"}


def at_once(work: Callable[[int], None], runs: int = RUNS) -> list[int]:
    """The exit codes of so many processes that do the same work together; each is told its number."""
    context = multiprocessing.get_context("fork")  # the imports are done: a run starts in milliseconds
    together = context.Barrier(runs)

    def run(number: int) -> None:
        together.wait(30)
        try:
            work(number)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    processes = [context.Process(target=run, args=(number,)) for number in range(runs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(noise.integers(0, 256, (12, 16, 3), np.uint8)).save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


def jobs_of(paths: Sequence[Path]) -> list[PixelJob]:
    return [
        PixelJob(path, hashlib.sha256(path.read_bytes()).hexdigest(), Size(edge, edge), "stepwise")
        for path in paths for edge in (8, 11)
    ]


def assert_cached(cache: PixelCache, jobs: Sequence[PixelJob]) -> None:
    for job in jobs:
        out = np.empty((job.size.height, job.size.width, 3), np.uint8)
        cache.read([job.key], [(0, 0)], out[None])
        np.testing.assert_array_equal(out, load(job.path, job.size))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_RECORDS", 4)


@pytest.mark.parametrize("damaged", [False, True])
def test_runs_that_share_a_pixel_cache_all_find_what_they_need(tmp_path, damaged):
    jobs = jobs_of(pictures(tmp_path / "images", 18))
    cut = tmp_path / "images" / "cut.png"
    cut.write_bytes((tmp_path / "images" / "00.png").read_bytes()[:-30])
    folder = tmp_path / "cache"
    if damaged:
        PixelCache(folder).build(jobs[::2])
        for shard in sorted(folder.glob("*.safetensors"))[::2]:
            os.truncate(shard, shard.stat().st_size - 1)

    def run(number: int) -> None:
        for attempt in range(3):
            own = random.Random(10 * number + attempt).sample(jobs, 20)
            cache = PixelCache(folder)
            assert list(cache.build([*own, *jobs_of([cut])], workers=1)) == [cut]
            assert_cached(cache, own)

    assert at_once(run) == [0] * RUNS
    cache = PixelCache(folder)
    assert cache.store.damaged == () and cache.build(jobs) == {}
    assert_cached(cache, jobs)
    assert not list(folder.glob(".*")), "no partial file is left"


def test_runs_that_share_a_text_cache_all_find_what_they_need(tmp_path):
    texts = [f"caption {number}" for number in range(30)]

    def encode(batch: Sequence[str]) -> torch.Tensor:
        return torch.stack([torch.full((77, 4), float(text.split()[1])).bfloat16() for text in batch])

    def run(number: int) -> None:
        own = random.Random(number).sample(texts, 20)
        cache = EmbedCache(tmp_path, FINGERPRINT)
        cache.build(own, encode, len, 3)
        assert torch.equal(cache.read(own), encode(own))

    assert at_once(run) == [0] * RUNS
    cache = EmbedCache(tmp_path, FINGERPRINT)
    cache.build(texts, encode, len, 3)
    assert torch.equal(cache.read(texts), encode(texts))


def test_runs_that_scan_a_folder_at_once_find_the_same_and_leave_a_sound_index(tmp_path):
    paths = pictures(tmp_path / "images", 40)
    index = tmp_path / "cache" / "index.jsonl"

    def run(number: int) -> None:
        for _ in range(5):
            found = scan("images", tmp_path / "images", index, Captions("filename"), workers=2)
            assert [record.path for record in found.records] == paths
            assert all(r.content == hashlib.sha256(r.path.read_bytes()).hexdigest() for r in found.records)
            if number == 0:
                index.unlink(missing_ok=True)  # as another version of Pillow would begin it anew

    assert at_once(run) == [0] * RUNS
    run(1)


def test_a_run_that_is_killed_while_it_caches_harms_no_other(tmp_path):
    jobs = jobs_of(pictures(tmp_path / "images", 12))
    folder = tmp_path / "cache"

    def run(number: int) -> None:
        if number == 0:
            fsync = os.fsync
            left = iter(range(3))
            os.fsync = lambda file: fsync(file) if next(left, None) is not None else os._exit(9)
        cache = PixelCache(folder)
        assert cache.build(jobs, workers=1) == {}
        assert_cached(cache, jobs)

    assert at_once(run) == [9, 0, 0]
    assert_cached(PixelCache(folder), jobs)
