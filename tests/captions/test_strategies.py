"""Where captions come from; a missing one is never silent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.captions.strategies import MAX_BYTES, MissingCaption, captions_for


@pytest.mark.parametrize(
    "name, caption",
    [
        ("a_red_fox.jpg", "a red fox"),
        ("a red fox.PNG", "a red fox"),
        ("_a_fox_.v2.jpg", "a fox .v2"),
        ("fox", "fox"),
        ("-fox.jpg", "-fox"),
        ('[1]* "fox".jpg', '[1]* "fox"'),
        ("Füchse_🦊.webp", "Füchse 🦊"),
    ],
)
def test_the_file_name_without_extension_is_a_caption(name: str, caption: str) -> None:
    assert captions_for(Path("/data") / name, "filename") == (caption,)


@pytest.mark.parametrize("name", ["_.jpg", "__ _.png"])
def test_a_name_without_words_is_no_caption(name: str) -> None:
    with pytest.raises(MissingCaption, match="no words"):
        captions_for(Path(name), "filename")


def test_a_name_that_is_not_utf8_is_no_caption() -> None:
    with pytest.raises(MissingCaption, match="not UTF-8"):
        captions_for(Path(os.fsdecode(b"caf\xe9.jpg")), "filename")


@pytest.mark.parametrize(
    "content, captions",
    [
        (b"a fox", ("a fox",)),
        (b"  a fox \r\n", ("a fox",)),
        (b"a fox\n\n  \na red fox\r\nfoxes\n", ("a fox", "a red fox", "foxes")),
        (b"\xef\xbb\xbfa fox", ("a fox",)),
        ("ein Füchslein 🦊".encode(), ("ein Füchslein 🦊",)),
    ],
)
def test_each_line_of_the_text_file_is_a_caption(tmp_path: Path, content: bytes, captions: tuple) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert captions_for(tmp_path / "a.jpg", "textfile") == captions


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "a.txt is empty"),
        (b" \n\t\n", "a.txt is empty"),
        (b"caf\xe9", "not UTF-8"),
        (b"\xff\xfea\0", "not UTF-8"),
        (b"a" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_a_text_file_without_caption_is_missing_with_the_reason(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MissingCaption, match=word):
        captions_for(tmp_path / "a.jpg", "textfile")


def test_what_stands_for_the_text_file_must_be_a_file_and_never_hangs(tmp_path: Path) -> None:
    with pytest.raises(MissingCaption, match="there is no a.txt"):
        captions_for(tmp_path / "a.jpg", "textfile")
    (tmp_path / "b.txt").mkdir()
    os.mkfifo(tmp_path / "c.txt")
    for name in ("b.jpg", "c.jpg"):
        with pytest.raises(MissingCaption, match="not a regular file"):
            captions_for(tmp_path / name, "textfile")
    (tmp_path / "d.txt").symlink_to("d.txt")
    with pytest.raises(MissingCaption, match="d.txt cannot be read"):
        captions_for(tmp_path / "d.jpg", "textfile")


def test_the_instance_prompt_stands_alone_or_before_each_caption(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\nfoxes")
    path = tmp_path / "a.jpg"
    assert captions_for(path, "instanceprompt", " sks fox ") == ("sks fox",)
    assert captions_for(path, "instanceprompt", "sks fox", prepend_instance_prompt=True) == ("sks fox",)
    assert captions_for(path, "textfile", "sks", prepend_instance_prompt=True) == ("sks a fox", "sks foxes")
    assert captions_for(path, "filename", "sks", prepend_instance_prompt=True) == ("sks a",)
    assert captions_for(path, "textfile", "sks", only_instance_prompt=True) == ("sks",)
    assert captions_for(path, "textfile", "sks") == ("a fox", "foxes")


@pytest.mark.parametrize("prompt", [None, "", "  "])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "instanceprompt"},
        {"strategy": "filename", "only_instance_prompt": True},
        {"strategy": "filename", "prepend_instance_prompt": True},
    ],
)
def test_a_missing_instance_prompt_is_never_an_empty_caption(prompt: str | None, options: dict) -> None:
    with pytest.raises(MissingCaption, match="instance_prompt is empty"):
        captions_for(Path("a.jpg"), instance_prompt=prompt, **options)


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(ValueError, match="filename, textfile, instanceprompt"):
        captions_for(Path("a.jpg"), "text")
