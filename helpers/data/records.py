"""The images of a dataset, as compact as a million of them have to be: columns of bytes, not objects."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from helpers.sizes import Size

HASH_BYTES = 32
END = b"\xff"
"""After each caption of an image: a byte that UTF-8 does not have."""


@dataclass(frozen=True)
class Record:
    """One usable image.

    `content` is the SHA-256 of the file's bytes in hex, `size` is after EXIF orientation, `captions` are the
    alternatives of which one is drawn at each use, not yet cleaned. `control` is its conditioning image, where a
    ControlNet is trained.
    """

    dataset_id: str
    path: Path
    content: str
    size: Size
    captions: tuple[str, ...]
    control: Record | None = None

    @classmethod
    def of_row(cls, columns: Columns, row: int, control: Record | None) -> Record:
        """The same of a row. What no batch needs, path and size, is made when it is asked for: it takes the longest."""
        record = object.__new__(cls)
        record.__dict__.update(
            dataset_id=columns.dataset_id,
            content=columns.content(row),
            captions=columns.captions(row),
            control=control,
            _columns=columns,
            _row=row,
        )
        return record

    def __getattr__(self, name: str) -> Path | Size:
        """Path and size of a record that was made of a row, at the first time."""
        columns = self.__dict__.get("_columns")
        if columns is None or name not in ("path", "size"):
            raise AttributeError(f"a Record has no {name!r}")
        value = Path(self.file) if name == "path" else columns.size(self._row)
        self.__dict__[name] = value
        return value

    @property
    def file(self) -> str:
        """The path as text."""
        columns = self.__dict__.get("_columns")
        return columns.file(self._row) if columns else str(self.path)


class Columns:
    """Images of one folder, one after another, in 60 bytes each besides their names and captions.

    Captions that an image has in common with the one before it are kept once: an instance prompt takes nothing.
    """

    def __init__(self, dataset_id: str, folder: Path) -> None:
        self.dataset_id = dataset_id
        self.prefix = "" if folder == Path() else os.path.join(folder, "")  # no path begins with ./
        self.contents = bytearray()
        self.edges = array("i")
        self._names, self._captions = _Strings(), _Strings()
        self._said = array("i")  # by image the number of its captions
        self._last: tuple[str, ...] | None = None

    def add(self, name: bytes, content: bytes, size: Size, captions: tuple[str, ...]) -> None:
        """Take up an image: its path inside the folder, the 32 bytes of its SHA-256, its size and its captions."""
        if captions != self._last:
            self._captions.add(b"".join([caption.encode("utf-8", "surrogatepass") + END for caption in captions]))
            self._last = captions
        self._said.append(len(self._captions) - 1)
        self._names.add(name)
        self.contents += content
        self.edges.extend(size)

    def __len__(self) -> int:
        return len(self._names)

    def file(self, row: int) -> str:
        return self.prefix + os.fsdecode(self._names[row])

    def content(self, row: int) -> str:
        return self.contents[HASH_BYTES * row : HASH_BYTES * (row + 1)].hex()

    def size(self, row: int) -> Size:
        return Size(self.edges[2 * row], self.edges[2 * row + 1])

    def captions(self, row: int) -> tuple[str, ...]:
        texts = self._captions[self._said[row]].split(END)
        return tuple([text.decode("utf-8", "surrogatepass") for text in texts[:-1]])


class Records(Sequence[Record]):
    """Rows of columns, each of which becomes a `Record` when it is asked for.

    Args:
        rows: which, and in what order; all if not given.
        controls: as many conditioning images, which belong to them in order.
    """

    def __init__(self, columns: Columns, rows: Sequence[int] | None = None, controls: Records | None = None) -> None:
        self._columns = columns
        self._rows = range(len(columns)) if rows is None else rows
        self._controls = controls

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.taken(np.arange(len(self))[index])
        columns, row = self._columns, int(self._rows[index])
        control = None if self._controls is None else self._controls[index]
        return Record.of_row(columns, row, control)

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(own == another for own, another in zip(self, other))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Records({len(self)} of {self._columns.prefix!r})"

    def taken(self, indices: Sequence[int]) -> Records:
        """The records of these indices, in their order."""
        rows = np.asarray(self._rows, np.int32)[np.asarray(indices, np.int64)]
        return Records(self._columns, rows, self._controls and self._controls.taken(indices))

    def with_controls(self, controls: Records) -> Records:
        """The same records with as many conditioning images."""
        return Records(self._columns, self._rows, controls)

    def sizes(self) -> np.ndarray:
        """The size of each, int32 `[N, 2]`."""
        return np.array(self._columns.edges, np.int32).reshape(-1, 2)[np.asarray(self._rows, np.int32)]

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each."""
        return map(self._columns.captions, map(int, self._rows))

    def files(self) -> Iterator[str]:
        """The path of each, as text."""
        return map(self._columns.file, map(int, self._rows))


def taken(records: Sequence[Record], indices: Sequence[int]) -> Sequence[Record]:
    """The records of these indices, in their order."""
    return records.taken(indices) if isinstance(records, Records) else tuple(records[i] for i in indices)


def with_controls(records: Sequence[Record], controls: Sequence[Record]) -> Sequence[Record]:
    """The same records with as many conditioning images."""
    if isinstance(records, Records) and isinstance(controls, Records):
        return records.with_controls(controls)
    return tuple(replace(record, control=control) for record, control in zip(records, controls))


def sizes(records: Sequence[Record]) -> np.ndarray:
    """The size of each, int32 `[N, 2]`."""
    if isinstance(records, Records):
        return records.sizes()
    return np.array([record.size for record in records], np.int32).reshape(-1, 2)


def captions(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """The captions of each."""
    return records.captions() if isinstance(records, Records) else (record.captions for record in records)


def files(records: Sequence[Record]) -> Iterator[str]:
    """The path of each, as text."""
    return records.files() if isinstance(records, Records) else (record.file for record in records)


class _Strings:
    """Strings of bytes, one after another."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._ends = array("q", [0])

    def add(self, string: bytes) -> None:
        self._content += string
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._content[self._ends[number] : self._ends[number + 1]])
