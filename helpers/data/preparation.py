"""Everything that happens to a run's data before the UNet is loaded: scan, plan, and fill the caches."""

from __future__ import annotations

import gc
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from helpers.caching.embeds import EmbedCache
from helpers.caching.pixels import PixelCache
from helpers.captions.cleaning import erased_words
from helpers.config.backends import Backends, ImageBackend
from helpers.data.collate import Source
from helpers.data.dataset import Dataset, plan_dataset
from helpers.data.scan import Captions, Scan, scan
from helpers.models.text import CLIP, T5, TextEncoder
from helpers.processes import Processes

NULL_CAPTION = ""
NAMED = 5
"""How many words or captions a note gives as examples."""


@dataclass(frozen=True)
class TextCaches:
    """The embed cache of each text entry of the dataloader JSON, by its id; the default serves all else.

    `prepared` has the text that was encoded for each caption (see `prepare_captions`).
    """

    by_id: Mapping[str, EmbedCache]
    default_id: str
    prepared: Mapping[str, str]

    @property
    def default(self) -> EmbedCache:
        return self.by_id[self.default_id]


def scan_and_plan(
    backend: ImageBackend, alignment: int, enlarge: bool = True, smallest: int = 1
) -> tuple[Dataset, tuple[str, ...]]:
    """Find a dataset's images and plan each; also what the user should be told of them.

    Args:
        alignment, enlarge, smallest: see `geometry.Rules`.

    Raises:
        DatasetError: the folder is missing, or nothing in it can be used.
    """
    found = scan_backend(backend)
    return plan_dataset(backend, found, alignment, enlarge, smallest), found.notes


def scan_backend(backend: ImageBackend, may_be_empty: bool = False) -> Scan:
    """The images of one entry of the dataloader JSON; see `scan`."""
    folder = hashlib.blake2b(os.fsencode(backend.instance_data_dir), digest_size=8).hexdigest()
    captions = Captions(
        backend.caption_strategy,
        backend.instance_prompt,
        backend.prepend_instance_prompt,
        backend.only_instance_prompt,
    )
    index = backend.cache_dir / f"scan-{folder}.jsonl"
    with tqdm(desc=f"scanning {backend.id}", unit="file", leave=False, delay=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return scan(
            backend.id, backend.instance_data_dir, index, captions, on_progress=show, may_be_empty=may_be_empty
        )


def prepare_captions(text: T5 | CLIP, captions: Iterable[str]) -> dict[str, str]:
    """Every caption, and the empty one, with the text that the encoder reads.

    All else looks it up here: cleaning takes 0.3-0.5 ms a caption, which while training would hold a whole epoch to
    2,100 samples a second. The memory is about 250 bytes for a caption of 100 letters.
    """
    unique = dict.fromkeys([NULL_CAPTION, *captions])
    bar = tqdm(unique, desc="cleaning captions", unit="caption", leave=False, delay=1)
    return {caption: _prepared(text, caption) for caption in bar}


def _prepared(text: T5 | CLIP, caption: str) -> str:
    prepared = text.prepare(caption)
    return caption if prepared == caption else prepared  # one string, not two equal ones


def caption_notes(dataset: Dataset, prepared: Mapping[str, str]) -> list[str]:
    """What the text side makes of a dataset's captions that its user should know before training."""
    empty: list[str] = []
    erased: Counter[str] = Counter()
    for caption in dataset.captions():
        if not prepared[caption]:
            empty.append(caption)
        erased.update(erased_words(caption, prepared[caption]))
    notes = []
    if empty:
        notes.append(
            f"dataset {dataset.id!r}: {len(empty):,} captions are empty once cleaned as the model was trained, and so"
            f" train as the empty prompt: {_listed(empty)}. Write them in Latin letters."
        )
    if erased:
        notes.append(
            f"dataset {dataset.id!r}: cleaning, as the model was trained, erases words that the model will therefore not"
            f" learn: {_listed([word for word, _ in erased.most_common()])}. A trigger word of plain letters stays."
        )
    return notes


def _listed(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words[:NAMED])) + (", ..." if len(words) > NAMED else "")


def cache_pixels(
    dataset: Dataset, backend: ImageBackend, processes: Processes = Processes()
) -> tuple[Dataset, PixelCache]:
    """Decode and shrink what is not cached yet; images that cannot be decoded leave the dataset, with the reason."""
    pixels = PixelCache(backend.cache_dir)
    jobs = dataset.pixel_jobs(backend.downsample_method)
    own = pixels.build(jobs, name=f"dataset {dataset.id!r}", mine=processes.has)
    failed = processes.union({os.fspath(path): reason for path, reason in own.items()})
    if processes.count > 1:
        pixels.store.refresh()
    return dataset.without({Path(path): reason for path, reason in failed.items()}), pixels


def open_text_caches(
    text: T5 | CLIP, model: Path, backends: Backends, prepared: Mapping[str, str], variant: str | None = None
) -> TextCaches:
    """Open the embed caches that belong to this model's text encoder, in the variant that is loaded."""
    fingerprint = text.fingerprint(model, variant)
    by_id = {entry.id: EmbedCache(entry.cache_dir, fingerprint) for entry in backends.text_embeds}
    default = next((entry for entry in backends.text_embeds if entry.default), backends.text_embeds[0])
    return TextCaches(by_id, default.id, prepared)


def cache_texts(
    text: T5 | CLIP,
    model: Path,
    caches: TextCaches,
    wanted: Mapping[str, Sequence[str]],
    batch_size: int,
    device: torch.device,
    variant: str | None = None,
    processes: Processes = Processes(),
) -> None:
    """Encode the captions that no cache has yet. The encoder is loaded only for that, once, and freed again.

    Several processes share the captions out, if there are so many that each fills a batch; else the first one does it.

    Args:
        wanted: the captions that each cache must hold, as their users wrote them, by the cache's id.
    """
    texts = {cache_id: [caches.prepared[caption] for caption in captions] for cache_id, captions in wanted.items()}
    missing = processes.from_first(lambda: sum(len(caches.by_id[name].missing(some)) for name, some in texts.items()))
    if not missing:
        for cache_id, some in texts.items():
            print(f"Text embeds: {caches.by_id[cache_id].plan(some)}")
    elif processes.is_first or missing > batch_size * processes.count:
        mine = processes.has if missing > batch_size * processes.count else None
        _encode(text.load(model, device, variant), caches, texts, batch_size, mine)
        _give_back_memory(device)
    if processes.count > 1:
        processes.wait()
        for embeds in caches.by_id.values():
            embeds.store.refresh()


def _encode(
    encoder: TextEncoder,
    caches: TextCaches,
    texts: Mapping[str, Sequence[str]],
    batch_size: int,
    mine: Callable[[str], bool] | None,
) -> None:
    for cache_id, some in texts.items():
        caches.by_id[cache_id].build(some, encoder, encoder.length_of, batch_size, encoder.length, mine)


def _give_back_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def source_of(backend: ImageBackend, pixels: PixelCache, texts: TextCaches) -> Source:
    """Where the collator reads a dataset's samples."""
    return Source(pixels, texts.by_id[backend.text_embeds], backend.downsample_method)
