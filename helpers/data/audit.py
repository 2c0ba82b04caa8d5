"""What is wrong with a dataset, found before it is trained on: each thing with its file, the reason and what to do.

It looks with the eyes of training: the same scan, the same plans, the same decoding. So what it says is left out is
what training leaves out.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten

from tqdm import tqdm

from helpers.caching.images import cores, in_order
from helpers.caching.pixels import PixelJob
from helpers.caching.storages import STORAGES
from helpers.captions.cleaning import erased_words
from helpers.captions.strategies import NOT_UTF8
from helpers.config.backends import ConditioningBackend, ImageBackend
from helpers.config.jsonfile import load_json
from helpers.data.dataset import Dataset, plan_dataset
from helpers.data.pairing import UNPAIRED, pair, without_controls
from helpers.data.preparation import cached_sizes, scan_backend
from helpers.data.records import Record
from helpers.data.scan import NO_CAPTION, LeftOut, Scan
from helpers.files import on_one_line, printable
from helpers.images.geometry import MAX_ASPECT, Plan
from helpers.images.loading import Unreadable, load, transparent_share
from helpers.models.loading import at_hand
from helpers.models.spaces import Latents, Pixels
from helpers.models.text import CLIP, T5, length_counter

CAPTION_SUFFIXES = (".txt", ".caption", ".captions", ".cap", ".tags")
"""Names under which others keep captions as plain text; only .txt is read."""

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".xmp")
"""Names under which captions lie among other things."""

LEAST_SHOWN = 0.25
"""An image of which every crop shows less than this is told."""

LETTERS = 60
"""How much of a caption is shown."""


@dataclass(frozen=True)
class Finding:
    """One thing to know before training. `file` is None where it is about the dataset as a whole."""

    dataset: str
    file: Path | None
    kind: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Audited:
    """A dataset as training would use it, with all that was found about its images.

    `decode_seconds` is how long it took to decode each of them once, as filling their cache does too; `space` says what
    is kept there.
    """

    dataset: Dataset
    method: str
    findings: tuple[Finding, ...]
    decode_seconds: float
    space: Pixels | Latents

    @property
    def found(self) -> int:
        return len(self.dataset.records) + len(self.dataset.left_out)

    @property
    def image_bytes(self) -> int:
        """What the caches of its images take on the disk."""
        controls = {job.key: job.size for job in self.dataset.control_jobs(self.method)}
        own = sum(cached_sizes(self.dataset, self.method, self.space).values())
        return own + sum(Pixels().cached_bytes(size) for size in controls.values())


@dataclass(frozen=True)
class _Look:
    """What decoding an image told: why that failed, or a hash of its pixels and its share of transparent ones."""

    reason: str | None
    pixels: str = ""
    transparent: float = 0.0


def audit_images(
    backend: ImageBackend,
    alignment: int,
    enlarge: bool = True,
    smallest: int = 1,
    space: Pixels | Latents = Pixels(),
    conditioning: ConditioningBackend | None = None,
) -> Audited:
    """Scan, plan and decode the images of one entry of the dataloader JSON.

    Args:
        alignment, enlarge, smallest: see `geometry.Rules`.
        conditioning: where each image has its conditioning image, where a ControlNet is trained.
    """
    found, method = scan_backend(backend, may_be_empty=True), backend.downsample_method
    planned = plan_dataset(backend, found, alignment, enlarge, smallest)
    paired, notes = _paired(planned, conditioning)
    began = time.perf_counter()
    looks, controls = _looks(paired.pixel_jobs(method), backend.id), _looks(paired.control_jobs(method), backend.id)
    seconds = time.perf_counter() - began
    failures = {r.path: reason for r in paired.records if (reason := looks[r.content].reason) is not None}
    dataset = without_controls(paired.without(failures), {
        record.control.path: reason for record in paired.records
        if record.control and (reason := controls[record.control.content].reason) is not None
    })
    about = _About(backend, smallest)
    findings = [
        *about.left_out(found, planned, failures),
        *about.controls(dataset, notes),
        *about.sizes(dataset),
        *about.transparency(dataset, looks),
        *about.duplicates(dataset, looks),
        *about.whole(dataset, found),
    ]
    return Audited(dataset, backend.downsample_method, tuple(findings), seconds, space)


@dataclass(frozen=True)
class TextSide:
    """What the small files of a model's text encoder tell, as far as they are at hand.

    Args:
        limit: how many tokens of a prepared text are read.
        length_of: how many it has; None where there is no tokenizer.
        width: numbers in the embed of a token; None where it is not known.
        not_looked_at: what cannot be told therefore.
    """

    limit: int
    length_of: Callable[[str], int] | None
    width: int | None
    not_looked_at: tuple[str, ...]

    def embed_bytes(self, texts: Iterable[str], storage: str) -> int | None:
        """What the embeds of these texts take on the disk, stored in one of the ways of `STORAGES`."""
        return None if self.width is None else len(set(texts)) * self.limit * STORAGES[storage].nbytes(self.width)


def text_side(text: T5 | CLIP, model: str, revision: str | None) -> TextSide:
    """Look at a model's text side without its weights and without a download."""
    length_of, width, missing = None, None, ["how long a step takes: only training tells"]
    tokenizer = at_hand(model, revision, "tokenizer/tokenizer_config.json")
    why = "is not here, and a check downloads nothing"
    if tokenizer:
        try:
            length_of = length_counter(tokenizer.parent)
        except Exception as error:  # the tokenizers' library raises nothing more special
            why = f"cannot be read ({error})"
    if length_of is None:
        missing.append(f"whether captions are cut at {text.length} tokens: the tokenizer of {model} {why}")
    encoder = at_hand(model, revision, "text_encoder/config.json")
    try:
        width = int(load_json(encoder)[text.width_key]) if encoder else None
    except (OSError, ValueError, LookupError, TypeError):
        width = None
    if width is None:
        missing.append(f"what text embeds take on the disk: the text encoder's configuration of {model} is not here")
    return TextSide(text.length, length_of, width, tuple(missing))


