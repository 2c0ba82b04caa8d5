"""Find the images of a dataset folder, with their captions; say what is left out, and why. The folder is only read."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helpers.caching.images import in_order
from helpers.captions.strategies import MissingCaption, captions_for
from helpers.data import index
from helpers.data.index import Entry, Files, State
from helpers.data.records import Columns, Record, Records
from helpers.files import content_hash, printable, write_whole
from helpers.images.loading import NotAnImage, Unreadable, inspect

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .gif .bmp .dib .tif .tiff .jp2 .j2k .jpx .ppm .pgm .pbm .pnm "
        ".pcx .sgi .dds .psd .ico .qoi .tga .heic .heif .jxl .svg .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .exr "
        ".hdr"
    ).split()
)
"""A file of such a name is meant as an image: if it cannot be read, its user is told."""

COMPANION_SUFFIXES = frozenset(
    (
        ".txt .caption .captions .cap .tags .json .jsonl .csv .tsv .md .yaml .yml .toml .xml .xmp .ini .log .parquet "
        ".npz .npy .pt .pth .safetensors .ckpt .bin .zip .tar .gz .7z .rar .mp4 .mov .avi .mkv .webm .mp3 .wav .pdf "
        ".html .py .sh .db"
    ).split()
)
"""What lies beside images without being any; such files are not opened. Any other name: the content decides."""

IGNORED_FOLDERS = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)

SLICE = 256
"""Files opened between two notes of progress; an interruption loses at most these."""

READERS = 8
"""Threads that read caption files. A disk that has to fetch them gives many at a time sooner than one by one."""

MASK = 2**63 - 1
"""The bits of a time that are kept."""

NAMED = 3
"""How many files an error names as examples."""

NO_CAPTION = "no caption: "
"""How the reason begins of an image that is left out for its caption."""


class DatasetError(Exception):
    """A dataset cannot be used at all; the message names the dataset and what to change."""


@dataclass(frozen=True)
class LeftOut:
    """An image, or a folder, that is not used, and why, in words."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Scan:
    """The images of one dataset, sorted by the bytes of their relative paths: `records` are used, `left_out` are not.

    `notes` are things to tell the user that left no image out.
    """

    records: Sequence[Record]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def found(self) -> int:
        """How many images there are, used or not."""
        return len(self.records) + len(self.left_out)


@dataclass(frozen=True)
class Captions:
    """How the images of a dataset get their captions, by the options of these names (see captions.strategies)."""

    caption_strategy: str
    instance_prompt: str | None = None
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False

    def of(self, path: Path | str) -> tuple[str, ...]:
        """The alternatives for one image; raises MissingCaption."""
        return captions_for(
            path, self.caption_strategy, self.instance_prompt, self.prepend_instance_prompt, self.only_instance_prompt
        )


def scan(
    dataset_id: str,
    folder: Path,
    index_path: Path,
    captions: Captions | None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    may_be_empty: bool = False,
) -> Scan:
    """Find all images under a folder and their captions.

    Follows links, each folder once; skips hidden files and those of file managers. Files whose size and times are as
    the index remembers are not opened again.

    Args:
        index_path: a JSON-lines file outside of the folder, made if absent and renewed.
        captions: None for images that need none.
        workers: threads that open files; None for one per core.
        on_progress: told now and then how many of how many files were opened; never called if none has to be.
        may_be_empty: return also what holds no image that can be used.

    Raises:
        DatasetError: if the folder is missing, or no image in it can be used.
    """
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise DatasetError(f"dataset {dataset_id!r}: its instance_data_dir {str(folder)!r} {found}")
    unreachable: list[LeftOut] = []
    files = Files(folder, _walk(folder, unreachable))
    _look_at(files, index_path, workers, on_progress)
    records, left_out = _sorted_out(dataset_id, files, captions)
    result = Scan(records, tuple(unreachable + left_out), _notes(files))
    if not records and not may_be_empty:
        raise DatasetError(_nothing_usable(dataset_id, folder, result, captions))
    return result


