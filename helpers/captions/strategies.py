"""Where the caption of an image comes from."""

from __future__ import annotations

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
    path: Path,
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
    captions = _from_filename(path) if strategy == "filename" else _from_textfile(path.with_suffix(".txt"))
    return tuple(f"{prompt} {caption}" for caption in captions) if prepend_instance_prompt else captions


def _from_filename(path: Path) -> tuple[str, ...]:
    caption = path.stem.replace("_", " ").strip()
    if not caption:
        raise MissingCaption("its name holds no words")
    if not caption.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise MissingCaption("its name is not UTF-8, so it cannot be a caption")
    return (caption,)


def _from_textfile(path: Path) -> tuple[str, ...]:
    name = printable(path.name)
    try:
        text = _read(path)
    except FileNotFoundError as error:
        raise MissingCaption(f"there is no {name}") from error
    except UnicodeDecodeError as error:
        raise MissingCaption(f"{name} {NOT_UTF8}") from error
    except OSError as error:
        raise MissingCaption(f"{name} cannot be read: {error.strerror}") from error
    captions = tuple(line for line in map(str.strip, text.splitlines()) if line)
    if not captions:
        raise MissingCaption(f"{name} is empty")
    return captions


def _read(path: Path) -> str:
    found, name = path.stat(), printable(path.name)
    if not stat.S_ISREG(found.st_mode):
        raise MissingCaption(f"{name} is not a regular file")
    if found.st_size > MAX_BYTES:
        raise MissingCaption(f"{name} is larger than {MAX_BYTES} bytes")
    # Windows editors put a byte order mark before UTF-8; it is no part of the caption.
    return path.read_text(encoding="utf-8-sig")
