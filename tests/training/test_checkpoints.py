"""A checkpoint is whole or it is none: whatever kills a save, whatever happens to its files, a good one remains."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.files import DiskFull
from helpers.training import checkpoints
from helpers.training.checkpoints import CheckpointError

STATE = {
    "options": {"lora_rank": 4, "model_type": "deepfloyd-lora", "learning_rate": 1e-4},
    "data": {"dogs": "1a", "cats": "2b"},
    "run": {"step": 3, "rates": (1e-5, 0.1), "state": {0: {"exp_avg": torch.arange(4.0), "kahan": None}}, "empty": []},
}
FIXED = {"lora_rank": "other shapes", "model_type": "another stage"}


class Weights:
    """Saves weights below a folder of their own, as full tuning does."""

    def save_weights(self, unet, folder):
        (folder / "unet").mkdir()
        save_file({"weight": torch.full((256,), 7.0)}, folder / "unet" / "weights.safetensors")


def save(output: Path, step: int, keep: int = 0, state=STATE) -> Path:
    return checkpoints.save(output, step, Weights(), None, state, keep)


def test_state_comes_back_as_it_was(tmp_path):
    found = checkpoints.load_state(save(tmp_path, 3))
    assert found["options"] == STATE["options"]
    assert found["run"]["rates"] == (1e-5, 0.1) and isinstance(found["run"]["rates"], tuple)
    assert found["run"]["state"][0]["kahan"] is None
    assert torch.equal(found["run"]["state"][0]["exp_avg"], torch.arange(4.0))


def test_the_newest_ones_are_kept_in_order_of_steps_not_of_names(tmp_path):
    for step in (2, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert checkpoints.choose(tmp_path, "latest").name == "checkpoint-100"
    assert checkpoints.choose(tmp_path, "checkpoint-10").name == "checkpoint-10"


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(tmp_path):
    save(tmp_path, 5)
    (tmp_path / ".checkpoint-6.partial").mkdir()
    assert checkpoints.choose(tmp_path, "latest").name == "checkpoint-5"


def test_an_old_checkpoint_goes_only_when_the_new_one_is_there(tmp_path):
    save(tmp_path, 5, keep=1)
    unsaveable = {"run": object()}
    with pytest.raises(TypeError):
        save(tmp_path, 6, keep=1, state=unsaveable)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-5"]


def test_a_run_that_goes_back_keeps_the_later_checkpoints_aside_and_its_own_new_ones(tmp_path):
    for step in (100, 200, 1000):
        save(tmp_path, step)
    moved = checkpoints.set_aside_later(tmp_path, tmp_path / "checkpoint-100")
    assert [path.relative_to(tmp_path).as_posix() for path in moved] == [
        "abandoned/checkpoint-200",
        "abandoned/checkpoint-1000",
    ]
    assert save(tmp_path, 200, keep=1).exists()
    assert checkpoints.choose(tmp_path, "latest").name == "checkpoint-200"
    save(tmp_path, 300)
    again = checkpoints.set_aside_later(tmp_path, tmp_path / "checkpoint-200")
    assert [path.name for path in again] == ["checkpoint-300"]
    save(tmp_path, 300)
    assert [path.name for path in checkpoints.set_aside_later(tmp_path, tmp_path / "checkpoint-200")] == [
        "checkpoint-300-1"
    ]


def test_what_an_interrupted_save_left_is_swept_away(tmp_path):
    (tmp_path / ".checkpoint-4.partial").mkdir(parents=True)
    save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_what_cannot_be_deleted_is_told_and_ends_nothing(tmp_path, monkeypatch, capsys):
    """As on a network disk where another process still reads it."""

    def busy(path: str, **_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    save(tmp_path, 5)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        for step in (6, 7):
            save(tmp_path, step, keep=1)
            assert [path.name for path in checkpoints.found(tmp_path)] == [f"checkpoint-{step}"]
    assert ".checkpoint-5.partial cannot be deleted (Device or resource busy)" in capsys.readouterr().out
    save(tmp_path, 8, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_an_output_folder_has_one_run_at_a_time(tmp_path):
    output = tmp_path / "runs" / "mine"
    with checkpoints.only_run_in(output):
        with pytest.raises(CheckpointError, match="OUTPUT_DIR.*another run is at work in .*mine"):
            with checkpoints.only_run_in(output):
                raise AssertionError("it began")
        assert output.is_dir()
    assert not output.exists(), "nothing came to be in it"
    with checkpoints.only_run_in(output):
        save(output, 1)
    holding = os.fork()
    if holding == 0:
        with checkpoints.only_run_in(output):
            (tmp_path / "held").touch()
            signal.pause()
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with pytest.raises(CheckpointError), checkpoints.only_run_in(output):
            raise AssertionError("it began")
    finally:
        os.kill(holding, signal.SIGKILL)
        os.waitpid(holding, 0)
    with checkpoints.only_run_in(output):
        assert checkpoints.choose(output, "latest").name == "checkpoint-1"


@pytest.mark.parametrize("spoil", ["no state", "damaged state", "nested state", "no tensors", "no identity"])
def test_a_checkpoint_of_another_trainer_is_refused_in_words(tmp_path, spoil):
    folder = save(tmp_path, 5)
    if spoil == "no state":
        (folder / checkpoints.STATE).unlink()
    elif spoil == "damaged state":
        (folder / checkpoints.STATE).write_text("{")
    elif spoil == "nested state":
        (folder / checkpoints.STATE).write_text("[" * 100_000)
    elif spoil == "no tensors":
        (folder / checkpoints.TENSORS).unlink()
    else:
        (folder / checkpoints.STATE).write_text('{"dict": []}')
    with pytest.raises(CheckpointError, match="OUTPUT_DIR"):
        checkpoints.changes(folder, STATE["options"], FIXED, STATE["data"])
        checkpoints.load_state(folder)


def test_starting_anew_over_checkpoints_is_refused_with_both_ways_out(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="RESUME_CHECKPOINT.*checkpoint-5.*latest.*OUTPUT_DIR"):
        checkpoints.choose(tmp_path, "none")
    with pytest.raises(CheckpointError, match="checkpoint-7.*It has: checkpoint-5"):
        checkpoints.choose(tmp_path, "checkpoint-7")


def test_without_checkpoints_latest_and_none_start_anew(tmp_path):
    assert checkpoints.choose(tmp_path / "absent", "latest") is None
    assert checkpoints.choose(tmp_path, "none") is None


def test_other_settings_are_refused_by_name_with_both_values_and_the_reason(tmp_path):
    folder = save(tmp_path, 5)
    assert checkpoints.changes(folder, STATE["options"], FIXED, STATE["data"]) == {}
    with pytest.raises(CheckpointError, match="--lora_rank .export LORA_RANK.* was 4 and is now 8: other shapes"):
        checkpoints.changes(folder, {**STATE["options"], "lora_rank": 8}, FIXED, STATE["data"])


def test_a_base_that_was_changed_in_its_place_is_refused(tmp_path):
    checkpoints.require_base(save(tmp_path, 5), "any, as it was not noted", "epsilon")
    folder = save(tmp_path, 6, state={**STATE, "base": "a1"})
    checkpoints.require_base(folder, "a1", "epsilon")
    with pytest.raises(CheckpointError, match="MODEL_NAME.* have changed since checkpoint-6"):
        checkpoints.require_base(folder, "b2", "epsilon")


def test_a_checkpoint_that_learned_another_prediction_is_refused(tmp_path):
    folder = save(tmp_path, 6, state={**STATE, "prediction": "v_prediction"})
    checkpoints.require_base(folder, "a1", "v_prediction")
    with pytest.raises(CheckpointError, match="PREDICTION_TYPE.*'epsilon', but checkpoint-6 learned to predict 'v_pred"):
        checkpoints.require_base(folder, "a1", "epsilon")


def test_settings_that_may_change_are_told_with_both_values(tmp_path):
    now = {**STATE["options"], "learning_rate": 5e-5}
    assert checkpoints.changes(save(tmp_path, 5), now, FIXED, STATE["data"]) == {"learning_rate": (1e-4, 5e-5)}


def test_an_option_that_a_checkpoint_does_not_know_yet_was_its_default(tmp_path):
    folder, fixed = save(tmp_path, 5), {**FIXED, "revision": "another base", "use_dora": "other shapes"}
    checkpoints.changes(folder, {**STATE["options"], "revision": None, "use_dora": False}, fixed, STATE["data"])
    with pytest.raises(CheckpointError, match="MODEL_REVISION.* was None and is now 'fp32'"):
        checkpoints.changes(folder, {**STATE["options"], "revision": "fp32"}, fixed, STATE["data"])


@pytest.mark.parametrize(
    "data, words",
    [
        ({"dogs": "1a"}, "'cats' is gone"),
        ({"dogs": "1a", "cats": "2b", "owls": "3c"}, "'owls' is new"),
        ({"dogs": "1a", "cats": "9z"}, "of dataset 'cats' changed"),
    ],
)
def test_other_data_is_refused_by_the_dataset(tmp_path, data, words):
    with pytest.raises(CheckpointError, match=words):
        checkpoints.changes(save(tmp_path, 5), STATE["options"], FIXED, data)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


FILES = ["manifest.json", "state.json", "state.safetensors", "unet/weights.safetensors"]


def test_the_manifest_lists_every_other_file(tmp_path):
    folder = save(tmp_path, 5)
    listed = json.loads((folder / checkpoints.MANIFEST).read_text())["files"]
    assert files_of(folder) == FILES and ["manifest.json", *sorted(listed)] == FILES
    assert all(entry["size"] == (folder / name).stat().st_size for name, entry in listed.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", [cut, flip_a_bit, Path.unlink, lambda path: path.write_bytes(b"")],
                         ids=["cut", "bit flipped", "gone", "empty"])
def test_a_damaged_checkpoint_is_named_and_skipped_but_not_deleted(tmp_path, capsys, name, spoil):
    whole, damaged = save(tmp_path, 5), save(tmp_path, 6)
    if name == "manifest.json" and spoil is cut:
        pytest.skip("its last byte is a line break, without which it says the same")
    spoil(damaged / name)
    content = {file: (damaged / file).read_bytes() for file in files_of(damaged)}
    assert checkpoints.choose(tmp_path, "latest") == whole
    words = capsys.readouterr().out
    assert "checkpoint-6 is damaged" in words and Path(name).name in words
    with pytest.raises(CheckpointError, match="checkpoint-6, which is damaged.*latest"):
        checkpoints.choose(tmp_path, "checkpoint-6")

    assert checkpoints.set_aside_later(tmp_path, whole) == [tmp_path / "damaged" / "checkpoint-6"]
    assert {file: (tmp_path / "damaged" / "checkpoint-6" / file).read_bytes() for file in content} == content
    assert checkpoints.choose(tmp_path, "latest") == whole
    assert checkpoints.damage(save(tmp_path, 6)) is None


def test_a_damaged_checkpoint_is_out_of_the_way_of_a_new_one_of_its_step(tmp_path):
    cut(save(tmp_path, 5) / "state.json")
    assert checkpoints.damage(save(tmp_path, 5)) is None
    assert checkpoints.damage(tmp_path / "damaged" / "checkpoint-5")


def test_a_checkpoint_under_another_name_is_none(tmp_path):
    save(tmp_path, 5).rename(tmp_path / "checkpoint-9")
    assert "step 5" in checkpoints.damage(tmp_path / "checkpoint-9")


def test_where_none_is_whole_nothing_starts_anew_in_silence(tmp_path):
    cut(save(tmp_path, 5) / "state.json")
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(CheckpointError, match="(?s)checkpoint-7: it has no manifest.json.*checkpoint-5: state.*anew"):
        checkpoints.choose(tmp_path, "latest")


def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path):
    save(tmp_path, 5)
    cut(save(tmp_path, 6) / "state.safetensors")
    save(tmp_path, 7, keep=2)
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-5", "checkpoint-7"]


def test_a_checkpoint_is_not_written_twice(tmp_path):
    folder = save(tmp_path, 5)
    written = (folder / "state.json").stat().st_mtime_ns
    assert save(tmp_path, 5) == folder and (folder / "state.json").stat().st_mtime_ns == written


TOUCHING = [(os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "rmdir"), (os, "unlink"), (Path, "open"),
            (checkpoints, "save_file")]
"""What a save changes the disk with: the process may be killed before and after each of them."""


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do some work in a child that is killed before its `number`th call of these; whether it came so far."""
    child = os.fork()
    if child == 0:
        left = iter(range(number, -1, -1))

        def counting(function: Callable) -> Callable:
            def counted(*arguments: object, **options: object) -> object:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return counted

        for owner, name in TOUCHING:
            setattr(owner, name, counting(getattr(owner, name)))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_all_of_a_checkpoint_is_flushed_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    """What a loss of power would show."""
    done: list[object] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), fsync(handle))[1])
    monkeypatch.setattr(os, "rename", lambda *paths: (done.append("rename"), rename(*paths))[1])
    folder = save(tmp_path, 5)
    before, after = done[: done.index("rename")], done[done.index("rename"):]
    assert {path.stat().st_ino for path in [folder, *folder.rglob("*")]} == set(before)
    assert after == ["rename", tmp_path.stat().st_ino]


