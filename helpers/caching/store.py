"""Sharded safetensors on disk: content-addressed records, atomic shards, checksums, no pickle.

A shard is one safetensors file whose name is the hash of its bytes. The one rename that publishes a shard thus
publishes its checksum with it: no index can disagree with the files, two writers cannot share a shard (the same
name means the same bytes), and a store is resumed by listing its folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from helpers.caching.places import Place, Places
from helpers.files import delete_stale_partials, write_whole

FORMAT = "shards-1"
SHARD_BYTES = 256 * 1024**2
SHARD_RECORDS = 4096

_NAME_LENGTH = 40  # 160 bits of SHA-256, the fastest of the strong hashes where the CPU has instructions for it
_SHARD_NAME = re.compile(rf"[0-9a-f]{{{_NAME_LENGTH}}}\.safetensors")
_KEY = re.compile(r"[0-9a-f]{32}")
_SHARE_OF_MEMORY = 0.25  # a store of less stays in the page cache once it was read
_OPEN_FILES = 256  # shards that stay mapped; far below the usual limit of 1,024 open files for a process


class DamagedShard(Exception):
    """A shard that changed while it was in use; the message names it."""


class Stored(NamedTuple):
    """A record: its bytes as a flat, read-only uint8 array over the shard's memory map, and the shape of its array."""

    content: np.ndarray
    shape: tuple[int, ...]


class _Mapped(NamedTuple):
    """A shard in memory, for the system and as bytes."""

    file: mmap.mmap
    content: np.ndarray


class ShardStore:
    """The records of a folder that were made by one recipe: key (32 lower-case hex digits) -> array.

    Every shard is verified against its name when the store is opened, at the speed of hashing (about 1.7 GB/s a
    core). Shards that fail are in `damaged` and their records count as missing, so that they are made again;
    shards of another recipe or format are in `foreign` and are never read. Partial files that a crash left are
    ignored, and deleted once they are a day old.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, str]) -> None:
        self.folder = folder
        # One entry: the library writes several in an order of chance, and the same records would make another shard.
        self._metadata = {"floydtuner": json.dumps({"format": FORMAT, "recipe": dict(recipe)}, sort_keys=True)}
        self._places = Places()
        self._maps: dict[Path, _Mapped] = {}
        self._nbytes = 0
        self._announced = bytearray()  # by number of a place
        self.damaged: tuple[Path, ...] = ()
        self.foreign: tuple[Path, ...] = ()
        folder.mkdir(parents=True, exist_ok=True)
        delete_stale_partials(folder)
        self.refresh()

    def refresh(self) -> None:
        """Take up the shards that others have published since the store was opened."""
        known = {*self.damaged, *self.foreign, *self._places.shards}
        paths = (path for path in self.folder.iterdir() if _SHARD_NAME.fullmatch(path.name) and path not in known)
        self._open_shards(sorted(paths))

    def _open_shards(self, paths: list[Path]) -> None:
        damaged, foreign = [], []
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            for path, header in zip(paths, pool.map(_verified_header, paths)):
                if header is None:
                    damaged += [path] if path.exists() else []  # another run may have deleted a damaged one just now
                elif header.content.get("__metadata__") != self._metadata:
                    foreign.append(path)
                else:
                    self._add_shard(path, header)
        self.damaged, self.foreign = (*self.damaged, *damaged), (*self.foreign, *foreign)

    def _add_shard(self, path: Path, header: _Header) -> None:
        for key, entry in header.content.items():
            if _KEY.fullmatch(key):
                start, end = entry["data_offsets"]
                place = Place(path, header.data_start + start, end - start, tuple(entry["shape"]))
                self._places.add(key, place)
                self._nbytes += place.nbytes
        self._announced.extend(bytes(len(self._places) - len(self._announced)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._places.find(key) is not None

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._places[self._number(key)].shape

    def number(self, key: str) -> int | None:
        """The place of a record in the order of all, from 0; None if there is none."""
        return self._places.find(key)

    def records(self, keys: Sequence[str]) -> list[Stored]:
        """The records of these keys. The system is told of them before the first is touched, so that the disk fetches
        them together.

        Without that each page that is not in memory yet is waited for in turn: measured with batches of 16 text embeds
        on a cold SSD, 270 records a second instead of 1,230, where `preadv` reads 850. On a warm cache a record is
        copied out of a memory map in 76 us where `preadv` takes 121; announcing it costs 14 of the 45 us won. So the
        records of a store that will stay in memory, as it is small beside the machine's, are announced once.

        Raises:
            KeyError: the store has no such record.
            DamagedShard: the file became shorter since it was verified.
        """
        numbers = [self._number(key) for key in keys]
        places = [self._places[number] for number in numbers]
        for number, place in zip(numbers, places):
            if not self._announced[number]:
                self._announce(number, place)
        return [self._stored(place) for place in places]

    def _number(self, key: str) -> int:
        number = self._places.find(key)
        if number is None:
            raise KeyError(key)
        return number

    def _announce(self, number: int, place: Place) -> None:
        if self._nbytes < _memory() * _SHARE_OF_MEMORY:
            self._announced[number] = True
        start = place.offset - place.offset % mmap.PAGESIZE
        self._mapped(place.shard).file.madvise(mmap.MADV_WILLNEED, start, place.offset + place.nbytes - start)

    def _stored(self, place: Place) -> Stored:
        shard, offset, nbytes, shape = place
        content = self._mapped(shard).content[offset : offset + nbytes]
        if content.nbytes < nbytes:
            raise DamagedShard(f"{shard} became shorter while it was in use: start again, and it is made again")
        return Stored(content, shape)

    def _mapped(self, shard: Path) -> _Mapped:
        mapped = self._maps.get(shard)
        if mapped is None:
            with shard.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = _Mapped(memory, np.frombuffer(memory, np.uint8))
            if len(self._maps) < _OPEN_FILES:
                self._maps[shard] = mapped
        return mapped

    def writer(self) -> Writer:
        return Writer(self)

    def publish(self, records: Mapping[str, torch.Tensor]) -> None:
        """Write one shard, whole or not at all, and make its records readable."""
        content = save(dict(records), self._metadata)
        shard = self.folder / f"{hashlib.sha256(content).hexdigest()[:_NAME_LENGTH]}.safetensors"
        with locked(self.folder, fcntl.LOCK_SH):
            write_whole(shard, content)
        self.damaged = tuple(path for path in self.damaged if path != shard)  # made again, byte for byte
        self._add_shard(shard, _read_header(shard))

    def damage(self) -> str:
        """What to tell the user of the damaged shards; "" if there are none."""
        if not self.damaged:
            return ""
        names = ", ".join(path.name for path in self.damaged)
        return f"{self.folder}: damaged, so what is needed of it is made again: {names}"

    def damaged_keys(self) -> set[str]:
        """The keys that damaged shards still name: good enough to tell the user what is made again, for nothing else."""
        return {key for path in self.damaged for key in _claimed_header(path) if key != "__metadata__"}

    def damage_is_nameless(self) -> bool:
        """Whether a damaged shard does not even name its keys any more."""
        return any(not _claimed_header(path) for path in self.damaged)

    def drop_damaged(self) -> None:
        """Delete the damaged shards: nothing in them can be trusted, and what is needed has been made again.

        A shard that another run has made again since this store was opened has the same name, and stays. The lock
        keeps that run from doing so between the look and the deletion; while one publishes, or where the file system
        knows no locks, the damaged shards stay until the next time.
        """
        if not self.damaged:
            return
        with locked(self.folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if alone:
                for path in self.damaged:
                    if _verified_header(path) is None:
                        path.unlink(missing_ok=True)
        self.damaged = ()


def stored_keys(folder: Path) -> set[str]:
    """The keys of all shards below a folder, as their headers have them: no more is read, and nothing verified."""
    keys: set[str] = set()
    for shard in folder.rglob("*.safetensors"):
        with suppress(OSError, SafetensorError):  # it is damaged, or goes away: what was in it is made again
            with safe_open(shard, "numpy") as file:
                keys.update(file.keys())
    return keys


class Writer:
    """Gathers records and publishes a shard at 256 MB or 4,096 records; the last one when the `with` ends.

    What was added before an error is published too: hours of encoding survive an interruption.
    """

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._records: dict[str, torch.Tensor] = {}
        self._nbytes = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if kind is None:
            self._store.drop_damaged()

    def add(self, key: str, array: np.ndarray | torch.Tensor) -> None:
        """Take a copy of `array`; the caller may reuse its memory."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a lower-case hex key of 32 digits")
        if key in self._store or key in self._records:
            return
        tensor = _own_copy(array)
        self._records[key] = tensor
        self._nbytes += tensor.nbytes
        if self._nbytes >= SHARD_BYTES or len(self._records) >= SHARD_RECORDS:
            self._flush()

    def _flush(self) -> None:
        if self._records:
            self._store.publish(self._records)
        self._records, self._nbytes = {}, 0


