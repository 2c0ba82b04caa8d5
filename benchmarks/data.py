"""How fast images and captions become batches, on one core. Prints and saves a JSON with all figures.

    python -m benchmarks.data          # a few minutes, and 4 GB of disk in a temporary folder
    python -m benchmarks.data --photos 1 --photo_size 400x300 --samples 64 --width 8 --seconds 0.05 --output FILE

all cores: JPEGs of the first size into the pixel cache, by a worker for each core beside one worker.
photos: JPEGs to training samples (scan, hash, decode, cache, crop), beside full decode and 25 % steps in Pillow.
cached: samples with their text embeds, exact and in 8 bits, through the sampler to collated batches of 16; beside it
    the exact embeds copied, and nothing else.
embeds: cached text embeds in batches of 16, beside one `torch.save` file per caption.

Each figure is given per second of the core's work and per second of the clock, which on a machine that does other
things, or waits for its disk, is less. Both sides of a comparison take turns. All files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import ROOT, write_result
from helpers.caching.embeds import EmbedCache
from helpers.caching.images import cores
from helpers.caching.pixels import PixelCache, pixel_key
from helpers.data.collate import Batch, Buffer, CachedPixels, Collator, Source
from helpers.data.dataset import Dataset, plan_images
from helpers.data.preparation import prepare_captions
from helpers.data.records import Columns, Records
from helpers.data.sampler import Sampler
from helpers.data.scan import Captions, Scan, scan
from helpers.images.downsampling import steps
from helpers.images.geometry import Rules, crop_box, plans
from helpers.models.text import T5
from helpers.sizes import Size, parse_sizes

BATCH = 16
ROUNDS = 5
TOKENS = 77
RULES = Rules(64, maximum_image_size=256, target_downsample_size=128)  # as in the example of a dataloader JSON
PREPARATIONS = {
    "128 px, then cropped": (RULES, "stepwise"),
    "128 px, then cropped, downsample_method single": (RULES, "single"),
    "64 px": (Rules(64), "stepwise"),
    "256 px": (Rules(256), "stepwise"),
}
TARGETS = {("4000x3000", "128 px, then cropped"): 12, ("6000x4000", "128 px, then cropped"): 16,
           ("4000x3000", "256 px"): 8}  # fmt: skip
"""How many times the plain way's images, for each second of the core's work."""
CACHED_SIZE = Size(171, 128)  # a 4:3 photo under these rules
FINGERPRINT = {"text_encoder": "random numbers"}


def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    with tempfile.TemporaryDirectory(prefix="floydtuner-benchmark-", dir=options.folder) as name:
        folder = Path(name)
        on_all = all_cores(folder / "all", options.photos, options.photo_size[0])
        _use_one_core()
        result: dict[str, object] = {
            "all_cores": on_all,
            "photos": [photos(folder / str(size), options.photos, size) for size in options.photo_size]
        }
        store = _Store(folder / "cached", options.samples, options.width)
        result["cached"] = cached(store, options.seconds)
        result["embeds"] = embeds(store, folder / "torch_save", options.seconds)
    write_result(options.output, result)


def photos(folder: Path, per_round: int, size: Size) -> dict[str, object]:
    """Images per second from JPEG files to training samples, ours and the plain way, for each way to prepare them."""
    ours: dict[str, list[_Rate]] = {name: [] for name in PREPARATIONS}
    plain: dict[str, list[_Rate]] = {name: [] for name in PREPARATIONS}
    for number in range(ROUNDS):
        source = folder / str(number)
        source.mkdir(parents=True)
        paths = [write_photo(source / f"{i}.jpg", size, number * per_round + i) for i in range(per_round)]
        for name, (rules, method) in PREPARATIONS.items():
            cache = folder / f"{number} {name}"
            plain[name].append(_rate(lambda: [_plain_sample(path, rules) for path in paths], per_round))
            ours[name].append(_rate(lambda: _our_samples(source, cache, rules, method), per_round))
    sizes = [path.stat().st_size for path in folder.glob("*/*.jpg")]
    facts = {"files": len(sizes), "size": str(size), "mean_file_bytes": round(mean(sizes))}
    compared = {name: _compared("images", ours[name], plain[name]) for name in PREPARATIONS}
    for name, figures in compared.items():
        if target := TARGETS.get((str(size), name)):
            figures |= {"target": target, "reaches_target": figures["ratio_of_core_time"] >= target}
    return facts | compared


def all_cores(folder: Path, of_each: int, size: Size) -> dict[str, object]:
    """How many times faster images are cached by all cores than by one worker: of each worker so many, by the clock."""
    workers, source = cores(), folder / "photos"
    source.mkdir(parents=True)
    for number in range(of_each * workers):
        write_photo(source / f"{number}.jpg", size, number)
    ratios = []
    for number in range(ROUNDS):
        one, all_ = (_seconds_to_cache(source, folder / f"{number} by {count}", count) for count in (1, workers))
        ratios.append(one / all_)
    return {"cores": workers, "size": str(size), "ratio": _rounded(median(ratios))}


def _seconds_to_cache(source: Path, cache: Path, workers: int) -> float:
    found = scan("photos", source, cache / "index.jsonl", Captions("filename"), workers=workers)
    jobs = list(plan_images("photos", source, RULES, found).pixel_jobs("stepwise"))
    start = time.perf_counter()
    PixelCache(cache).build(jobs, workers=workers)
    return time.perf_counter() - start


def cached(store: _Store, seconds: float) -> dict[str, object]:
    """Samples per second from the sampler to collated batches: random crops, captions drawn, 10 % dropped.

    Of exact embeds and of those in 8 bits; and how fast the exact ones alone are copied, which is as fast as it can be.
    """
    ways = {"exact": store.samples(store.embeds), "int8": store.samples(store.int8), "copied": store.copies()}
    rates: dict[str, list[_Rate]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, batches in ways.items():
            rates[name].append(_repeated(lambda: next(batches), BATCH, seconds))
    facts = {"samples": len(store.dataset.records), "embeds": f"{TOKENS}x{store.width} bfloat16", "batch": BATCH}
    ours = {"mb_a_caption": store.mb_a_caption(store.embeds)} | _medians("samples", rates["exact"])
    in_8_bits = {"mb_a_caption": store.mb_a_caption(store.int8)} | _medians("samples", rates["int8"])
    return facts | ours | {"int8": in_8_bits, "copying_embeds_alone": _medians("samples", rates["copied"])}


def embeds(store: _Store, folder: Path, seconds: float) -> dict[str, object]:
    """Batches per second of text embeds alone, ours and from one file per caption."""
    folder.mkdir()
    paths = {text: folder / f"{number}.pt" for number, text in enumerate(store.texts)}
    for text, path in paths.items():
        torch.save(store.embeds.read([text])[0].clone(), path)
    draw = random.Random(0)
    ring = [Buffer(torch.bfloat16)(BATCH, TOKENS, store.width) for _ in range(3)]
    ours, plain = [], []
    for _ in range(ROUNDS):
        plain.append(_repeated(
            lambda: torch.stack([torch.load(paths[text]) for text in draw.sample(store.texts, BATCH)]), 1, seconds))
        ours.append(_repeated(
            lambda: store.embeds.read(draw.sample(store.texts, BATCH), _rotated(ring)), 1, seconds))
    return {"batch": BATCH} | _compared("batches", ours, plain)


class _Rate(NamedTuple):
    """Things per second of the core's work, and of the clock."""

    core: float
    clock: float


