"""Where the caption of an image comes from."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from helpers.files import printable

STRATEGIES = ("filename", "textfile", "instanceprompt")
MAX_BYTES = 1_000_000
"""The largest caption file that is read. Longer ones are something else under that name."""

NOT_UTF8 = "is not UTF-8 text"
"""How the reason ends where a caption file is of another encoding."""


class MissingCaption(Exception):
    """An image has no caption; `reason` says in words what was looked for."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def captions_for(
    path: Path | str,
    strategy: str,
    instance_prompt: str | None = None,
    prepend_instance_prompt: bool = False,
    only_instance_prompt: bool = False,
) -> tuple[str, ...]:
    """The captions of an image, not yet cleaned: one of them is drawn at each use.

    Args:
        strategy: "filename" (the name without extension, `_` becomes space), "textfile" (the lines that are not empty
            of the .txt file of the same name) or "instanceprompt" (`instance_prompt` itself).
        prepend_instance_prompt: put `instance_prompt` and a space before each caption.
        only_instance_prompt: use `instance_prompt` whatever the strategy.

    Raises:
        MissingCaption: if there is none.
        ValueError: if the strategy is unknown.
    """
    prompt = (instance_prompt or "").strip()
    if strategy not in STRATEGIES:
        raise ValueError(f"caption_strategy {strategy!r} is unknown: use {', '.join(STRATEGIES)}")
    if not prompt and (only_instance_prompt or prepend_instance_prompt or strategy == "instanceprompt"):
        raise MissingCaption("instance_prompt is empty")
    if only_instance_prompt or strategy == "instanceprompt":
        return (prompt,)
    folder, name = os.path.split(path)
    stem = _stem(name)
    captions = _from_filename(stem) if strategy == "filename" else _from_textfile(os.path.join(folder, stem + ".txt"))
    return tuple(f"{prompt} {caption}" for caption in captions) if prepend_instance_prompt else captions


def _stem(name: str) -> str:
    """As `Path.stem`; to make a million paths takes longer than all else about their captions."""
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name


def _from_filename(stem: str) -> tuple[str, ...]:
    caption = stem.replace("_", " ").strip()
    if not caption:
        raise MissingCaption("its name holds no words")
    if not caption.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise MissingCaption("its name is not UTF-8, so it cannot be a caption")
    return (caption,)


def _from_textfile(path: str) -> tuple[str, ...]:
    try:
        text = _read(path)
    except FileNotFoundError as error:
        raise MissingCaption(f"there is no {_named(path)}") from error
    except UnicodeDecodeError as error:
        raise MissingCaption(f"{_named(path)} {NOT_UTF8}") from error
    except OSError as error:
        raise MissingCaption(f"{_named(path)} cannot be read: {error.strerror}") from error
    captions = tuple([line for line in map(str.strip, text.splitlines()) if line])
    if not captions:
        raise MissingCaption(f"{_named(path)} is empty")
    return captions


def _named(path: str) -> str:
    return printable(os.path.basename(path))


def _read(path: str) -> str:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise MissingCaption(f"{_named(path)} is not a regular file")
    if found.st_size > MAX_BYTES:
        raise MissingCaption(f"{_named(path)} is larger than {MAX_BYTES} bytes")
    with open(path, "rb", buffering=0) as file:
        # Windows editors put a byte order mark before UTF-8; it is no part of the caption.
        return file.readall().removeprefix(codecs.BOM_UTF8).decode("utf-8")
