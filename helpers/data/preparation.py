"""Everything that happens to a run's data before the UNet is loaded: scan, plan, and fill the caches."""

from __future__ import annotations

import gc
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from helpers.caching.embeds import EmbedCache
from helpers.caching.images import ImageCache
from helpers.caching.latents import LatentCache
from helpers.caching.pixels import PixelCache
from helpers.caching.tokens import Tokens
from helpers.captions.cleaning import erased_words
from helpers.config.backends import Backends, ConditioningBackend, ImageBackend
from helpers.data.collate import CachedMoments, CachedPixels, Source
from helpers.data.dataset import Dataset, plan_dataset
from helpers.data.pairing import pair, without_controls
from helpers.data.scan import Captions, Scan, scan
from helpers.models import footprint
from helpers.models.spaces import Latents, Pixels
from helpers.models.text import CLIP, T5, TextEncoder
from helpers.processes import Processes
from helpers.sizes import Size

NULL_CAPTION = ""
USUAL_CAPTIONS, MOST_CAPTIONS = 8, 64
"""Captions that are encoded at a time. On an H100 T5-XXL encodes 210 a second by 8, 470 by 32 and no more by more."""
RESERVED = 500_000_000
"""Bytes of a GPU that are left free beside an encoder: its kernels take some for themselves."""
NAMED = 5
"""How many words or captions a note gives as examples."""


@dataclass(frozen=True)
class TextCaches:
    """The embed cache of each text entry of the dataloader JSON, by its id; the default serves all else.

    Where the text encoder is trained, all of them are the captions' tokens instead.
    `prepared` has the text that was encoded for each caption (see `prepare_captions`).
    """

    by_id: Mapping[str, EmbedCache | Tokens]
    default_id: str
    prepared: Mapping[str, str]

    @property
    def default(self) -> EmbedCache | Tokens:
        return self.by_id[self.default_id]


def scan_and_plan(
    backend: ImageBackend,
    alignment: int,
    enlarge: bool = True,
    smallest: int = 1,
    crops_once: bool = False,
    conditioning: ConditioningBackend | None = None,
) -> tuple[Dataset, tuple[str, ...]]:
    """Find a dataset's images and plan each; also what the user should be told of them.

    Args:
        alignment, enlarge, smallest, crops_once: see `geometry.Rules`.
        conditioning: where each image has its conditioning image, without which it is left out.

    Raises:
        DatasetError: the folder is missing, or nothing in it can be used.
    """
    found = scan_backend(backend)
    dataset = plan_dataset(backend, found, alignment, enlarge, smallest, crops_once)
    if conditioning is None:
        return dataset, found.notes
    partners = scan_backend(conditioning)
    dataset, notes = pair(dataset, partners, conditioning.instance_data_dir)
    return dataset, found.notes + partners.notes + notes


