"""Find the images of a dataset folder, with their captions; say what is left out, and why. The folder is only read."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import PIL

from helpers.captions.strategies import MissingCaption, captions_for
from helpers.files import content_hash, printable, write_whole
from helpers.images.loading import NotAnImage, Unreadable, inspect
from helpers.sizes import Size

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

INDEX_HEADER = {"index": 2, "pillow": PIL.__version__}
"""First line of an index. Another version of Pillow may read other files, so its index is made anew."""

SLICE = 256
"""Files opened between two notes of progress; an interruption loses at most these."""

NO_STATE = (-1, -1, -1)
"""Bytes and times that no file has: of an entry that must not hold for the next scan, as a disk may be well again."""

NAMED = 3
"""How many files an error names as examples."""

NO_CAPTION = "no caption: "
"""How the reason begins of an image that is left out for its caption."""


class DatasetError(Exception):
    """A dataset cannot be used at all; the message names the dataset and what to change."""


@dataclass(frozen=True)
class Record:
    """One usable image.

    `content` is the SHA-256 of the file's bytes in hex, `size` is after EXIF orientation, `captions` are the
    alternatives of which one is drawn at each use, not yet cleaned. `control` is its conditioning image, where a
    ControlNet is trained.
    """

    dataset_id: str
    path: Path
    content: str
    size: Size
    captions: tuple[str, ...]
    control: Record | None = None


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

    records: tuple[Record, ...]
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

    def of(self, path: Path) -> tuple[str, ...]:
        """The alternatives for one image; raises MissingCaption."""
        return captions_for(
            path, self.caption_strategy, self.instance_prompt, self.prepend_instance_prompt, self.only_instance_prompt
        )


@dataclass(frozen=True)
class Found:
    """A regular file of the dataset folder, before it is opened."""

    path: Path
    name: bytes
    bytes: int
    mtime_ns: int
    ctime_ns: int  # moves with every change of the content, also where a program sets the time of change back

    @property
    def key(self) -> str:
        """What the index knows it by: its relative path, undecodable bytes as surrogates."""
        return os.fsdecode(self.name)


@dataclass(frozen=True)
class Entry:
    """What opening a file told, as kept in the index. `reason` is None for a readable image, "" for no image."""

    bytes: int
    mtime_ns: int
    ctime_ns: int
    content: str = ""
    width: int = 0
    height: int = 0
    has_more_frames: bool = False
    reason: str | None = None

    @classmethod
    def from_json(cls, values: object) -> Entry | None:
        """The entry of a line of the index; None if it is not one."""
        kinds = (int, int, int, str, int, int, bool, (str, type(None)))
        if not isinstance(values, list) or len(values) != len(kinds):
            return None
        return cls(*values) if all(isinstance(value, kind) for value, kind in zip(values, kinds)) else None


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
    files = sorted(_walk(folder, unreachable), key=lambda file: file.name)
    candidates = [file for file in files if file.path.suffix.lower() not in COMPANION_SUFFIXES]
    entries = _entries(candidates, index_path, workers, on_progress)
    images = [file for file in candidates if entries[file.key].reason != ""]
    records, left_out = _sorted_out(dataset_id, images, entries, captions)
    result = Scan(tuple(records), tuple(unreachable + left_out), _notes(images, entries))
    if not records and not may_be_empty:
        raise DatasetError(_nothing_usable(dataset_id, folder, result, captions, files))
    return result


def write_left_out(path: Path, left_out: Mapping[str, Iterable[LeftOut]]) -> None:
    """Write the report `left_out.json`: per dataset a list of files with their reasons; replaced as a whole."""
    report = {
        dataset_id: [{"path": printable(item.path), "reason": item.reason} for item in items]
        for dataset_id, items in left_out.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def _walk(folder: Path, unreachable: list[LeftOut]) -> Iterator[Found]:
    """Every file that may be an image or belong to one. Linked folders come last, so that real paths are preferred."""
    seen: set[tuple[int, int]] = set()
    waiting, linked = [folder], []
    while waiting or linked:
        current = waiting.pop() if waiting else linked.pop(0)
        try:
            found = current.stat()
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(current) as listing:
                entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            unreachable.append(LeftOut(current, f"folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield from _file(entry, folder, unreachable)
            elif entry.name not in IGNORED_FOLDERS:
                (linked if entry.is_symlink() else waiting).append(Path(entry.path))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link that leads back to itself: `_file` reports it.


def _file(entry: os.DirEntry, folder: Path, unreachable: list[LeftOut]) -> Iterator[Found]:
    path = Path(entry.path)
    meant_as_image = path.suffix.lower() in IMAGE_SUFFIXES
    try:
        found = entry.stat()
    except OSError as error:
        if meant_as_image:
            unreachable.append(LeftOut(path, f"cannot be read: {error.strerror}"))
        return
    if stat.S_ISREG(found.st_mode):
        name = os.fsencode(path.relative_to(folder))
        yield Found(path, name, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    elif meant_as_image:
        unreachable.append(LeftOut(path, "is not a regular file"))


def _entries(
    files: Sequence[Found], index_path: Path, workers: int | None, on_progress: Callable[[int, int], None]
) -> dict[str, Entry]:
    """What each file is: from the index where it is unchanged, else by opening it; the index then knows it too."""
    known = _read_index(index_path)
    entries = {file.key: known[file.key] for file in files if _is_current(known.get(file.key), file)}
    unknown = [file for file in files if file.key not in entries]
    if unknown:
        index_path.parent.mkdir(parents=True, exist_ok=True)
        if not known:
            write_whole(index_path, (json.dumps(INDEX_HEADER) + "\n").encode("ascii"))
        # Unbuffered at the end of the file, whole lines at a time: those of two runs that scan at once do not mix.
        with index_path.open("ab", buffering=0) as index, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            if known:
                index.write(b"\n")  # ends a line that an interruption may have cut
            for start in range(0, len(unknown), SLICE):
                some = unknown[start : start + SLICE]
                opened = {file.key: entry for file, entry in zip(some, pool.map(_open, some))}
                entries |= opened
                index.write("".join(_index_line(*item) for item in opened.items()).encode("ascii"))
                on_progress(start + len(some), len(unknown))
    if len(known.keys() | entries.keys()) > len(entries) or (known and unknown):
        lines = "".join(_index_line(key, entry) for key, entry in entries.items())
        write_whole(index_path, (json.dumps(INDEX_HEADER) + "\n" + lines).encode("ascii"))
    return entries


def _is_current(entry: Entry | None, file: Found) -> bool:
    return entry is not None and (entry.bytes, entry.mtime_ns, entry.ctime_ns) == _state(file)


def _state(file: Found) -> tuple[int, int, int]:
    return file.bytes, file.mtime_ns, file.ctime_ns


def _open(file: Found) -> Entry:
    try:
        header = inspect(file.path)
        return Entry(*_state(file), content_hash(file.path), *header.size, header.has_more_frames)
    except NotAnImage as error:
        reason = error.reason if file.path.suffix.lower() in IMAGE_SUFFIXES else ""
    except Unreadable as error:
        if error.may_pass:
            return Entry(*NO_STATE, reason=error.reason)
        reason = error.reason
    except OSError as error:
        return Entry(*NO_STATE, reason=f"cannot be read: {error.strerror}")
    return Entry(*_state(file), reason=reason)


def _read_index(path: Path) -> dict[str, Entry]:
    """The entries of an index, the last of each file; empty if there is none or it is of another version."""
    if not path.exists():
        return {}
    lines = [_parsed(line) for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    if not lines or lines[0] != INDEX_HEADER:
        return {}
    read = ((line.get("path"), Entry.from_json(line.get("entry"))) for line in lines[1:] if line)
    return {path: entry for path, entry in read if isinstance(path, str) and entry}


def _parsed(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None  # Cut by an interruption: its file is opened again.
    return value if isinstance(value, dict) else None


def _index_line(key: str, entry: Entry) -> str:
    return json.dumps({"path": key, "entry": astuple(entry)}) + "\n"


def _sorted_out(
    dataset_id: str, images: Sequence[Found], entries: Mapping[str, Entry], captions: Captions | None
) -> tuple[list[Record], list[LeftOut]]:
    records, left_out = [], []
    for file in images:
        entry = entries[file.key]
        if entry.reason is not None:
            left_out.append(LeftOut(file.path, entry.reason))
            continue
        try:
            texts = captions.of(file.path) if captions else ()
        except MissingCaption as error:
            left_out.append(LeftOut(file.path, NO_CAPTION + error.reason))
            continue
        records.append(Record(dataset_id, file.path, entry.content, Size(entry.width, entry.height), texts))
    return records, left_out


def _notes(images: Sequence[Found], entries: Mapping[str, Entry]) -> tuple[str, ...]:
    longer = [file.path for file in images if entries[file.key].has_more_frames]
    if not longer:
        return ()
    return (f"{len(longer)} images have several frames or pages, of which only the first is used: {_examples(longer)}",)


def _nothing_usable(
    dataset_id: str, folder: Path, result: Scan, captions: Captions | None, files: Sequence[Found]
) -> str:
    start = f"dataset {dataset_id!r}: "
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


def _unread_captions(images: Sequence[LeftOut], files: Sequence[Found]) -> str:
    """A hint at files that look like captions by name but have an extension that nobody reads."""
    stems = {item.path.with_suffix("") for item in images}
    beside = Counter(
        file.path.suffix
        for file in files
        if file.path.suffix != ".txt"
        and file.path.suffix.lower() in COMPANION_SUFFIXES
        and file.path.with_suffix("") in stems
    )
    if not beside:
        return ""
    suffix, count = beside.most_common(1)[0]
    return f"; there are {count} {suffix} files of the same names, which are not read: rename them to .txt"


def _examples(paths: Sequence[Path]) -> str:
    return ", ".join(map(printable, paths[:NAMED])) + (", ..." if len(paths) > NAMED else "")
