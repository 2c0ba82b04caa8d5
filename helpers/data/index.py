"""What is known of the files of a dataset folder, in memory and as the index that the next scan reads."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import PIL

from helpers.data.records import HASH_BYTES
from helpers.files import write_whole
from helpers.sizes import Size

HEADER = {"index": 3, "pillow": PIL.__version__}
"""First line of an index. Another version of Pillow may read other files, so its index is made anew."""

PART = 1 << 20
"""Bytes of an index that are parsed at a time: one call for many lines takes a third of a call for each."""


class State(NamedTuple):
    """What the file system tells of a file: where that is the same, so is the content."""

    bytes: int
    mtime_ns: int
    ctime_ns: int  # moves with every change of the content, also where a program sets the time of change back


class Entry(NamedTuple):
    """What opening a file told. `reason` is None for a readable image, "" for no image.

    What `may_pass`, as a disk may be well again, is not kept for the next scan.
    """

    content: str = ""
    width: int = 0
    height: int = 0
    has_more_frames: bool = False
    reason: str | None = None
    may_pass: bool = False


class Files:
    """The files of a folder that may be images, sorted by the bytes of their relative paths, and what they are.

    They are numbers into columns, since a million of them as objects would take gigabytes. What most files do not have
    is kept by number.
    """

    def __init__(self, folder: Path, found: Iterable[tuple[bytes, State]]) -> None:
        names, states = [], array("q")
        for name, state in found:
            names.append(name)
            states.extend(state)
        order = sorted(range(len(names)), key=names.__getitem__)
        self.folder = folder
        self.names = [names[number] for number in order]
        self._states = array("q")
        for number in order:
            self._states += states[3 * number : 3 * number + 3]
        self._is_known = bytearray(len(names))
        self._contents = bytearray(HASH_BYTES * len(names))
        self._sizes = array("i", bytes(2 * 4 * len(names)))
        self._reasons: dict[int, str] = {}
        self._may_pass: set[int] = set()
        self._has_more_frames: set[int] = set()

    def __len__(self) -> int:
        return len(self.names)

    def file(self, number: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.names[number]))

    def path(self, number: int) -> Path:
        return Path(self.file(number))

    def state(self, number: int) -> State:
        return State(*self._states[3 * number : 3 * number + 3])

    def unknown(self) -> list[int]:
        """The files that have to be opened."""
        return [number for number, is_known in enumerate(self._is_known) if not is_known]

    def learn(self, number: int, entry: Entry) -> None:
        """Take up what opening a file told.

        Raises:
            ValueError: the content of an image is not 32 bytes in hex.
            OverflowError: an edge of it is longer than that of any image.
        """
        if entry.reason is not None:
            self._reasons[number] = entry.reason
        else:
            content = bytes.fromhex(entry.content)
            if len(content) != HASH_BYTES:
                raise ValueError(f"{entry.content!r} is no SHA-256")
            self._sizes[2 * number], self._sizes[2 * number + 1] = entry.width, entry.height
            self._contents[HASH_BYTES * number : HASH_BYTES * (number + 1)] = content
        if entry.has_more_frames:
            self._has_more_frames.add(number)
        if entry.may_pass:
            self._may_pass.add(number)
        self._is_known[number] = True

    def reason(self, number: int) -> str | None:
        """Why a file that was opened cannot be used, as in `Entry`."""
        return self._reasons.get(number)

    def image(self, number: int) -> tuple[bytes, Size]:
        """The SHA-256 and the size of an image that was opened."""
        content = bytes(self._contents[HASH_BYTES * number : HASH_BYTES * (number + 1)])
        return content, Size(self._sizes[2 * number], self._sizes[2 * number + 1])

    def with_more_frames(self) -> list[Path]:
        """The images that are animations or have several pages, in order."""
        return [self.path(number) for number in sorted(self._has_more_frames)]

    def lines(self, numbers: Iterable[int]) -> bytearray:
        """What the index says of files that were opened."""
        content = bytearray()
        for number in numbers:
            if self._is_known[number] and number not in self._may_pass:
                (hash_, size), reason = self.image(number), self.reason(number)
                told = hash_.hex() if reason is None else "", *size, number in self._has_more_frames, reason
                line = json.dumps([os.fsdecode(self.names[number]), *self.state(number), *told])
                content += line.encode("ascii") + b"\n"
        return content

    def recall(self, path: Path) -> Recalled:
        """Take up what an index says of the files that are as they were."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return Recalled(False, False)
        with file:
            if list(_parsed([file.readline()])) != [HEADER]:
                return Recalled(False, False)
            numbers, has_others = {name: number for number, name in enumerate(self.names)}, False
            while lines := file.readlines(PART):
                for row in _parsed(lines):
                    has_others |= not self._recall(row, numbers)
        return Recalled(True, has_others)

    def _recall(self, row: object, numbers: dict[bytes, int]) -> bool:
        """Whether a line of an index says what was not known of a file that is as it was."""
        match row:
            case [
                str() as name, int() as size, int() as mtime_ns, int() as ctime_ns,
                str() as content, int() as width, int() as height, bool() as more, None | str() as reason,
            ]:  # fmt: skip
                try:
                    number = numbers.get(os.fsencode(name))
                    if number is None or self._is_known[number] or self.state(number) != (size, mtime_ns, ctime_ns):
                        return False
                    self.learn(number, Entry(content, width, height, more, reason))
                except (ValueError, OverflowError):
                    return False
                return True
        return False

    def write(self, path: Path) -> None:
        """Make the index anew, of all files that are known."""
        write_whole(path, _header() + self.lines(range(len(self))))


class Recalled(NamedTuple):
    """Whether there is an index of this version, and whether it says anything besides what is taken up."""

    is_there: bool
    has_others: bool


def begin(path: Path) -> None:
    """Make an index without any file."""
    write_whole(path, _header())


def _header() -> bytes:
    return (json.dumps(HEADER) + "\n").encode("ascii")


def _parsed(lines: Sequence[bytes]) -> Iterator[object]:
    """The values of lines of JSON, but for those that are broken."""
    try:
        yield from json.loads(b"[" + b",".join(line for line in lines if not line.isspace()) + b"]")
    except (ValueError, RecursionError):
        if len(lines) > 1:
            for line in lines:
                yield from _parsed([line])
