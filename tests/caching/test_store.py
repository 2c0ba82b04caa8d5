"""Records come back bit for bit; what a crash, a bad disk or another recipe left is never read."""

import fcntl
import gc
import hashlib
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from helpers.caching import store as store_module
from helpers.caching.store import DamagedShard, ShardStore

RECIPE = {"kind": "test"}


def key(number: int) -> str:
    return f"{number:032x}"


def record(number: int, shape: tuple[int, ...] = (5, 7, 3)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def filled(folder: Path, numbers: range) -> ShardStore:
    store = ShardStore(folder, RECIPE)
    with store.writer() as writer:
        for number in numbers:
            writer.add(key(number), record(number))
    return store


def read(store: ShardStore, number: int) -> np.ndarray:
    [stored] = store.records([key(number)])
    return stored.content.reshape(stored.shape)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_records_of_any_shape_and_dtype_come_back_exactly_at_once_and_after_reopening(tmp_path):
    shapes = {1: (5, 7, 3), 2: (1, 1, 3), 3: (64, 9, 3)}
    floats = torch.randn(77, 8).bfloat16()
    store = ShardStore(tmp_path, RECIPE)
    with store.writer() as writer:
        for number, shape in shapes.items():
            writer.add(key(number), record(number, shape))
        writer.add(key(4), floats)
    for opened in (store, ShardStore(tmp_path, RECIPE)):
        assert len(opened) == 4 and key(1) in opened and key(9) not in opened
        for number, shape in shapes.items():
            np.testing.assert_array_equal(read(opened, number), record(number, shape))
        assert bytes(opened.records([key(4)])[0].content) == floats.view(torch.uint8).numpy().tobytes()


def test_records_come_in_the_order_of_their_keys_and_cannot_be_written_to(tmp_path):
    store = filled(tmp_path, range(3))
    for stored, number in zip(store.records([key(2), key(0), key(2)]), (2, 0, 2)):
        np.testing.assert_array_equal(stored.content.reshape(stored.shape), record(number))
        with pytest.raises(ValueError, match="read-only"):
            stored.content[0] = 0
    with pytest.raises(KeyError, match=key(9)):
        store.records([key(1), key(9)])


def test_a_shard_cut_after_it_was_verified_is_an_error(tmp_path):
    filled(tmp_path, range(3))
    store = ShardStore(tmp_path, RECIPE)
    os.truncate(shards(tmp_path)[0], 200)
    with pytest.raises(DamagedShard, match="became shorter"):
        store.records([key(number) for number in range(3)])


def test_a_writer_takes_copies(tmp_path):
    store = ShardStore(tmp_path, RECIPE)
    reused = record(1)
    with store.writer() as writer:
        writer.add(key(1), reused)
        reused[:] = 0
    np.testing.assert_array_equal(read(store, 1), record(1))


@pytest.mark.parametrize(("limit", "value", "expected"), [("SHARD_RECORDS", 4, 3), ("SHARD_BYTES", 5 * 7 * 3 * 5, 2)])
def test_shards_are_bounded_by_records_and_by_bytes(tmp_path, monkeypatch, limit, value, expected):
    monkeypatch.setattr(store_module, limit, value)
    store = filled(tmp_path, range(10))
    assert len(shards(tmp_path)) == expected
    assert all(np.array_equal(read(store, number), record(number)) for number in range(10))


def test_a_store_grows_by_shards_and_keeps_a_key_once(tmp_path):
    filled(tmp_path, range(3))
    first = shards(tmp_path)
    store = filled(tmp_path, range(5))
    assert len(store) == 5 and set(first) < set(shards(tmp_path)) and len(shards(tmp_path)) == 2


def test_two_writers_at_once_lose_nothing(tmp_path):
    one, two = ShardStore(tmp_path, RECIPE), ShardStore(tmp_path, RECIPE)
    with one.writer() as first, two.writer() as second:
        for number in range(6):
            first.add(key(number), record(number))
            second.add(key(number + 3), record(number + 3))
    store = ShardStore(tmp_path, RECIPE)
    assert len(store) == 9 and all(np.array_equal(read(store, number), record(number)) for number in range(9))


def test_equal_content_makes_one_shard(tmp_path):
    one, two = ShardStore(tmp_path, RECIPE), ShardStore(tmp_path, RECIPE)
    for store in (one, two):
        with store.writer() as writer:
            writer.add(key(1), record(1))
    assert len(shards(tmp_path)) == 1


def test_shards_are_plain_safetensors_that_tell_format_and_recipe(tmp_path):
    filled(tmp_path, range(2))
    with safe_open(shards(tmp_path)[0], "np") as file:
        assert json.loads(file.metadata()["floydtuner"]) == {"format": store_module.FORMAT, "recipe": RECIPE}
        np.testing.assert_array_equal(file.get_tensor(key(1)), record(1))


DAMAGE = {
    "a flipped byte in the data": lambda path: overwrite(path, path.stat().st_size - 5, b"\x99\x98"),
    "a flipped byte in the header": lambda path: overwrite(path, 12, b"\xff"),
    "a cut end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a cut to nothing": lambda path: os.truncate(path, 0),
    "a wrong header length": lambda path: overwrite(path, 0, b"\xff" * 8),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_shard_is_named_and_its_records_are_made_again(tmp_path, damage):
    filled(tmp_path, range(3))
    [bad] = shards(tmp_path)
    filled(tmp_path, range(5))
    damage(bad)
    store = ShardStore(tmp_path, RECIPE)
    assert store.damaged == (bad,) and bad.name in store.damage()
    assert [number for number in range(5) if key(number) in store] == [3, 4]
    with store.writer() as writer:
        for number in range(5):
            writer.add(key(number), record(number))
    again = ShardStore(tmp_path, RECIPE)
    assert again.damaged == () and len(again) == 5
    assert all(np.array_equal(read(again, number), record(number)) for number in range(5))


NO_SHARDS = {
    "nothing": lambda shard: b"",
    "a page": lambda shard: b"<html>not found</html>",
    "a length beyond the end": lambda shard: b"\xff" * 8 + b"{}",
    "ten thousand levels": lambda shard: (10_000).to_bytes(8, "little") + b"[" * 10_000,
    "a list": lambda shard: (2).to_bytes(8, "little") + b"[]",
    "records beyond the end": lambda shard: shard[:-1],
    "a record that has no place": lambda shard: shard.replace(b'"data_offsets"', b'"data_offzets"'),
}


@pytest.mark.parametrize("content", NO_SHARDS.values(), ids=NO_SHARDS.keys())
def test_a_file_that_is_no_shard_under_the_name_of_its_hash_counts_as_damaged(tmp_path, content):
    filled(tmp_path, range(3))
    [shard] = shards(tmp_path)
    bad = content(shard.read_bytes())
    path = tmp_path / f"{hashlib.sha256(bad).hexdigest()[:40]}.safetensors"
    path.write_bytes(bad)
    store = ShardStore(tmp_path, RECIPE)
    assert store.damaged == (path,) and len(store) == 3 and not store.damaged_keys() - {key(0), key(1), key(2)}


def test_a_damaged_shard_stays_until_its_records_were_made_again(tmp_path):
    filled(tmp_path, range(3))
    [bad] = shards(tmp_path)
    os.truncate(bad, 100)
    with pytest.raises(RuntimeError), ShardStore(tmp_path, RECIPE).writer():
        raise RuntimeError
    assert ShardStore(tmp_path, RECIPE).damaged == (bad,)


def test_a_shard_that_another_run_made_again_is_not_deleted_for_having_been_damaged(tmp_path):
    filled(tmp_path, range(3))
    [bad] = shards(tmp_path)
    os.truncate(bad, bad.stat().st_size - 1)
    one, two = ShardStore(tmp_path, RECIPE), ShardStore(tmp_path, RECIPE)
    with one.writer() as writer:
        for number in range(3):
            writer.add(key(number), record(number))
    with two.writer() as writer:  # it needs something else, and deletes what it found damaged
        writer.add(key(7), record(7))
    assert bad.exists()
    np.testing.assert_array_equal(read(one, 1), record(1))
    again = ShardStore(tmp_path, RECIPE)
    assert again.damaged == () and len(again) == 4


def test_no_damaged_shard_is_deleted_while_another_run_publishes(tmp_path):
    filled(tmp_path, range(3))
    [bad] = shards(tmp_path)
    os.truncate(bad, 100)
    store = ShardStore(tmp_path, RECIPE)
    with store_module.locked(tmp_path, fcntl.LOCK_SH) as locked:
        assert locked
        store.drop_damaged()
        assert bad.exists()
    store = ShardStore(tmp_path, RECIPE)
    store.drop_damaged()
    assert not bad.exists() and ShardStore(tmp_path, RECIPE).damaged == ()


def test_a_damaged_shard_that_another_run_deletes_meanwhile_is_not_missed(tmp_path, monkeypatch):
    filled(tmp_path, range(3))
    [bad] = shards(tmp_path)
    os.truncate(bad, 100)
    checksum = store_module._checksum

    def delete_first(path: Path) -> str:
        path.unlink()
        return checksum(path)

    monkeypatch.setattr(store_module, "_checksum", delete_first)
    store = ShardStore(tmp_path, RECIPE)
    assert store.damaged == () and len(store) == 0


def test_the_keys_of_a_damaged_shard_are_known_as_far_as_its_header_is_whole(tmp_path):
    filled(tmp_path, range(3))
    [shard] = shards(tmp_path)
    whole = shard.read_bytes()
    for damage, count in {"a cut end": 3, "a cut to nothing": 0, "a wrong header length": 0}.items():
        shard.write_bytes(whole)
        DAMAGE[damage](shard)
        assert len(ShardStore(tmp_path, RECIPE).damaged_keys()) == count


@pytest.mark.parametrize("change", ["recipe", "format"])
def test_shards_of_another_recipe_or_format_are_not_read(tmp_path, monkeypatch, change):
    filled(tmp_path, range(3))
    if change == "format":
        monkeypatch.setattr(store_module, "FORMAT", "shards-0")
    store = ShardStore(tmp_path, RECIPE if change == "format" else {"kind": "another"})
    assert len(store) == 0 and store.foreign == tuple(shards(tmp_path)) and store.damaged == ()
    with store.writer() as writer:
        writer.add(key(0), record(8))
    monkeypatch.undo()
    np.testing.assert_array_equal(read(ShardStore(tmp_path, RECIPE), 0), record(0))


def test_a_writer_killed_while_it_writes_leaves_no_shard_and_no_harm(tmp_path):
    script = (
        "import os, sys, numpy as np; from pathlib import Path; from helpers.caching.store import ShardStore\n"
        "os.fsync = lambda file: os._exit(9)\n"  # the power fails when the bytes are written but not yet published
        "with ShardStore(Path(sys.argv[1]), {'kind': 'test'}).writer() as writer:\n"
        "    writer.add('0' * 32, np.zeros((9, 9, 3), np.uint8))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path], cwd=Path(__file__).parents[2]).returncode == 9
    assert shards(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1
    store = filled(tmp_path, range(3))
    assert len(store) == 3 and store.damaged == ()


def test_only_old_partial_files_of_ours_are_deleted(tmp_path):
    fresh, stale = tmp_path / ".floydtuner-1-ab.partial", tmp_path / ".floydtuner-2-cd.partial"
    foreign = tmp_path / "notes.partial"
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (fresh, stale, foreign):
        path.write_bytes(b"x")
    for path in (stale, foreign):
        os.utime(path, (two_days_ago, two_days_ago))
    ShardStore(tmp_path, RECIPE)
    assert fresh.exists() and foreign.exists() and not stale.exists()


def test_an_error_keeps_what_was_added_before_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardStore(tmp_path, RECIPE).writer() as writer:
        writer.add(key(1), record(1))
        raise KeyboardInterrupt
    assert key(1) in ShardStore(tmp_path, RECIPE)


def test_a_full_disk_is_an_error_and_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path, range(2))
    assert list(tmp_path.iterdir()) == []


def test_more_shards_than_files_may_be_open_are_read_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_RECORDS", 1)
    monkeypatch.setattr(store_module, "_OPEN_FILES", 3)
    filled(tmp_path, range(8))
    gc.collect()
    before = open_files()
    store = ShardStore(tmp_path, RECIPE)
    assert all(np.array_equal(read(store, number), record(number)) for number in range(8))
    assert open_files() <= before + 3
    del store
    assert open_files() == before


@pytest.mark.parametrize("bad", ["", "name of a file", "../escape", "ABCDEF00"])
def test_keys_are_hex_hashes(tmp_path, bad):
    with ShardStore(tmp_path, RECIPE).writer() as writer, pytest.raises(ValueError, match="hex key"):
        writer.add(bad, record(0))


@pytest.mark.parametrize(("memory", "times"), [(10**12, 1), (1000, 3)], ids=["stays in memory", "larger than memory"])
def test_records_are_announced_once_where_they_stay_in_memory_and_else_each_time(tmp_path, monkeypatch, memory, times):
    class Map(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            announced.append(arguments)

    announced: list[tuple[int, ...]] = []
    store = filled(tmp_path, range(3))
    monkeypatch.setattr(store_module, "_memory", lambda: memory)
    monkeypatch.setattr(mmap, "mmap", Map)
    for _ in range(3):
        store.records([key(0), key(1)])
    assert len(announced) == 2 * times