@contextmanager
def locked(folder: Path, kind: int) -> Iterator[bool]:
    """Hold a lock on a folder, of the `kind` that flock takes; yields whether it was to be had."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, kind)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


@cache
def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _own_copy(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array, order="C"))
    return array.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


class _Header(NamedTuple):
    """The JSON header of a safetensors file, and the byte at which its data starts."""

    content: dict
    data_start: int


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _Header(json.loads(file.read(length)), 8 + length)


def claimed_records(folder: Path) -> Iterator[tuple[Mapping[str, str], list[str]]]:
    """The recipe and keys of each shard of a folder, by their headers alone: to tell the user, and for nothing else."""
    for path in folder.iterdir():
        header = _claimed_header(path) if _SHARD_NAME.fullmatch(path.name) else {}
        keys = [key for key in header if key != "__metadata__"]
        try:
            recipe = json.loads(header["__metadata__"]["floydtuner"])["recipe"]
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(recipe, dict):
            yield recipe, keys


def _claimed_header(path: Path) -> dict:
    """What a shard that may be damaged says of itself; {} if that cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        header = _read_header(path).content if length < path.stat().st_size else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _verified_header(path: Path) -> _Header | None:
    """The shard's header; None if it is damaged, or gone. A disk that cannot be read raises OSError: no verdict."""
    try:
        if _checksum(path) != path.stem:
            return None
        with safe_open(path, "numpy"):  # a cache of someone else's may hold anything under the name of its hash
            return _read_header(path)
    except (FileNotFoundError, SafetensorError):
        return None


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = np.empty(1024**2, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()[:_NAME_LENGTH]