class _Store:
    """Caches as a first run leaves them, but of random numbers: one image and one caption of its own per sample."""

    def __init__(self, folder: Path, samples: int, width: int) -> None:
        self.width = width
        captions = [f"A photograph of subject {number}" for number in range(samples)]
        self.prepared = prepare_captions(T5(), captions)
        self.texts = [self.prepared[caption] for caption in captions]
        records = _records(captions)
        self.dataset: Dataset = plan_images("cached", Path("/images"), RULES, Scan(records, (), ()))
        self.pixels = PixelCache(folder / "pixels")
        self._fill_pixels(records)
        self.embeds, self.int8 = (EmbedCache(folder / "text", FINGERPRINT, storage) for storage in ("bf16", "int8"))
        self.embeds.build(self.prepared.values(), self._encode, len, BATCH)
        self.int8.convert(self.prepared.values())

    def samples(self, embeds: EmbedCache) -> Iterator[Batch]:
        """Endless batches as training has them."""
        sampler = Sampler([self.dataset], BATCH, seed=42, caption_dropout_probability=0.1)
        source = Source(CachedPixels(self.pixels, "stepwise"), embeds)
        collate = Collator({self.dataset.id: source}, self.prepared)
        return (collate(plan) for _, plan in sampler.batches())

    def copies(self) -> Iterator[torch.Tensor]:
        """Endless batches of exact embeds, drawn and copied as they lie in memory, and nothing else."""
        views = [record.content for record in self.embeds.store.records(list(self.embeds.store))]
        ring = [Buffer(torch.bfloat16)(BATCH, TOKENS, self.width) for _ in range(3)]
        draw = random.Random(0)
        while True:
            batch = _rotated(ring)
            for row, view in zip(batch.view(torch.uint8).flatten(1).numpy(), draw.sample(views, BATCH)):
                row[:] = view
            yield batch

    def mb_a_caption(self, embeds: EmbedCache) -> float:
        """MB on the disk, of which the shards' headers are a part."""
        taken = sum(path.stat().st_size for path in embeds.store.folder.iterdir())
        return _rounded(taken / len(embeds.store) / 1e6)

    def _fill_pixels(self, records: Records) -> None:
        draw = np.random.default_rng(0)
        with self.pixels.store.writer() as writer:
            for record in records:
                key = pixel_key(record.content, CACHED_SIZE, "stepwise")
                writer.add(key, draw.integers(0, 256, (CACHED_SIZE.height, CACHED_SIZE.width, 3), np.uint8))

    def _encode(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.randn(len(texts), TOKENS, self.width).bfloat16()


def _records(captions: Sequence[str]) -> Records:
    columns = Columns("cached", Path("/images"))
    for number, caption in enumerate(captions):
        columns.add(b"%d.jpg" % number, number.to_bytes(32, "big"), Size(4000, 3000), (caption,))
    return Records(columns)


def _plain_sample(path: Path, rules: Rules) -> np.ndarray:
    """Full decode, then 25 % at a time."""
    image = Image.open(path).convert("RGB")
    plan = plans(Size(*image.size), rules)[0]
    for size in steps(plan.source, plan.intermediate):
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image.crop(crop_box(plan.intermediate, plan.target, "center")))