def test_a_save_killed_anywhere_leaves_the_old_checkpoint_or_the_new_one(tmp_path, capsys):
    """Each time in a child process that is killed for good, once at every one of its steps on the disk."""
    number, newest = 0, set()
    while True:
        output = tmp_path / str(number)
        for step in (1, 2):
            save(output, step)
        was_killed = killed_at(number, lambda: save(output, 3, keep=2))
        latest = checkpoints.choose(output, "latest")
        assert latest.name in ("checkpoint-2", "checkpoint-3") and "damaged" not in capsys.readouterr().out
        assert torch.equal(checkpoints.load_state(latest)["run"]["state"][0]["exp_avg"], torch.arange(4.0))
        newest.add(latest.name)
        save(output, 3, keep=2)
        assert sorted(path.name for path in output.iterdir()) == ["checkpoint-2", "checkpoint-3"]
        if not was_killed:
            break
        shutil.rmtree(output)
        number += 1
    assert number > 20 and newest == {"checkpoint-2", "checkpoint-3"}


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder with room for 64 KB: a file system of its own where that may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def big(size: int) -> dict:
    return {**STATE, "run": {"moments": torch.zeros(size, dtype=torch.uint8)}}


@pytest.mark.parametrize("size", [20_000, 40_000, 100_000], ids=["manifest or so", "tensors", "more than the disk"])
def test_a_full_disk_keeps_what_was_saved_and_tells_how_much_is_missing(small_disk, size):
    save(small_disk, 1, state=big(1000))
    (small_disk / "others").write_bytes(bytes(24_576))
    unet = torch.nn.Linear(4, 4)
    with pytest.raises(DiskFull) as full:
        checkpoints.save(small_disk, 2, Weights(), unet, big(size), keep=1)
    free = shutil.disk_usage(small_disk).free
    for words in (f"checkpoint-2 of {size // 1000}", str(small_disk), f"{free:,} bytes are free"):
        assert words in str(full.value)
    if size > free:
        assert " are missing" in str(full.value)
    assert sorted(path.name for path in small_disk.iterdir()) == ["checkpoint-1", "others"]
    assert checkpoints.choose(small_disk, "latest").name == "checkpoint-1"
    (small_disk / "others").unlink()
    if size < 40_000:
        checkpoints.save(small_disk, 2, Weights(), unet, big(size), keep=1)
        assert [path.name for path in checkpoints.found(small_disk)] == ["checkpoint-2"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", ["fsync", "mkdir", "rename"])
def test_a_full_disk_or_quota_is_told_wherever_it_shows(tmp_path, monkeypatch, number, at):
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    save(tmp_path, 1)
    with monkeypatch.context() as patched, pytest.raises(DiskFull, match="checkpoint-2"):
        patched.setattr(os, at, full)
        checkpoints.save(tmp_path, 2, Weights(), torch.nn.Linear(4, 4), STATE, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