def scan_backend(backend: ImageBackend | ConditioningBackend, may_be_empty: bool = False) -> Scan:
    """The images of one entry of the dataloader JSON; see `scan`."""
    folder = hashlib.blake2b(os.fsencode(backend.instance_data_dir), digest_size=8).hexdigest()
    captions = _captions(backend) if isinstance(backend, ImageBackend) else None
    index = backend.cache_dir / f"scan-{folder}.jsonl"
    with tqdm(desc=f"scanning {backend.id}", unit="file", leave=False, delay=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return scan(
            backend.id, backend.instance_data_dir, index, captions, on_progress=show, may_be_empty=may_be_empty
        )


def _captions(backend: ImageBackend) -> Captions:
    return Captions(
        backend.caption_strategy,
        backend.instance_prompt,
        backend.prepend_instance_prompt,
        backend.only_instance_prompt,
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
) -> tuple[Dataset, CachedPixels]:
    """Decode and shrink what is not cached yet; images that cannot be decoded leave the dataset, with the reason."""
    pixels, method = PixelCache(backend.cache_dir), backend.downsample_method
    failed = pixels.build(dataset.pixel_jobs(method), name=f"dataset {dataset.id!r}", mine=processes.has)
    return _without_failed(dataset, failed, pixels, processes), CachedPixels(pixels, method)


def cache_controls(
    dataset: Dataset, backend: ImageBackend, conditioning: ConditioningBackend, processes: Processes = Processes()
) -> tuple[Dataset, CachedPixels]:
    """As `cache_pixels`, of the conditioning images of a dataset; their images leave it with them."""
    pixels, method = PixelCache(conditioning.cache_dir), backend.downsample_method
    name = f"conditioning images {conditioning.id!r}"
    failed = _of_all(pixels.build(dataset.control_jobs(method), name=name, mine=processes.has), pixels, processes)
    return without_controls(dataset, failed), CachedPixels(pixels, method)


def cached_sizes(dataset: Dataset, method: str, space: Pixels | Latents) -> dict[str, int]:
    """Bytes of each record in the cache of a dataset's images, by its key."""
    if isinstance(space, Pixels):
        return {job.key: space.cached_bytes(job.size) for job in dataset.pixel_jobs(method)}
    crops = {job.key: job.box for job in dataset.latent_jobs(method)}
    return {key: space.cached_bytes(Size(box[2] - box[0], box[3] - box[1])) for key, box in crops.items()}


class VAE:
    """A VAE that is loaded only if there is anything to encode."""

    def __init__(self, space: Latents, folder: Path, device: torch.device, variant: str | None = None) -> None:
        self.fingerprint = space.fingerprint(folder, variant)
        self._space, self._device = space, device
        self._load = cache(lambda: space.load(folder, device, variant))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Latents.cached_of`."""
        return self._space.cached_of(self._load(), images)

    def close(self) -> None:
        """Give its memory back."""
        self._load.cache_clear()
        _give_back_memory(self._device)


def cache_latents(
    dataset: Dataset, backend: ImageBackend, vae: VAE, batch_size: int, processes: Processes = Processes()
) -> tuple[Dataset, CachedMoments]:
    """As `cache_pixels`, but what is cached is what a VAE makes of each crop.

    Args:
        batch_size: crops that are encoded at a time.
    """
    latents, method = LatentCache(backend.cache_dir, vae.fingerprint), backend.downsample_method
    name = f"dataset {dataset.id!r}"
    failed = latents.encode(dataset.latent_jobs(method), vae, batch_size, name, processes.has)
    return _without_failed(dataset, failed, latents, processes), CachedMoments(latents, method)


def _without_failed(
    dataset: Dataset, own: Mapping[Path, str], images: ImageCache, processes: Processes
) -> Dataset:
    """The dataset without what any process could not decode; see `_of_all`."""
    return dataset.without(_of_all(own, images, processes))


def _of_all(own: Mapping[Path, str], images: ImageCache, processes: Processes) -> dict[Path, str]:
    """What any process could not decode; afterwards all of them have what the others cached."""
    failed = processes.union({os.fspath(path): reason for path, reason in own.items()})
    if processes.count > 1:
        images.store.refresh()
    return {Path(path): reason for path, reason in failed.items()}


def open_text_caches(
    text: T5 | CLIP,
    model: Path,
    backends: Backends,
    prepared: Mapping[str, str],
    variant: str | None = None,
    storage: str = "bf16",
) -> TextCaches:
    """Open the embed caches that belong to this model's text encoder, in the variant that is loaded."""
    fingerprint = text.fingerprint(model, variant)
    by_id = {entry.id: EmbedCache(entry.cache_dir, fingerprint, storage) for entry in backends.text_embeds}
    default = next((entry for entry in backends.text_embeds if entry.default), backends.text_embeds[0])
    return TextCaches(by_id, default.id, prepared)


def tokenized_texts(text: CLIP, model: Path, backends: Backends, prepared: Mapping[str, str]) -> TextCaches:
    """The tokens of all captions and prompts, in place of embed caches: for a text encoder in training."""
    tokens, entries = Tokens(prepared.values(), text.tokenizer(model)), backends.text_embeds
    return TextCaches({entry.id: tokens for entry in entries}, entries[0].id, prepared)


def cache_texts(
    text: T5 | CLIP,
    model: Path,
    caches: TextCaches,
    wanted: Mapping[str, Sequence[str]],
    batch_size: int | None,
    device: torch.device,
    variant: str | None = None,
    processes: Processes = Processes(),
) -> None:
    """Encode the captions that no cache has yet. The encoder is loaded only for that, once, and freed again.

    Several processes share the captions out, if there are so many that each fills a batch; else the first one does it.
    Embeds in 8 bits are made of exact ones, as far as there are such: that the first one does.

    Args:
        wanted: the captions that each cache must hold, as their users wrote them, by the cache's id.
        batch_size: captions that are encoded at a time; None: as many as fit, see `fitting_batch`.
    """
    texts = {cache_id: [caches.prepared[caption] for caption in captions] for cache_id, captions in wanted.items()}
    processes.first_does(lambda: [caches.by_id[name].convert(some) for name, some in texts.items()])
    _see_what_others_stored(caches, processes)
    missing = processes.from_first(lambda: sum(len(caches.by_id[name].missing(some)) for name, some in texts.items()))
    if not missing:
        for cache_id, some in texts.items():
            print(f"Text embeds: {caches.by_id[cache_id].plan(some)}")
    else:
        batch_size = batch_size or fitting_batch(model, device)
        are_shared = missing > processes.from_first(lambda: batch_size) * processes.count
        if processes.is_first or are_shared:
            mine = processes.has if are_shared else None
            _encode(text.load(model, device, variant), caches, texts, batch_size, mine)
            _give_back_memory(device)
    processes.wait()
    _see_what_others_stored(caches, processes)


def _see_what_others_stored(caches: TextCaches, processes: Processes) -> None:
    if processes.count > 1:
        for embeds in caches.by_id.values():
            embeds.store.refresh()


def fitting_batch(model: Path, device: torch.device) -> int:
    """How many captions to encode at a time: on a GPU as many as its free memory holds, as far as more is faster."""
    if device.type != "cuda":
        return USUAL_CAPTIONS
    encoder = footprint.of_text_encoder(model / "text_encoder" / "config.json")
    free = torch.cuda.mem_get_info(device)[0] - encoder.weights - RESERVED
    return max(1, min(MOST_CAPTIONS, free // encoder.each))


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


def source_of(
    backend: ImageBackend,
    images: CachedPixels | CachedMoments,
    texts: TextCaches,
    control: CachedPixels | None = None,
) -> Source:
    """Where the collator reads a dataset's samples."""
    return Source(images, texts.by_id[backend.text_embeds], control)
