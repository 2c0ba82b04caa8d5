"""The pixel cache: images at the size that they are cropped from, uint8, decoded once."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from tqdm import tqdm

from helpers.caching.store import ShardStore
from helpers.files import write_whole
from helpers.images.loading import Unreadable, load
from helpers.sizes import Size

_RECIPE = {"kind": "pixels", "version": "1"}  # raise the version when `load` gives other pixels than before


class PixelJob(NamedTuple):
    """An image to be cached: its file, the hash of its bytes, the size to bring it to, and how."""

    path: Path
    content: str
    size: Size
    method: str

    @property
    def key(self) -> str:
        return pixel_key(self.content, self.size, self.method)


class PixelCache:
    """Decoded images by content, size and method: renamed or duplicated files are decoded once.

    Images that cannot be decoded are remembered with the reason, so that each run leaves out the same ones without
    trying again; they are tried again under another version of Pillow, which may read more.
    """

    def __init__(self, folder: Path) -> None:
        self.store = ShardStore(folder, _RECIPE)
        self._failures_path = folder / "failures.json"
        self._failures = _read_failures(self._failures_path)

    def missing(self, jobs: Iterable[PixelJob]) -> list[PixelJob]:
        """Those jobs, one per key, that are neither cached nor known to fail."""
        unique = {job.key: job for job in jobs}
        return [job for key, job in unique.items() if key not in self.store and key not in self._failures]

    def failures(self, jobs: Iterable[PixelJob]) -> dict[Path, str]:
        """The files among the jobs that are known to fail, with the reason."""
        return {job.path: self._failures[job.key] for job in jobs if job.key in self._failures}

    def build(self, jobs: Iterable[PixelJob], workers: int | None = None) -> dict[Path, str]:
        """Decode what is missing, by `workers` threads (one per core if None); returns the files that failed.

        Threads, since Pillow decodes and resizes without the GIL: two give as much as two processes, which would also
        have to send the pixels back. At most four images a worker are in memory, and one shard.
        """
        jobs = list(jobs)
        todo = self.missing(jobs)
        passing = self._decode(todo, workers or _cores()) if todo else {}
        return self.failures(jobs) | {job.path: passing[job.key] for job in jobs if job.key in passing}

    def _decode(self, jobs: list[PixelJob], workers: int) -> dict[str, str]:
        """Fill the store; returns the reasons that may not hold in the next run, by key, and remembers the others."""
        if self.store.damaged:
            tqdm.write(self.store.damage())
        passing: dict[str, str] = {}
        with self.store.writer() as writer, ThreadPoolExecutor(workers) as threads:
            results = _in_order(threads, _decoded, jobs, window=4 * workers)
            for job, result in tqdm(results, total=len(jobs), desc="decoding images", unit="image"):
                if isinstance(result, np.ndarray):
                    writer.add(job.key, result)
                else:
                    reasons = self._failures if _is_lasting(result) else passing
                    reasons[job.key] = result.reason
        self._remember_failures()
        return passing

    def announce(self, keys: Iterable[str]) -> None:
        """Tell the system that these images are about to be read; see `ShardStore.announce`."""
        self.store.announce(keys)

    def read_into(self, key: str, out: np.ndarray, left: int = 0, top: int = 0) -> None:
        """Fill `out` (uint8 [H, W, 3]) with the part of the image that begins at (left, top).

        Raises:
            KeyError: the image was not built.
            ValueError: the part reaches out of the image.
        """
        image = self.store.view(key).reshape(self.store.shape(key))
        part = image[top : top + out.shape[0], left : left + out.shape[1]]
        if part.shape != out.shape:
            raise ValueError(f"image {key} is {image.shape[1]}x{image.shape[0]}: no {out.shape} at ({left}, {top})")
        out[:] = part

    def _remember_failures(self) -> None:
        if not self._failures:
            return
        self._failures = _read_failures(self._failures_path) | self._failures  # another run may have added some
        content = json.dumps({"pillow": PIL.__version__, "reasons": self._failures}, indent=1)
        write_whole(self._failures_path, content.encode())


def pixel_key(content: str, intermediate: Size, method: str) -> str:
    """The key of an image in the cache: `content` is the hash of the file's bytes."""
    return hashlib.blake2b(f"{content} {intermediate} {method}".encode(), digest_size=16).hexdigest()


def _decoded(job: PixelJob) -> np.ndarray | Unreadable:
    try:
        return load(job.path, job.size, job.method)
    except Unreadable as error:
        return error


def _in_order(
    pool: Executor, work: Callable[[PixelJob], np.ndarray | Unreadable], jobs: list[PixelJob], window: int
) -> Iterator[tuple[PixelJob, np.ndarray | Unreadable]]:
    """Each job with its result, in order; `window` of them are worked on or wait, which bounds the memory."""
    rest = iter(jobs)
    running: deque[tuple[PixelJob, Future]] = deque((job, pool.submit(work, job)) for job in islice(rest, window))
    while running:
        job, future = running.popleft()
        yield job, future.result()
        running.extend((job, pool.submit(work, job)) for job in islice(rest, 1))


def _is_lasting(error: Unreadable) -> bool:
    """Whether the bytes themselves are at fault, not a disk, a permission or a lack of memory that may pass."""
    cause = error.__cause__
    return not (isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None))


def _cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_failures(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    remembered = json.loads(path.read_text())
    return remembered["reasons"] if remembered["pillow"] == PIL.__version__ else {}
