"""Where the records of a store are: a hash table of numbers, since of objects a million would take 220 MB."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KEY_BYTES = 16
EMPTY = -1


class Place(NamedTuple):
    """The bytes of a record in its shard, and the shape of its array."""

    shard: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]


class _Layout(NamedTuple):
    nbytes: int
    shape: tuple[int, ...]


class Places:
    """From a key, 32 hex digits, to its place; 45 bytes a record. The first place of a key holds.

    Places have numbers, in the order in which they were added.
    """

    def __init__(self) -> None:
        self.shards: dict[Path, int] = {}
        self._paths: list[Path] = []
        self._layouts: dict[_Layout, int] = {}  # most records share few
        self._kinds: list[_Layout] = []
        self._keys = bytearray()
        self._shard, self._offset, self._layout = array("i"), array("q"), array("i")
        self._slots = array("i", [EMPTY] * 8)  # open addressing: a number, or EMPTY; at least a third are EMPTY

    def __len__(self) -> int:
        return len(self._offset)

    def __iter__(self) -> Iterator[str]:
        return (self._key(number).hex() for number in range(len(self)))

    def __getitem__(self, number: int) -> Place:
        return Place(self._paths[self._shard[number]], self._offset[number], *self._kinds[self._layout[number]])

    def find(self, key: str) -> int | None:
        """The number of a key's place; None if it has none."""
        wanted = bytes.fromhex(key)
        number = self._slots[self._slot(wanted)]
        return None if number == EMPTY else number

    def add(self, key: str, place: Place) -> None:
        """Take up a place, unless the key has one already."""
        wanted = bytes.fromhex(key)
        slot = self._slot(wanted)
        if self._slots[slot] != EMPTY:
            return
        self._slots[slot] = len(self)
        self._keys += wanted
        self._shard.append(_numbered(place.shard, self.shards, self._paths))
        self._offset.append(place.offset)
        self._layout.append(_numbered(_Layout(place.nbytes, place.shape), self._layouts, self._kinds))
        if 3 * len(self) > 2 * len(self._slots):
            self._grow()

    def _key(self, number: int) -> bytes:
        return bytes(self._keys[KEY_BYTES * number : KEY_BYTES * (number + 1)])

    def _slot(self, wanted: bytes) -> int:
        """Where a key stands, or would."""
        slots, keys = self._slots, self._keys
        mask = len(slots) - 1
        slot = hash(wanted) & mask
        while (number := slots[slot]) != EMPTY and keys[KEY_BYTES * number : KEY_BYTES * (number + 1)] != wanted:
            slot = slot + 1 & mask
        return slot

    def _grow(self) -> None:
        slots = self._slots = array("i", [EMPTY]) * (2 * len(self._slots))
        mask = len(slots) - 1
        for number in range(len(self)):
            slot = hash(self._key(number)) & mask
            while slots[slot] != EMPTY:
                slot = slot + 1 & mask
            slots[slot] = number


def _numbered(item: Path | _Layout, numbers: dict, items: list) -> int:
    number = numbers.setdefault(item, len(items))
    if number == len(items):
        items.append(item)
    return number
