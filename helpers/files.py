"""Files that are there whole or not at all, and paths as anything can show them."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

_PARTIAL_PREFIX, _PARTIAL_SUFFIX = ".floydtuner-", ".partial"
_STALE_SECONDS = 24 * 3600  # a file is written in seconds: a partial one that is a day old has no writer left


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a loss of power leaves the old one or the new one, never a part."""
    partial = path.parent / f"{_PARTIAL_PREFIX}{os.getpid()}-{secrets.token_hex(8)}{_PARTIAL_SUFFIX}"
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def delete_stale_partials(folder: Path) -> None:
    """Delete what a crash of `write_whole` left in a folder, once no writer can still be at it."""
    for path in folder.glob(f"{_PARTIAL_PREFIX}*{_PARTIAL_SUFFIX}"):
        if path.is_file() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink(missing_ok=True)


def printable(path: Path | str) -> str:
    """A path that any console and any JSON reader takes: bytes that are no UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