def audit_captions(
    audited: Audited, backend: ImageBackend, prepared: Mapping[str, str], text: TextSide
) -> Iterator[Finding]:
    """What becomes of a dataset's captions once they are prepared for the text encoder.

    Args:
        prepared: the text that is encoded for each caption.
    """
    about = _About(backend)
    told = cache(lambda caption: tuple(about.caption(caption, prepared[caption], text)))
    for record in audited.dataset.records:
        for caption in record.captions:
            for kind, reason, remedy in told(caption):
                yield Finding(backend.id, record.path, kind, reason, remedy)


class _About:
    """Findings about one entry of the dataloader JSON."""

    def __init__(self, backend: ImageBackend, smallest: int = 1) -> None:
        self._backend = backend
        self._smallest = smallest
        self._id = backend.id
        self._names = cache(lambda folder: frozenset(os.listdir(folder)))
        self._texts = cache(lambda folder: _texts_by_stem(self._names(folder)))

    def left_out(self, found: Scan, planned: Dataset, failures: Mapping[Path, str]) -> Iterator[Finding]:
        for entry in found.left_out:
            if entry.reason.startswith(NO_CAPTION):
                yield self._without_caption(entry)
            else:
                yield self._unreadable(entry.path, entry.reason)
        sizes = {record.path: record.size for record in found.records}
        for entry in planned.left_out[len(found.left_out) :]:
            size = sizes[entry.path]
            extreme = max(size) > MAX_ASPECT * min(size)
            remedy = "crop it" if extreme else self._for_too_small(entry.reason)
            kind = "extreme aspect" if extreme else "too small"
            yield Finding(self._id, entry.path, kind, f"left out: {entry.reason}", remedy)
        for path, reason in failures.items():
            yield self._unreadable(path, reason)

    def _for_too_small(self, reason: str) -> str:
        """What helps where an image is too small: what was asked for may be lowered, what the model needs may not."""
        backend, by_minimum = self._backend, "minimum_image_size" in reason
        in_pixels, may_lower = backend.resolution_type == "pixel", by_minimum
        if not by_minimum:
            may_lower = not in_pixels or backend.resolution > self._smallest
        option = "minimum_image_size" if by_minimum else "resolution"
        return "replace it by a larger one" + (f", or lower {option}" if may_lower else "")

    def controls(self, dataset: Dataset, notes: Iterable[str]) -> Iterator[Finding]:
        """What is wrong with the conditioning images."""
        for entry in dataset.left_out:
            if entry.reason.startswith(UNPAIRED):
                remedy = "make its conditioning image anew, or remove both"
                reason = f"left out: {entry.reason.removeprefix(UNPAIRED)}"
                yield Finding(self._id, entry.path, UNPAIRED.removesuffix(": "), reason, remedy)
        for note in notes:
            remedy = "see whether the two folders belong together"
            yield Finding(self._id, None, "conditioning images", note, remedy)

    def _unreadable(self, path: Path, reason: str) -> Finding:
        remedy = "replace it by a sound JPEG or PNG, or remove it"
        if "cannot be read: " in reason:
            remedy = "see to its permissions and its disk, or remove it"
        return Finding(self._id, path, "unreadable", f"left out: {reason}", remedy)

    def _without_caption(self, entry: LeftOut) -> Finding:
        reason = entry.reason.removeprefix(NO_CAPTION)
        remedy = "write its caption there, or set caption_strategy to filename or instanceprompt"
        if reason.endswith(NOT_UTF8):
            remedy = "save it as UTF-8"
        if self._backend.caption_strategy == "filename":
            remedy = "rename it so that its name is its caption, in UTF-8"
        elif beside := self._beside(entry.path):
            expected, plain = entry.path.stem + ".txt", beside[0].lower().endswith(CAPTION_SUFFIXES)
            reason += f"; there is {', '.join(map(printable, beside))}, which is not read"
            remedy = f"rename {printable(beside[0])} to {printable(expected)}"
            if not plain:
                remedy = f"write the caption in {printable(beside[0])} to {printable(expected)}"
        return Finding(self._id, entry.path, "no caption", f"left out: {reason}", remedy)

    def _beside(self, path: Path) -> list[str]:
        """The files beside an image that look like its caption by name, but are not read: those of plain text first."""
        texts = self._texts(path.parent).get(path.stem.casefold(), [])
        return [name for name in texts if name != path.stem + ".txt"]

    def sizes(self, dataset: Dataset) -> Iterator[Finding]:
        for record, plans in zip(dataset.records, dataset.plans):
            enlarged = [plan for plan in plans if plan.upsampled]
            if enlarged:
                factor = max(plan.intermediate.width / plan.source.width for plan in enlarged)
                reason = f"is {record.size} and is enlarged {factor:.1f} times to fill {enlarged[0].target}"
                remedy = "replace it by a larger one, or leave such images out by minimum_image_size"
                yield Finding(self._id, record.path, "enlarged", reason, remedy)
            shown, plan = max(((_shown(plan), plan) for plan in plans), key=lambda entry: entry[0])
            if shown < LEAST_SHOWN:
                reason = f"is {record.size}: a crop of {plan.target} shows {shown:.0%} of it at most"
                remedy = "crop it to what its caption says, or set crop_aspect to preserve"
                yield Finding(self._id, record.path, "extreme aspect", reason, remedy)

    def transparency(self, dataset: Dataset, looks: Mapping[str, _Look]) -> Iterator[Finding]:
        for record in dataset.records:
            if share := looks[record.content].transparent:
                reason = f"is transparent in {_percent(share)} of its pixels, which train as shown on white"
                remedy = "put it on the background that it should have"
                yield Finding(self._id, record.path, "transparent", reason, remedy)

    def duplicates(self, dataset: Dataset, looks: Mapping[str, _Look]) -> Iterator[Finding]:
        by_content: dict[str, Record] = {}
        by_pixels: dict[str, Record] = {}
        remedy = "remove one of the two, or use repeats where it should be seen more often"
        for record in dataset.records:
            same = by_content.setdefault(record.content, record)
            alike = by_pixels.setdefault(looks[record.content].pixels, record)
            if same is not record:
                reason = f"is the same file as {printable(same.path)}"
            elif alike is not record:
                reason = f"has the same pixels as {printable(alike.path)} at the size that both are trained from"
            else:
                continue
            yield Finding(self._id, record.path, "duplicate", reason, remedy)

    def whole(self, dataset: Dataset, found: Scan) -> Iterator[Finding]:
        """What is to be said of the dataset as such."""
        if not dataset.records:
            count = len(dataset.left_out)
            files = f"none of its {count:,} files can be used" if count else "it holds no images"
            remedy = "name a folder with images that fit as instance_data_dir, or set disabled to true"
            yield Finding(self._id, None, "unusable dataset", f"{files}: training would be refused", remedy)
        for note in found.notes:
            yield Finding(self._id, None, "several frames", note, "save the frame that is meant as an image of its own")
        if self._backend.caption_strategy == "filename" and not self._backend.only_instance_prompt:
            with_text = [r.path for r in dataset.records if r.path.stem + ".txt" in self._names(r.path.parent)]
            if with_text:
                reason = f"{len(with_text):,} images have a .txt beside them, but captions are read from file names"
                remedy = "set caption_strategy to textfile"
                yield Finding(self._id, with_text[0].with_suffix(".txt"), "unread captions", reason, remedy)

    def caption(self, caption: str, prepared: str, text: TextSide) -> Iterator[tuple[str, str, str]]:
        """Kind, reason and remedy of what is to be said of a caption."""
        shown = repr(shorten(on_one_line(caption), LETTERS, placeholder=" ..."))
        if not prepared:
            reason = f"its caption {shown} is empty once cleaned as the model was trained, and trains as no prompt"
            yield "empty caption", reason, "write it in Latin letters"
        elif erased := sorted(erased_words(caption, prepared)):
            trigger = set(re.findall(r"\w+", (self._backend.instance_prompt or "").lower()))
            for word in erased:
                what = "the trigger word" if word in trigger else "the word"
                reason = f"cleaning, as the model was trained, erases {what} {word!r} of its caption {shown}"
                yield "erased word", reason, "replace it by a word of plain letters, without digits"
        if text.length_of and (tokens := text.length_of(prepared)) > text.limit:
            reason = f"its caption {shown} has {tokens} tokens, of which {text.limit} are read"
            yield "cut caption", reason, "shorten it, with what matters first"


