"""Records in columns are what they would be as objects, whatever their names and captions, and take little memory."""

import copy
import gc
import hashlib
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.data.records import Columns, Record, Records, captions, files, sizes, taken, with_controls
from helpers.sizes import Size

FOLDER = Path("/data/images")
NAMES = [b"a.jpg", b"sub/b c.png", b"caf\xe9.png", b"line\nbreak", "ü🦊.webp".encode(), b"-", b"..a"]
ODD = ("\udce9 is no UTF-8", "\ud83d\udd00 halves", "\xff\0")
CAPTIONS = [("a fox",), ("two\nlines", "and more"), (), ("",), ODD, ("same",), ("same",)]


def content(name: bytes) -> bytes:
    return hashlib.sha256(name).digest()


def made(folder: Path = FOLDER) -> tuple[Records, tuple[Record, ...]]:
    """The same images in columns and as objects."""
    columns, plain = Columns("set", folder), []
    for number, (name, texts) in enumerate(zip(NAMES, CAPTIONS)):
        size = Size(100 + number, 2**31 - 1 - number)
        columns.add(name, content(name), size, texts)
        plain.append(Record("set", folder / os.fsdecode(name), content(name).hex(), size, texts))
    return Records(columns), tuple(plain)


@pytest.mark.parametrize("folder", [FOLDER, Path("/"), Path("."), Path("here/and there")])
def test_columns_give_back_what_was_put_in(folder):
    records, plain = made(folder)
    assert tuple(records) == plain and records == plain and plain == records and len(records) == len(plain)
    assert [record.file for record in records] == list(files(records)) == [str(record.path) for record in plain]
    assert list(files(plain)) == list(files(records))
    assert list(captions(records)) == list(captions(plain)) == CAPTIONS
    np.testing.assert_array_equal(sizes(records), sizes(plain))


def test_they_are_a_sequence():
    records, plain = made()
    assert records[-1] == plain[-1] and records[2:5] == plain[2:5] and records[::-1] == plain[::-1]
    assert records[np.int64(1)] == plain[1] and plain[3] in records
    for index in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            records[index]
    order = [4, 0, 4, 2]
    assert taken(records, order) == taken(plain, order) == tuple(plain[i] for i in order)
    assert taken(taken(records, order), [3, 1]) == (plain[2], plain[0])
    assert records != plain[1:] and records[1:] != plain[:-1] and not records[:0]
    np.testing.assert_array_equal(sizes(records[5:1:-2]), sizes(plain[5:1:-2]))


def test_a_record_of_a_row_is_one_like_any_other():
    records, plain = made()
    assert hash(records[1]) == hash(plain[1]) and repr(records[1]) == repr(plain[1])
    assert replace(records[1], path=Path("/x")) == replace(plain[1], path=Path("/x"))
    assert replace(records[1], path=Path("/x")).file == "/x"
    assert copy.copy(records[1]) == copy.deepcopy(records[1]) == plain[1]
    with pytest.raises(AttributeError, match="'nothing'"):
        records[1].nothing


def test_records_keep_their_conditioning_images_wherever_they_go():
    records, plain = made()
    paired, expected = with_controls(records, records[::-1]), with_controls(plain, plain[::-1])
    assert paired == expected and paired[0].control == plain[-1]
    assert taken(paired, [5, 1]) == taken(expected, [5, 1]) and records[0].control is None


def test_an_image_takes_less_than_a_hundred_bytes_besides_its_name_and_captions():
    def memory(count: int, prompt: str | None) -> float:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        columns = Columns("set", FOLDER)
        for number in range(count):
            columns.add(b"%06d.jpg" % number, bytes(32), Size(640, 480), (prompt or f"caption {number:06}",))
        records = Records(columns)
        return (tracemalloc.get_traced_memory()[0] - before) / len(records)

    tracemalloc.start()
    try:
        assert memory(20_000, "an instance prompt that all of them have") < 80
        assert memory(20_000, None) < 110
    finally:
        tracemalloc.stop()
