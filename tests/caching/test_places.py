"""Where records are, in few bytes."""

import gc
import hashlib
import tracemalloc
from pathlib import Path

from helpers.caching.places import Place, Places


def key(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def place(number: int) -> Place:
    return Place(Path(f"/cache/{number // 1000}"), 2**40 + number, 12 + number % 3, (2, 2, 3 + number % 3))


def test_each_key_has_its_first_place_in_the_order_in_which_they_came():
    places, expected = Places(), {}
    for number in [*range(3000), *range(10), *range(5000, 2990, -1)]:
        places.add(key(number), place(2 * number))
        expected.setdefault(key(number), place(2 * number))
        places.add(key(number), place(1))
    assert list(places) == list(expected) and len(places) == len(expected)
    assert [places.find(one) for one in expected] == list(range(len(expected)))
    assert [places[number] for number in range(len(places))] == list(expected.values())
    assert all(places.find(key(number)) is None for number in range(6000, 7000))
    assert set(places.shards) == {one.shard for one in expected.values()}


def test_keys_that_follow_each_other_are_all_found():
    places = Places()
    for number in range(20_000):
        places.add(f"{number:032x}", place(number))
    assert all(places.find(f"{number:032x}") == number for number in range(20_000))


def test_a_record_takes_less_than_sixty_bytes():
    gc.collect()
    tracemalloc.start()
    try:
        places = Places()
        for number in range(20_000):
            places.add(key(number), place(number))
        assert tracemalloc.get_traced_memory()[0] / len(places) < 60
    finally:
        tracemalloc.stop()