def _paired(dataset: Dataset, conditioning: ConditioningBackend | None) -> tuple[Dataset, tuple[str, ...]]:
    """The images that have their conditioning images, and what is to be said of these."""
    if conditioning is None:
        return dataset, ()
    partners = scan_backend(conditioning, may_be_empty=True)
    dataset, notes = pair(dataset, partners, conditioning.instance_data_dir)
    return dataset, partners.notes + notes


def _looks(all_jobs: Iterable[PixelJob], dataset_id: str) -> dict[str, _Look]:
    """Each content, decoded once at the first size that it is trained from."""
    jobs: dict[str, PixelJob] = {}
    for job in all_jobs:
        jobs.setdefault(job.content, job)
    workers = cores()
    with ThreadPoolExecutor(workers) as threads:
        results = in_order(threads, _look, jobs.values(), window=4 * workers)
        bar = tqdm(results, total=len(jobs), desc=f"decoding {dataset_id}", unit="image", leave=False, delay=1)
        return {job.content: look for job, look in bar}


def _look(job: PixelJob) -> _Look:
    try:
        pixels = load(job.path, job.size, job.method)
        digest = hashlib.blake2b(f"{job.size} ".encode() + pixels.tobytes(), digest_size=16).hexdigest()
        return _Look(None, digest, transparent_share(job.path))
    except Unreadable as error:
        return _Look(error.reason)


def _shown(plan: Plan) -> float:
    """How much of an image a crop of the plan's aspect can show."""
    aspects = plan.source.width / plan.source.height, plan.target.width / plan.target.height
    return min(aspects) / max(aspects)


def _texts_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of a folder that may hold a caption, by each name without extension whose caption they may be.

    In lower case, and those of plain text first: a.txt.txt may be meant for a.jpg, and for a.txt.jpg.
    """
    names, texts = sorted(names), CAPTION_SUFFIXES + DATA_SUFFIXES
    others = {Path(name).stem.casefold() for name in names if not name.lower().endswith(texts)}
    found: dict[str, list[str]] = {}
    for suffixes in (CAPTION_SUFFIXES, DATA_SUFFIXES):
        for name in (name for name in names if name.lower().endswith(suffixes)):
            stem, parts = Path(name).stem.casefold(), name.casefold().split(".")
            for end in range(1, len(parts)):
                shorter = ".".join(parts[:end])
                # photo.2.txt is the caption of photo.2.jpg where there is one, not a misnamed one of photo.jpg.
                if shorter == stem or stem not in others:
                    found.setdefault(shorter, []).append(name)
    return found


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"