def _our_samples(source: Path, cache: Path, rules: Rules, method: str) -> None:
    """The first run over a folder, up to the batches of its first epoch; without text, which has its own figures."""
    found = scan("photos", source, cache / "index.jsonl", Captions("filename"), workers=1)
    dataset = plan_images("photos", source, rules, found)
    pixels = PixelCache(cache)
    assert not pixels.build(dataset.pixel_jobs(method), workers=1)
    sampler = Sampler([dataset], BATCH, seed=42, caption_dropout_probability=0)
    images, buffer = CachedPixels(pixels, method), Buffer(torch.uint8)
    for _, plan in islice(sampler.batches(), sampler.batches_in_epoch(0)):
        images.read(plan.uses, buffer)


def write_photo(path: Path, size: Size, seed: int) -> Path:
    """A picture with detail at every scale, as photographs have it: 12 megapixels make a file of 3 MB."""
    draw = np.random.default_rng(seed)
    picture = np.zeros((size.height, size.width, 3), np.float32)
    for scale in (1, 4, 16, 64, 256):
        shape = (-(-size.height // scale), -(-size.width // scale), 3)
        octave = Image.fromarray(draw.integers(0, 256, shape, np.uint8))
        picture += (np.asarray(octave.resize(size, Image.Resampling.BICUBIC), np.float32) - 127.5) * scale**0.5 / 16
    Image.fromarray(np.clip(picture + 127.5, 0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def _rotated(ring: list[torch.Tensor]) -> torch.Tensor:
    ring.append(ring.pop(0))
    return ring[-1]


def _rate(work: Callable[[], object], count: int) -> _Rate:
    core, clock = time.process_time(), time.perf_counter()
    work()
    return _Rate(count / (time.process_time() - core), count / (time.perf_counter() - clock))


def _repeated(work: Callable[[], object], count: int, seconds: float) -> _Rate:
    """The rate of `work`, each time of `count` things, after one to warm up."""
    work()
    core, clock, done = time.process_time(), time.perf_counter(), 0
    while time.perf_counter() - clock < seconds:
        work()
        done += count
    return _Rate(done / (time.process_time() - core), done / (time.perf_counter() - clock))


def _medians(things: str, rates: Sequence[_Rate]) -> dict[str, float]:
    return {
        f"{things}_per_core_second": _rounded(median(rate.core for rate in rates)),
        f"{things}_per_second": _rounded(median(rate.clock for rate in rates)),
    }


def _compared(things: str, ours: Sequence[_Rate], plain: Sequence[_Rate]) -> dict[str, object]:
    """Both medians, and the ratio of the turns: each turn of ours to the plain one beside it."""
    return {
        "ours": _medians(things, ours),
        "plain": _medians(things, plain),
        "ratio_of_core_time": _rounded(median(our.core / other.core for our, other in zip(ours, plain))),
        "ratio": _rounded(median(our.clock / other.clock for our, other in zip(ours, plain))),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _use_one_core() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=4, help="photos per round, of five rounds")
    sizes = [Size(4000, 3000), Size(6000, 4000)]
    parser.add_argument("--photo_size", type=lambda text: parse_sizes(text)[0], nargs="+", default=sizes)
    parser.add_argument("--samples", type=int, default=2048, help="cached samples")
    parser.add_argument("--width", type=int, default=4096, help="numbers per token of a text embed: T5-XXL has 4096")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement of a round")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "data.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
