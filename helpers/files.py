"""Files that are there whole or not at all, and paths as anything can show them."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL_PREFIX, _PARTIAL_SUFFIX = ".floydtuner-", ".partial"
_STALE_SECONDS = 24 * 3600  # a file is written in seconds: a partial one that is a day old has no writer left
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_FLUSH = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)


class DiskFull(OSError):
    """No room is left for something, on the disk or in a quota; the message says where, and how much is missing.

    Args:
        what: could not be written.
        folder: where.
        needed: bytes of it, where that is known.
    """

    def __init__(self, what: str, folder: Path, needed: int | None = None) -> None:
        free = free_bytes(folder)
        words = f"{os.strerror(errno.ENOSPC)} for {what}" + (f" of {needed:,} bytes" if needed is not None else "")
        words += f" in {printable(folder)}"
        if free is not None:
            words += f", where {free:,} bytes are free"
            if needed is not None:
                words += f": {needed - free:,} are missing" if needed > free else " by now: is a quota used up?"
        super().__init__(errno.ENOSPC, words)

    def __str__(self) -> str:
        return self.strerror


@contextmanager
def telling_if_full(what: str, folder: Path, needed: int | None = None) -> Iterator[None]:
    """Within it an error that comes of a full disk, whichever library raises it, becomes `DiskFull`."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFull(what, folder, needed) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is that of a full disk or quota; safetensors has that in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the one in which it would be made."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def free_bytes(folder: Path) -> int | None:
    """What can still be written into a folder, or into the one that it will be made in; None where that is not told."""
    try:
        usage = shutil.disk_usage(existing_parent(folder))
    except OSError:
        return None
    return usage.free if usage.total else None  # some network disks say 0 of 0


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a loss of power leaves the old one or the new one, never a part.

    Raises:
        DiskFull: there is no room for it; the old file is still there.
    """
    partial = path.parent / f"{_PARTIAL_PREFIX}{os.getpid()}-{secrets.token_hex(8)}{_PARTIAL_SUFFIX}"
    with telling_if_full(path.name, path.parent, len(content)):
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
        with suppress(FileNotFoundError):  # another run in the same folder has just finished it, or deleted it first
            if path.is_file() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def printable(path: Path | str) -> str:
    """A path that any console and any JSON reader takes, on one line: bytes that are no UTF-8 as \\xNN."""
    return on_one_line(os.fsencode(path).decode("utf-8", "backslashreplace"))


def on_one_line(text: str) -> str:
    """`text` with line breaks, what else controls a console, and halves of UTF-16 pairs as escapes."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a loss of power.

    Some network disks know no flushing of folders: theirs are then as safe as those disks are.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(handle)
