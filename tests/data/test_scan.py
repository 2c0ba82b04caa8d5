"""Finding the images of a folder: nothing is lost in silence, and nothing is opened twice."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import unicodedata
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from helpers.data import scan as module
from helpers.data.scan import Captions, DatasetError, LeftOut, Scan, scan, write_left_out
from helpers.files import printable
from helpers.images import loading
from helpers.sizes import Size

BY_NAME = Captions("filename")
BY_TEXT = Captions("textfile")


def picture(path: Path, size: tuple[int, int] = (30, 20), form: str = "PNG", colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        Image.new("RGB", size, colour).save(stream, form)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "index.jsonl"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that a scan opens."""
    names, inspect = [], module.inspect
    monkeypatch.setattr(module, "inspect", lambda path: (names.append(path.name), inspect(path))[1])
    return names


def used(result: Scan, folder: Path) -> list[str]:
    return [str(record.path.relative_to(folder)) for record in result.records]


def reasons(result: Scan, folder: Path) -> dict[str, str]:
    return {str(item.path.relative_to(folder)): item.reason for item in result.left_out}


def test_a_record_tells_what_training_needs(folder: Path, index: Path) -> None:
    path = picture(folder / "sub" / "a_red_fox.png", (30, 20))
    assert scan("foxes", folder, index, BY_NAME).records == (
        module.Record("foxes", path, hashlib.sha256(path.read_bytes()).hexdigest(), Size(30, 20), ("a red fox",)),
    )


def test_images_of_every_kind_of_name_and_depth_are_found(folder: Path, index: Path) -> None:
    names = [
        "a.jpg",
        "B.JPEG",
        "c.PnG",
        "d.webp",
        "e.bmp",
        "f.tif",
        "g.tiff",
        "h.gif",
        "i.avif",
        "no suffix",
        "wrong.dat",
        "v1.5 model",
        "sub/deep/er/j.png",
        "sub.png/k.png",
    ]
    for name in names:
        picture(folder / name)
    result = scan("all", folder, index, BY_NAME)
    assert sorted(used(result, folder)) == sorted(names) and result.left_out == ()


