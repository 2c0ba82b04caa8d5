"""A file is the old one or the new one, and any path can be shown."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.files import DiskFull, printable, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "report.json"
    for content in (b"first, and longer", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.json"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="No space left on device for report.json of 3 bytes in .* bytes are free"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_cannot_flush_folders_takes_files_and_one_that_fails_at_it_does_not(tmp_path, monkeypatch):
    def on_folders(number: int) -> Callable[[int], None]:
        def flush(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))

        return flush

    monkeypatch.setattr(os, "fsync", on_folders(errno.EINVAL))
    write_whole(tmp_path / "report.json", b"new")
    monkeypatch.setattr(os, "fsync", on_folders(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "report.json", b"newer")


@pytest.mark.parametrize(("name", "shown"), [
    (b"photo.jpg", "photo.jpg"), ("ä 猫.jpg".encode(), "ä 猫.jpg"), (b"caf\xe9.jpg", "caf\\xe9.jpg"),
])
def test_any_path_can_be_shown(name, shown):
    assert printable(Path(os.fsdecode(name))) == printable(os.fsdecode(name)) == shown
    json.dumps(shown, ensure_ascii=False).encode("utf-8")
