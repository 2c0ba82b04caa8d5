"""What the caches of images have in common: each is decoded once, and why it has to be is told."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import PIL
from tqdm import tqdm

from helpers.caching.store import ShardStore, locked
from helpers.files import content_hash, write_whole
from helpers.images.loading import Unreadable, load
from helpers.sizes import Size

Item, Result = TypeVar("Item"), TypeVar("Result")


class Job(Protocol):
    """An image to be cached: its file, the hash of its bytes, the size to bring it to, and how."""

    path: Path
    content: str
    size: Size
    method: str

    @property
    def key(self) -> str:
        """Lower-case hex of what the record hangs on, but for the cache's own recipe."""


Decoded = Iterator[tuple[Job, np.ndarray | Unreadable]]
"""Jobs with their images, uint8 `[H, W, 3]`, or with why there is none."""


class Changed(Unreadable):
    """A file that is no longer the one that was found: to cache it under the old content's key would be wrong."""

    def __init__(self) -> None:
        super().__init__("was changed while the images were read: it is used from the next start on")


class ImageCache:
    """Records that are made of decoded images: renamed or duplicated files are decoded once.

    Images that cannot be decoded are remembered with the reason, so that each run leaves out the same ones without
    trying again; they are tried again under another version of Pillow, which may read more.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, str]) -> None:
        self.store = ShardStore(folder, recipe)
        self._failures_path = folder / "failures.json"
        self._failures = _read_failures(self._failures_path)
        self._made_path = folder / "made.jsonl"

    def failures(self, jobs: Iterable[Job]) -> dict[Path, str]:
        """The files among the jobs that are known to fail, with the reason."""
        return _reasons(self._looked_up(jobs).failing, self._failures)

    def _looked_up(self, jobs: Iterable[Job]) -> _LookedUp:
        """Of a million jobs most are cached: those are counted, and the others kept."""
        are_cached, missing, failing = bytearray(len(self.store)), {}, {}
        not_readable: set[str] = set()
        for job in jobs:
            key = job.key
            number = self.store.number(key)
            if number is not None:
                are_cached[number] = True
            if key in self._failures:
                failing.setdefault(key, []).append(job)
                if number is None:
                    not_readable.add(key)
            elif number is None:
                missing.setdefault(key, []).append(job)
        return _LookedUp(are_cached.count(True), missing, failing, len(not_readable))

    def build(
        self,
        jobs: Iterable[Job],
        workers: int | None = None,
        name: str = "pixels",
        mine: Callable[[str], bool] | None = None,
        made_of: Callable[[Decoded], Decoded] = iter,
    ) -> dict[Path, str]:
        """Decode what is missing, by `workers` threads (one per core if None); returns the files that failed.

        Threads, since Pillow decodes and resizes without the GIL: two give as much as two processes, which would also
        have to send the pixels back. At most four images a worker are in memory, and one shard. How much of it was
        there already, and why the rest was not, is told under this `name`. With `mine`, only the images whose keys it
        takes are decoded here, and the others by other processes.

        Args:
            made_of: the records of decoded images, in any order; the images themselves unless given.
        """
        found = self._looked_up(jobs)
        tqdm.write(f"{name}: {self._plan(found)}")
        todo = [same[-1] for key, same in found.missing.items() if mine is None or mine(key)]
        passing = self._decode(todo, workers or cores(), made_of) if todo else {}
        return _reasons(found.failing | found.missing, self._failures | passing)

    def _decode(
        self, jobs: list[Job], workers: int, made_of: Callable[[Decoded], Decoded] = iter
    ) -> dict[str, str]:
        """Fill the store; returns the reasons that may not hold in the next run, by key, and remembers the others."""
        if self.store.damaged:
            tqdm.write(self.store.damage())
        passing: dict[str, str] = {}
        try:
            with self.store.writer() as writer, ThreadPoolExecutor(workers) as threads:
                results = made_of(in_order(threads, _decoded, jobs, window=4 * workers))
                for job, result in tqdm(results, total=len(jobs), desc="decoding images", unit="image"):
                    if isinstance(result, np.ndarray):
                        writer.add(job.key, result)
                    else:
                        reasons = passing if result.may_pass or isinstance(result, Changed) else self._failures
                        reasons[job.key] = result.reason
        finally:
            self._remember_made([job for job in jobs if job.key in self.store])
        self._remember_failures()
        return passing

    def _plan(self, found: _LookedUp) -> str:
        """How many images are cached, how many have to be decoded, and why, in words."""
        todo = [same[-1] for same in found.missing.values()]
        words = f"{found.cached:,} images cached before, {len(todo):,} to decode"
        if todo:
            history, damaged = _read_history(self._made_path, todo), self.store.damaged_keys()
            reasons = Counter(self._why(job, history, damaged) for job in todo)
            words += ": " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        return words + (f"; {found.not_readable:,} known not to be readable" if found.not_readable else "")

    def _why(self, job: Job, history: _History, damaged: set[str]) -> str:
        """Why an image is not cached: what is different from what was cached before."""
        if job.key in damaged or (self.store.damaged and job.key in history.keys):
            return "of a damaged shard"
        if job.key in history.keys:
            return "whose shard is gone"
        if methods := history.methods.get(job.content):
            return "at another size" if job.method in methods else "by another downsample_method"
        return "edited" if str(job.path) in history.paths else "new"

    def _remember_made(self, jobs: Sequence[Job]) -> None:
        """Note where cached images came from, to say later why others have to be made. Nothing else hangs on it."""
        lines = [json.dumps([str(job.path), job.content, str(job.size), job.method, job.key]) + "\n" for job in jobs]
        # One write to the end of the file: lines of runs that share the cache do not mix.
        with self._made_path.open("ab", buffering=0) as made:
            made.write("".join(lines).encode())

    def _remember_failures(self) -> None:
        if not self._failures:
            return
        with locked(self.store.folder, fcntl.LOCK_EX):
            self._failures = _read_failures(self._failures_path) | self._failures  # others may have added some
            content = json.dumps({"pillow": PIL.__version__, "reasons": self._failures}, indent=1)
            write_whole(self._failures_path, content.encode())


class _LookedUp(NamedTuple):
    """Which of some jobs, by their keys, are neither cached nor known to fail, which fail, and how many are cached.

    `not_readable` counts the keys that fail and are not cached either.
    """

    cached: int
    missing: dict[str, list[Job]]
    failing: dict[str, list[Job]]
    not_readable: int


def _reasons(jobs: Mapping[str, Sequence[Job]], reasons: Mapping[str, str]) -> dict[Path, str]:
    """The files of those jobs that fail."""
    return {job.path: reasons[key] for key, same in jobs.items() if key in reasons for job in same}


def _decoded(job: Job) -> np.ndarray | Unreadable:
    try:
        result = load(job.path, job.size, job.method)
    except Unreadable as error:
        result = error
    try:
        # What was decoded must be what was found: a file that is edited meanwhile would be cached under a wrong key.
        return result if content_hash(job.path) == job.content else Changed()
    except OSError as error:
        return result if isinstance(result, Unreadable) else _vanished(error)


def _vanished(error: OSError) -> Unreadable:
    unreadable = Unreadable(f"cannot be read: {error.strerror}")
    unreadable.__cause__ = error
    return unreadable


def in_order(
    pool: Executor, work: Callable[[Item], Result], jobs: Iterable[Item], window: int
) -> Iterator[tuple[Item, Result]]:
    """Each job with its result, in order; `window` of them are worked on or wait, which bounds the memory."""
    rest = iter(jobs)
    running: deque[tuple[Item, Future]] = deque((job, pool.submit(work, job)) for job in islice(rest, window))
    while running:
        job, future = running.popleft()
        yield job, future.result()
        running.extend((job, pool.submit(work, job)) for job in islice(rest, 1))


def cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_failures(path: Path) -> dict[str, str]:
    """The files that are known to fail, by key; a list that is damaged costs no more than trying them again."""
    try:
        remembered = json.loads(path.read_bytes())
        reasons = remembered["reasons"] if remembered["pillow"] == PIL.__version__ else {}
        return {str(key): str(reason) for key, reason in reasons.items()}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


class _History(NamedTuple):
    """What was ever cached of some jobs: their keys, the methods by content, and the files that it came from."""

    keys: set[str]
    methods: dict[str, set[str]]
    paths: set[str]


def _read_history(path: Path, jobs: Sequence[Job]) -> _History:
    """From the notes of earlier builds; lines that an interruption or a bad disk broke are skipped."""
    history = _History(set(), {}, set())
    if not path.exists():
        return history
    keys, contents, paths = {job.key for job in jobs}, {job.content for job in jobs}, {str(job.path) for job in jobs}
    with path.open("rb") as lines:
        for line in lines:
            try:
                source, content, _, method, key = map(str, json.loads(line))
            except (ValueError, TypeError, RecursionError):
                continue
            if key in keys:
                history.keys.add(key)
            if content in contents:
                history.methods.setdefault(content, set()).add(method)
            if source in paths:
                history.paths.add(source)
    return history