def test_the_order_is_that_of_the_bytes_of_the_relative_paths(folder: Path, index: Path, tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a.png", "B.png", "ä.png", "a b.png", "10.png", "9.png"]
    for name in names:
        picture(folder / name)
    first = used(scan("all", folder, index, BY_NAME), folder)
    assert first == sorted(names, key=os.fsencode)
    for name in reversed(names):
        picture(tmp_path / "again" / name)
    assert used(scan("all", tmp_path / "again", index.with_name("other"), BY_NAME), tmp_path / "again") == first


@pytest.mark.parametrize(
    "name",
    [
        b"line\nbreak.png",
        b"'single' \"double\".png",
        b"[1]*?.png",
        b"-rf.png",
        b"--help",
        "🦊 fuchs.png".encode(),
        unicodedata.normalize("NFC", "ä.png").encode(),
        unicodedata.normalize("NFD", "ä.png").encode(),
        b"$HOME `id`;.png",
        b"back\\slash.png",
        b" leading and trailing ",
        b"%s{0}.png",
    ],
)
def test_any_name_is_found_remembered_and_reported(
    folder: Path, index: Path, opened: list, tmp_path: Path, name: bytes
) -> None:
    path = picture(Path(os.fsdecode(os.fsencode(folder) + b"/" + name)))
    for _ in range(2):
        assert [record.path for record in scan("odd", folder, index, BY_NAME).records] == [path]
    assert len(opened) == 1
    write_left_out(tmp_path / "left_out.json", {"odd": [LeftOut(path, "a test")]})
    report = json.loads((tmp_path / "left_out.json").read_text(encoding="utf-8"))
    assert report == {"odd": [{"path": printable(path), "reason": "a test"}]}


def test_names_that_are_not_utf8_work_with_text_files_and_are_reported_readably(
    folder: Path, index: Path, opened: list, tmp_path: Path
) -> None:
    path = picture(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")))
    path.with_suffix(".txt").write_text("a café")
    for _ in range(2):
        (record,) = scan("odd", folder, index, BY_TEXT).records
        assert record.path == path and record.captions == ("a café",)
    assert opened == [path.name]
    picture(folder / "plain.png")
    result = scan("odd", folder, index, BY_NAME)
    assert [item.reason for item in result.left_out] == ["no caption: its name is not UTF-8, so it cannot be a caption"]
    path.with_suffix(".txt").unlink()
    (folder / "plain.txt").write_text("plain")
    left_out = result.left_out + scan("odd", folder, index, BY_TEXT).left_out
    write_left_out(tmp_path / "left_out.json", {"odd": left_out})
    report = json.loads((tmp_path / "left_out.json").read_text(encoding="utf-8"))["odd"]
    assert [item["path"].removeprefix(str(folder)) for item in report] == ["/caf\\xe9.png"] * 2
    assert report[1]["reason"] == "no caption: there is no caf\\xe9.txt"


def test_both_normal_forms_of_one_name_are_two_images(folder: Path, index: Path) -> None:
    for form in ("NFC", "NFD"):
        picture(folder / unicodedata.normalize(form, "ä.png"))
    assert len(scan("odd", folder, index, BY_NAME).records) == 2


def test_hidden_files_and_those_of_file_managers_are_no_images(folder: Path, index: Path) -> None:
    for name in ("a.png", "._a.png", ".hidden.jpg", ".cache/b.png", "__MACOSX/c.png", "@eaDir/d.png", "Thumbs.db"):
        picture(folder / name)
    result = scan("one", folder, index, BY_NAME)
    assert used(result, folder) == ["a.png"] and result.found == 1


def test_companions_are_neither_opened_nor_counted(folder: Path, index: Path, opened: list) -> None:
    picture(folder / "a.png")
    for name in ("a.txt", "a.json", "a.caption", "a.npz", "meta.csv", "movie.MP4"):
        (folder / name).write_text("x")
    (folder / "LICENSE").write_text("no image, and not meant as one")
    result = scan("one", folder, index, BY_NAME)
    assert (result.found, result.left_out) == (1, ())
    assert sorted(opened) == ["LICENSE", "a.png"]
    scan("one", folder, index, BY_NAME)
    assert len(opened) == 2


def test_what_is_meant_as_an_image_and_cannot_be_used_is_left_out_with_the_reason(folder: Path, index: Path) -> None:
    picture(folder / "good.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<!doctype html><html></html>")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "no_suffix_heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:20])
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "folder.jpg").mkdir()
    result = scan("odd", folder, index, BY_NAME)
    words = {
        "empty.jpg": "empty",
        "page.jpg": "web page",
        "phone.HEIC": "HEIC",
        "no_suffix_heic": "HEIC",
        "drawing.svg": "SVG",
        "cut.png": "damaged",
        "pipe.jpg": "not a regular file",
        "gone.jpg": "No such file",
        "circle.jpg": "symbolic links",
    }
    found = reasons(result, folder)
    assert found.keys() == words.keys()
    assert all(word in found[name] for name, word in words.items())
    assert used(result, folder) == ["good.png"]
    assert result.found == len(result.records) + len(result.left_out) == 10


def test_a_socket_does_not_stop_a_scan(folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(folder / "a.png")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
        assert reasons(scan("odd", folder, index, BY_NAME), folder) == {"socket.png": "is not a regular file"}


def test_linked_folders_are_followed_once_and_loops_end(folder: Path, index: Path, tmp_path: Path) -> None:
    picture(folder / "real" / "a.png")
    picture(tmp_path / "outside" / "b.png")
    for name in ("aaa", "zzz"):
        (folder / name).symlink_to("real")
    (folder / "real" / "up").symlink_to("..")
    (folder / "outside").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(folder)
    (folder / "dangling").symlink_to("nowhere")
    result = scan("links", folder, index, BY_NAME)
    assert used(result, folder) == ["outside/b.png", "real/a.png"] and result.left_out == ()


def test_a_linked_image_is_an_image(folder: Path, index: Path, tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.png")
    (folder / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert used(scan("links", folder, index, BY_NAME), folder) == ["b.png"]


def test_a_folder_that_cannot_be_read_is_reported(folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read every folder, so the refusal of the operating system is played here."""
    picture(folder / "a.png")
    picture(folder / "locked" / "b.png")
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(module.os, "scandir", guarded)
    result = scan("locked", folder, index, BY_NAME)
    assert used(result, folder) == ["a.png"]
    assert reasons(result, folder) == {"locked": "folder cannot be read: Permission denied"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_real_locked_folders_and_files_are_reported(folder: Path, index: Path) -> None:
    picture(folder / "a.png")
    picture(folder / "locked" / "b.png").parent.chmod(0)
    picture(folder / "c.png").chmod(0)
    found = reasons(scan("locked", folder, index, BY_NAME), folder)
    (folder / "locked").chmod(0o700)
    assert found.keys() == {"locked", "c.png"} and all("Permission denied" in reason for reason in found.values())


def test_animations_are_used_and_mentioned(folder: Path, index: Path) -> None:
    picture(folder / "still.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    for _ in range(2):
        result = scan("some", folder, index, BY_NAME)
        assert len(result.records) == 2
        (note,) = result.notes
        assert note.startswith("1 images") and "moving.gif" in note and "first" in note


# --- The index


def test_a_second_scan_opens_no_image_and_finds_the_same(folder: Path, index: Path, opened: list) -> None:
    for number in range(5):
        picture(folder / f"image_{number}.png", (20 + number, 20))
    (folder / "bad.jpg").write_text("<html>")
    first = scan("images", folder, index, BY_NAME)
    before = index.read_bytes()
    assert scan("images", folder, index, BY_NAME) == first
    assert len(opened) == 6 and index.read_bytes() == before


def test_an_image_that_is_edited_in_place_is_opened_again_even_if_size_and_time_are_kept(
    folder: Path, index: Path, opened: list
) -> None:
    one, other = picture(folder / "a.png"), picture(folder / "b.png", colour="blue")
    for path in (one, other):
        path.write_bytes(path.read_bytes().ljust(1000, b"."))
    (before, _) = scan("images", folder, index, BY_NAME).records
    found = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (one.stat().st_size, one.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    opened.clear()
    (after, _) = scan("images", folder, index, BY_NAME).records
    assert opened == ["a.png"] and after.content != before.content


def test_a_time_of_far_away_is_no_hindrance(folder: Path, index: Path, opened: list) -> None:
    for name, seconds in (("a.png", 2**34 - 1), ("b.png", -(2**31))):  # 2514, and 1901
        os.utime(picture(folder / name), (seconds, seconds))
    for _ in range(2):
        assert used(scan("images", folder, index, BY_NAME), folder) == ["a.png", "b.png"]
    assert len(opened) == 2


def test_only_what_changed_is_opened_again(folder: Path, index: Path, opened: list) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        picture(folder / name)
    scan("images", folder, index, BY_NAME)
    opened.clear()
    picture(folder / "b.png", (33, 44))
    os.utime(folder / "c.png", ns=(1, 1))
    (folder / "d.png").unlink()
    picture(folder / "e.png")
    result = scan("images", folder, index, BY_NAME)
    assert sorted(opened) == ["b.png", "c.png", "e.png"]
    assert used(result, folder) == ["a.png", "b.png", "c.png", "e.png"] and result.records[1].size == Size(33, 44)
    assert "d.png" not in index.read_text()
    assert scan("images", folder, index, BY_NAME) == result and len(opened) == 3


def test_captions_are_read_anew_each_time(folder: Path, index: Path) -> None:
    picture(folder / "a.png")
    for caption in ("a fox", "a red fox"):
        (folder / "a.txt").write_text(caption)
        assert scan("foxes", folder, index, BY_TEXT).records[0].captions == (caption,)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_an_index_that_was_cut_short_loses_only_its_last_entry(
    folder: Path, index: Path, opened: list, cut: int
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name)
    first = scan("images", folder, index, BY_NAME)
    index.write_bytes(index.read_bytes()[:-cut])
    opened.clear()
    assert scan("images", folder, index, BY_NAME) == first
    assert opened == ([] if cut == 1 else ["c.png"])
    assert scan("images", folder, index, BY_NAME) == first and len(opened) <= 1


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage\n", b"\xff\xfe\n", b'{"index": 0}\n{"path": "a.png", "entry": []}\n', b"3\n", b"[" * 99_999],
)
def test_an_index_that_is_not_ours_is_made_anew(folder: Path, index: Path, content: bytes) -> None:
    picture(folder / "a.png")
    index.parent.mkdir()
    index.write_bytes(content)
    assert len(scan("images", folder, index, BY_NAME).records) == 1
    assert len(index.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "line", [b"{}", b'{"path": "a.png"}', b'{"path": "a.png", "entry": [1, 2]}', b'{"path": 7, "entry": null}', b"\0\0"]
)
def test_lines_of_an_index_that_make_no_sense_are_skipped(folder: Path, index: Path, opened: list, line: bytes) -> None:
    picture(folder / "a.png")
    first = scan("images", folder, index, BY_NAME)
    header = index.read_bytes().splitlines()[0]
    index.write_bytes(header + b"\n" + line + b"\n")
    assert scan("images", folder, index, BY_NAME) == first and len(opened) == 2


def test_a_file_that_a_disk_failed_to_give_is_opened_again_the_next_time(folder, index, monkeypatch):
    picture(folder / "a.png")
    picture(folder / "b.png")
    for where, name in ((loading, "_identified"), (module, "content_hash")):
        real = getattr(where, name)

        def fails(file: Path | BinaryIO) -> object:
            if Path(file.name).name == "b.png":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(file)

        with monkeypatch.context() as disk:
            disk.setattr(where, name, fails)
            assert reasons(scan("images", folder, index, BY_NAME), folder) == {
                "b.png": "cannot be read: Input/output error"
            }
        assert used(scan("images", folder, index, BY_NAME), folder) == ["a.png", "b.png"]
        index.unlink()


def test_an_interrupted_scan_goes_on_where_it_stopped(
    folder: Path, index: Path, opened: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE", 2)
    for name in "abcdef":
        picture(folder / f"{name}.png")
    progress = []

    def interrupt(done: int, total: int) -> None:
        progress.append((done, total, len(index.read_text().splitlines())))
        if len(progress) in (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan("images", folder, index, BY_NAME, on_progress=interrupt)
    assert progress == [(2, 6, 1 + 2), (4, 6, 1 + 4)]
    # The power fails while d's entry is written, and the next attempt is interrupted, too.
    index.write_bytes(index.read_bytes()[:-5])
    opened.clear()
    with pytest.raises(KeyboardInterrupt):
        scan("images", folder, index, BY_NAME, on_progress=interrupt)
    assert sorted(opened) == ["d.png", "e.png"]
    opened.clear()
    assert len(scan("images", folder, index, BY_NAME).records) == 6
    assert opened == ["f.png"]


def test_a_moved_dataset_keeps_its_index(folder: Path, index: Path, opened: list, tmp_path: Path) -> None:
    picture(folder / "sub" / "a.png")
    scan("images", folder, index, BY_NAME)
    moved = folder.rename(tmp_path / "moved")
    assert scan("images", moved, index, BY_NAME).records[0].path == moved / "sub" / "a.png"
    assert len(opened) == 1


def test_the_dataset_folder_is_only_read(folder: Path, index: Path, tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png"):
        picture(folder / name)
    (folder / "bad.png").write_bytes(b"x")
    shutil.copytree(folder, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    result = scan("images", folder, index, BY_NAME)
    write_left_out(tmp_path / "output" / "left_out.json", {"images": result.left_out})
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
    assert sorted(path.name for path in index.parent.iterdir()) == ["index.jsonl"]


def test_the_number_of_threads_changes_nothing(folder: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(20):
        picture(folder / f"{number}.png", tuple(draw.integers(5, 50, 2)))
    results = [scan("images", folder, tmp_path / f"index{workers}", BY_NAME, workers) for workers in (1, 4)]
    assert results[0] == results[1]
    assert (tmp_path / "index1").read_bytes() == (tmp_path / "index4").read_bytes()


# --- What cannot be used at all


def test_images_without_caption_are_left_out_with_the_reason(folder: Path, index: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name)
    (folder / "a.txt").write_text("a fox")
    (folder / "b.txt").write_text("\n")
    result = scan("foxes", folder, index, BY_TEXT)
    assert used(result, folder) == ["a.png"]
    assert reasons(result, folder) == {"b.png": "no caption: b.txt is empty", "c.png": "no caption: there is no c.txt"}


def test_a_dataset_without_any_caption_is_an_error_that_says_what_was_looked_for(folder: Path, index: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        picture(folder / name)
        (folder / name).with_suffix(".caption").write_text("a fox")
    with pytest.raises(DatasetError) as error:
        scan("my foxes", folder, index, BY_TEXT)
    for word in (
        "'my foxes'",
        "caption_strategy 'textfile'",
        "4 images",
        "a.txt",
        "4 .caption files",
        "instanceprompt",
    ):
        assert word in str(error.value)


@pytest.mark.parametrize("suffix", [".TXT", ".json"])
def test_captions_under_an_extension_that_is_not_read_are_pointed_out(folder: Path, index: Path, suffix: str) -> None:
    picture(folder / "a.png")
    (folder / f"a{suffix}").write_text("a fox")
    with pytest.raises(DatasetError, match=f"1 {suffix} files"):
        scan("foxes", folder, index, BY_TEXT)


def test_a_missing_instance_prompt_is_an_error(folder: Path, index: Path) -> None:
    picture(folder / "a.png")
    with pytest.raises(DatasetError, match="instance_prompt is empty"):
        scan("foxes", folder, index, Captions("instanceprompt"))


def test_a_missing_folder_and_a_file_in_its_place_are_errors(folder: Path, index: Path) -> None:
    with pytest.raises(DatasetError, match="'foxes'.*instance_data_dir.*nowhere.*does not exist"):
        scan("foxes", folder / "nowhere", index, BY_NAME)
    with pytest.raises(DatasetError, match="is not a folder"):
        scan("foxes", picture(folder / "a.png"), index, BY_NAME)


def test_an_empty_folder_and_one_without_a_readable_image_are_errors(folder: Path, index: Path) -> None:
    (folder / "notes.txt").write_text("nothing here")
    with pytest.raises(
        DatasetError, match=r"'foxes': there are no images in its instance_data_dir .* \(1 other files\)"
    ):
        scan("foxes", folder, index, BY_NAME)
    (folder / "a.jpg").write_text("<html>")
    (folder / "b.jpg").write_bytes(b"")
    with pytest.raises(
        DatasetError, match="none of the 2 images .* can be read: .*a.jpg is a web page.*b.jpg is empty"
    ):
        scan("foxes", folder, index, BY_NAME)
