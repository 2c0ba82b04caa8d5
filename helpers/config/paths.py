"""Where relative paths start."""

from __future__ import annotations

import os
from pathlib import Path

from helpers.files import printable

ROOT = Path(__file__).resolve().parents[2]
"""The project's root: the folder that train.sh and train_sd2x.py lie in."""


LONGEST_NAME = 255  # bytes of a file's or a folder's name, on every file system in use
LONGEST_PATH = 4000  # bytes; Linux takes 4,095, and names of ours come behind


def from_root(path: str | Path) -> Path:
    """`path` as an absolute path: `~` is expanded, a relative path counts from the project's root.

    Raises:
        ValueError: in words, if no file system could have it.
    """
    path = Path(path)
    try:
        path = path.expanduser()
    except RuntimeError:  # the home of nobody: it stays as it is, as in a shell
        pass
    raw = os.fsencode(path)  # raises UnicodeEncodeError, a ValueError, where a text is no text
    if b"\0" in raw or len(raw) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in raw.split(b"/")):
        raise ValueError(
            f"needs a path without NUL, of at most {LONGEST_PATH} bytes, with names of at most {LONGEST_NAME}"
        )
    return ROOT / path


def portable(path: Path, whole: bool = False) -> str:
    """A path without what is only of this machine, as `from_root` reads it: from the project's root, or from `~`.

    Of one that lies under neither, nothing is told but its name; or all of it with `whole`, so that it is found again.
    """
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    home = Path(os.path.expanduser("~"))  # stays "~" for somebody without a home
    if path.is_relative_to(home):
        return str("~" / path.relative_to(home))
    return str(path) if whole else path.name


def portable_model(name: str, whole: bool = False) -> str:
    """The same of a model's name, which is a hub id where it is no absolute path."""
    return portable(Path(name), whole) if Path(name).is_absolute() else name


def shown(path: Path) -> str:
    """A path as it can be pasted into a shell here, and behind any flag: from the project's root if that is here."""
    is_near = Path.cwd() == ROOT and path.is_relative_to(ROOT)
    return printable(path.relative_to(ROOT) if is_near else path)