def write_left_out(path: Path, left_out: Mapping[str, Iterable[LeftOut]]) -> None:
    """Write the report `left_out.json`: per dataset a list of files with their reasons; replaced as a whole."""
    report = {
        dataset_id: [{"path": printable(item.path), "reason": item.reason} for item in items]
        for dataset_id, items in left_out.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def _walk(
    folder: Path, unreachable: list[LeftOut], with_companions: bool = False
) -> Iterator[tuple[bytes, State]]:
    """Every file that may be an image. Linked folders come last, so that real paths are preferred.

    Companions are not even asked for their state, unless they are wanted too.
    """
    seen: set[tuple[int, int]] = set()
    waiting, linked = [(str(folder), b"")], deque[tuple[str, bytes]]()
    while waiting or linked:
        current, name = waiting.pop() if waiting else linked.popleft()
        try:
            found = os.stat(current)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(current) as listing:
                entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            unreachable.append(LeftOut(Path(current), f"folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if entry.name not in IGNORED_FOLDERS:
                    inside = name + os.fsencode(entry.name) + b"/"
                    (linked if entry.is_symlink() else waiting).append((entry.path, inside))
            elif with_companions or _suffix(entry.name) not in COMPANION_SUFFIXES:
                if state := _state(entry, unreachable):
                    yield name + os.fsencode(entry.name), state


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link that leads back to itself: `_state` reports it.


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _state(entry: os.DirEntry, unreachable: list[LeftOut]) -> State | None:
    """None, and told if it is meant as an image, where there is no regular file."""
    try:
        found = entry.stat()
        if stat.S_ISREG(found.st_mode):
            # Times after the year 2262 have more bits than the index keeps; they are only held against each other.
            return State(found.st_size, found.st_mtime_ns & MASK, found.st_ctime_ns & MASK)
        reason = "is not a regular file"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    if _suffix(entry.name) in IMAGE_SUFFIXES:
        unreachable.append(LeftOut(Path(entry.path), reason))
    return None


def _look_at(
    files: Files, index_path: Path, workers: int | None, on_progress: Callable[[int, int], None]
) -> None:
    """Learn what each file is: from the index if it is unchanged, else by opening it; the index then knows it too."""
    recalled = files.recall(index_path)
    unknown = files.unknown()
    if unknown:
        index_path.parent.mkdir(parents=True, exist_ok=True)
        if not recalled.is_there:
            index.begin(index_path)
        # Unbuffered at the end of the file, whole lines at a time: those of two runs that scan at once do not mix.
        with index_path.open("ab", buffering=0) as lines, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            if recalled.is_there:
                lines.write(b"\n")  # ends a line that an interruption may have cut
            for start in range(0, len(unknown), SLICE):
                some = unknown[start : start + SLICE]
                for number, entry in zip(some, pool.map(_open, map(files.path, some))):
                    files.learn(number, entry)
                lines.write(files.lines(some))
                on_progress(start + len(some), len(unknown))
    if recalled.has_others or (recalled.is_there and unknown):
        files.write(index_path)


def _open(path: Path) -> Entry:
    try:
        header = inspect(path)
        return Entry(content_hash(path), *header.size, header.has_more_frames)
    except NotAnImage as error:
        return Entry(reason=error.reason if path.suffix.lower() in IMAGE_SUFFIXES else "")
    except Unreadable as error:
        return Entry(reason=error.reason, may_pass=error.may_pass)
    except OSError as error:
        return Entry(reason=f"cannot be read: {error.strerror}", may_pass=True)


def _sorted_out(dataset_id: str, files: Files, captions: Captions | None) -> tuple[Records, list[LeftOut]]:
    columns, left_out = Columns(dataset_id, files.folder), []
    parts = (range(start, min(start + SLICE, len(files))) for start in range(0, len(files), SLICE))
    with ThreadPoolExecutor(READERS) as pool:
        for part, found in in_order(pool, partial(_captions_of, files, captions), parts, window=2 * READERS):
            for number, texts in zip(part, found):
                if isinstance(texts, LeftOut):
                    left_out.append(texts)
                elif texts is not None:
                    columns.add(files.names[number], *files.image(number), texts)
    return Records(columns), left_out


def _captions_of(
    files: Files, captions: Captions | None, numbers: Iterable[int]
) -> list[tuple[str, ...] | LeftOut | None]:
    """The captions of each image that can be used; None for what is no image."""
    found: list[tuple[str, ...] | LeftOut | None] = []
    for number in numbers:
        reason = files.reason(number)
        if reason is None:
            try:
                found.append(captions.of(files.file(number)) if captions else ())
                continue
            except MissingCaption as error:
                reason = NO_CAPTION + error.reason
        found.append(LeftOut(files.path(number), reason) if reason else None)
    return found


def _notes(files: Files) -> tuple[str, ...]:
    longer = files.with_more_frames()
    if not longer:
        return ()
    return (f"{len(longer)} images have several frames or pages, of which only the first is used: {_examples(longer)}",)


def _nothing_usable(dataset_id: str, folder: Path, result: Scan, captions: Captions | None) -> str:
    start, files = f"dataset {dataset_id!r}: ", [folder / os.fsdecode(name) for name, _ in _walk(folder, [], True)]
    uncaptioned = [item for item in result.left_out if item.reason.startswith(NO_CAPTION)]
    if uncaptioned:
        reasons = "; ".join(item.reason.removeprefix(NO_CAPTION) for item in uncaptioned[:NAMED])
        return (
            f"{start}none of its {result.found} images has a caption by caption_strategy "
            f"{captions.caption_strategy!r}: {reasons}{', ...' if len(uncaptioned) > NAMED else ''}"
            f"{_unread_captions(uncaptioned, files)}. Write these captions, or set caption_strategy to filename, or to "
            "instanceprompt with an instance_prompt"
        )
    if result.found:
        reasons = "; ".join(f"{printable(item.path)} {item.reason}" for item in result.left_out[:NAMED])
        return f"{start}none of the {result.found} images in {str(folder)!r} can be read: {reasons}"
    return f"{start}there are no images in its instance_data_dir {str(folder)!r} ({len(files)} other files)"


def _unread_captions(images: Sequence[LeftOut], files: Sequence[Path]) -> str:
    """A hint at files that look like captions by name but have an extension that nobody reads."""
    stems = {item.path.with_suffix("") for item in images}
    beside = Counter(
        path.suffix
        for path in files
        if path.suffix != ".txt" and path.suffix.lower() in COMPANION_SUFFIXES and path.with_suffix("") in stems
    )
    if not beside:
        return ""
    suffix, count = beside.most_common(1)[0]
    return f"; there are {count} {suffix} files of the same names, which are not read: rename them to .txt"


def _examples(paths: Sequence[Path]) -> str:
    return ", ".join(map(printable, paths[:NAMED])) + (", ..." if len(paths) > NAMED else "")
