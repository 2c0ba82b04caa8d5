"""How scan, start and memory grow with the number of images, each with a caption file. Prints and saves a JSON.

    python -m benchmarks.scan [--images 10000 30000 100000] [--workers N] [--folder FOLDER]

Of each number of small images of 40 px, all in the page cache:

first scan: seconds, by the threads that a run takes (`--workers` sets another number), and what a million images would
take at the rate of the largest dataset. `linear` is its seconds an image beside those of the smallest one: 1 is linear.
cut: a scan that ends in its middle, and how many files the next one opens again.
second start: the median seconds of what each later start does with all images: scan, plan, digest, cleaning the
captions for T5, looking them and the images up in a cache that has all of them, and planning the first epoch.
bytes an image: what stays in memory of the scan (without captions, with them), of the planned dataset with a sampler
and its epoch on top of that, and of a cache's list of its records; and the most that the scan holds at a time.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.machine import ROOT, write_result
from benchmarks.scaling import write_images
from helpers.caching.pixels import PixelCache
from helpers.data.dataset import Dataset, plan_images
from helpers.data.preparation import prepare_captions
from helpers.data.sampler import Sampler
from helpers.data.scan import Captions, Scan, scan
from helpers.images.geometry import Rules
from helpers.models.text import T5

MILLION = 1_000_000
ROUNDS = 3
BATCH = 16
RULES = Rules(40, crop_aspect="preserve")
SUBJECTS = ("a red fox", "an old lighthouse", "two children with a kite", "a bowl of cherries", "a tram")
PLACES = ("in the snow", "by the sea at dusk", "in front of a brick wall", "on a wooden table", "under tall trees")


class Cut(Exception):
    """The interruption of a scan."""


class Images:
    """So many images in a folder, each with a caption of its own, and the index that a scan writes."""

    def __init__(self, folder: Path, count: int, workers: int | None) -> None:
        self.count, self._workers = count, workers
        self._folder, self.index = folder / "images", folder / "index.jsonl"
        write_images(self._folder, count)
        for number, path in enumerate(sorted(self._folder.rglob("*.jpg"))):
            words = f"A photograph of {SUBJECTS[number % 5]} {PLACES[number // 5 % 5]}, number {number}, in soft light"
            path.with_suffix(".txt").write_text(words + "\n", "utf-8")

    def scan(
        self, on_progress: Callable[[int, int], None] = lambda done, total: None, captions: bool = True
    ) -> Scan:
        strategy = Captions("textfile") if captions else None
        return scan("images", self._folder, self.index, strategy, self._workers, on_progress)

    def plan(self, found: Scan) -> Dataset:
        return plan_images("images", self._folder, RULES, found)


def measure(folder: Path, count: int, workers: int | None) -> dict[str, object]:
    """All figures of one number of images; see the module."""
    images = Images(folder, count, workers)
    first = _seconds(images.scan)
    images.index.unlink()
    opened = _opened_again(images)
    row = {"images": count, "first_scan_seconds": first, "opened_after_cut": opened, "index_bytes": _size(images.index)}
    return {**row, "second_start_seconds": _second_start(images, folder / "cache"), "bytes_an_image": _memory(images)}


def _opened_again(images: Images) -> dict[str, int]:
    """A scan is cut once half of the files were opened: how many then, and how many the next one opens."""
    counts: dict[str, int] = {}

    def cut(done: int, total: int) -> None:
        if 2 * done >= total:
            counts["before"] = done
            raise Cut

    def count(done: int, total: int) -> None:
        counts["after"] = total

    try:
        images.scan(cut)
    except Cut:
        images.scan(count)
    return counts


def _second_start(images: Images, folder: Path) -> dict[str, float]:
    dataset = images.plan(images.scan())
    _fill(PixelCache(folder), dataset)
    rounds = [_start(images, folder) for _ in range(ROUNDS)]
    seconds = {name: _rounded(median(one[name] for one in rounds)) for name in rounds[0]}
    return {**seconds, "all": _rounded(median(sum(one.values()) for one in rounds))}


def _start(images: Images, folder: Path) -> dict[str, float]:
    """What a start does with all of its images, in order, and the seconds of each."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> object:
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        return result

    found = timed("scan", images.scan)
    dataset = timed("plan", lambda: images.plan(found))
    timed("digest", dataset.digest)
    captions = timed("captions", dataset.captions)
    timed("cleaning", lambda: prepare_captions(T5(), captions))
    cache = timed("open the cache", lambda: PixelCache(folder))
    timed("look up images", lambda: cache.build(dataset.pixel_jobs("stepwise"), name=f"{images.count:,} images"))
    timed("epoch", lambda: _sampler(dataset).batches_in_epoch(0))
    return seconds


def _fill(cache: PixelCache, dataset: Dataset) -> None:
    """Records for all images, of a pixel each: what is looked at is their list."""
    pixel = np.zeros((1, 1, 3), np.uint8)
    with cache.store.writer() as writer:
        for job in dataset.pixel_jobs("stepwise"):
            writer.add(job.key, pixel)


def _memory(images: Images) -> dict[str, float]:
    """Bytes of Python's and numpy's memory for each image; freed once they are counted."""
    images.scan()  # what is imported or made once is there
    tracemalloc.start()
    try:
        bare, _ = _kept(lambda: images.scan(captions=False))
        with_captions, found = _kept(images.scan)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        images.scan()
        most = tracemalloc.get_traced_memory()[1] - before

        def planned() -> tuple[Dataset, Sampler]:
            dataset = images.plan(found)
            sampler = _sampler(dataset)
            sampler.batches_in_epoch(0)
            return dataset, sampler

        more, _ = _kept(planned)
        records, _ = _kept(lambda: PixelCache(images.index.parent / "cache"))
    finally:
        tracemalloc.stop()
    figures = {"scan": bare, "scan with captions": with_captions, "plan and epoch": more, "cache": records}
    return {name: _rounded(value / images.count) for name, value in (figures | {"peak": most}).items()}


def _kept(work: Callable[[], object]) -> tuple[int, object]:
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    result = work()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before, result


def _sampler(dataset: Dataset) -> Sampler:
    return Sampler([dataset], BATCH, seed=42, caption_dropout_probability=0.1)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return _rounded(time.perf_counter() - began)


def _size(path: Path) -> int:
    return path.stat().st_size


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _in_all(rows: Sequence[dict[str, object]]) -> dict[str, object]:
    """What the largest dataset tells of a million, beside the smallest one."""
    small, large = rows[0], rows[-1]
    each, least = (row["first_scan_seconds"] / row["images"] for row in (large, small))
    second = large["second_start_seconds"]["all"] / large["images"]
    return {
        "linear": _rounded(each / least),
        "first_scan_of_a_million_minutes": _rounded(each * MILLION / 60),
        "second_start_of_a_million_seconds": _rounded(second * MILLION),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--workers", type=int, help="threads that open files; one for each core if not given")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder: 1 GB, and 200,000 small files")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "scan.json")
    options = parser.parse_args(arguments)
    rows = []
    for count in sorted(options.images):
        with tempfile.TemporaryDirectory(prefix="floydtuner-benchmark-", dir=options.folder) as name:
            rows.append(measure(Path(name), count, options.workers))
        print(rows[-1], flush=True)
    figures = {"workers": options.workers or os.cpu_count(), "datasets": rows, **_in_all(rows)}
    return write_result(options.output, figures)


if __name__ == "__main__":
    main()
