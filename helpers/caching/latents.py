"""The latent cache: what a VAE makes of each image's crop, encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers.caching.images import Decoded, ImageCache, Job
from helpers.files import printable
from helpers.images.loading import Unreadable
from helpers.sizes import Size

Box = tuple[int, int, int, int]
Encode = Callable[[torch.Tensor], torch.Tensor]
"""From images, uint8 `[B, H, W, 3]`, to what is cached of them, float16 `[B, ...]`, on the CPU."""


class NonFiniteLatent(ValueError):
    """The VAE returned inf or NaN; the message names the image."""


class LatentJob(NamedTuple):
    """The crop of an image to be cached; see `images.Job`. `box` is (left, top, right, bottom) inside `size`."""

    path: Path
    content: str
    size: Size
    method: str
    box: Box

    @property
    def key(self) -> str:
        return latent_key(self.content, self.size, self.method, self.box)


class LatentCache(ImageCache):
    """The moments of one VAE, by the content and the geometry of what it was shown.

    `fingerprint` says everything that they depend on besides. Each has its own folder inside `folder`, so that VAEs
    that share a cache_dir never mix.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        recipe = {"kind": "latents", "version": "2", **fingerprint}
        name = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=10).hexdigest()
        super().__init__(folder / name, recipe)

    def encode(
        self,
        jobs: Iterable[LatentJob],
        encode: Encode,
        batch_size: int,
        name: str = "latents",
        mine: Callable[[str], bool] | None = None,
    ) -> dict[Path, str]:
        """Encode what is missing, `batch_size` crops of one size at a time; returns the files that failed.

        See `ImageCache.build`. The largest crops come first: a VAE that does not fit fails at once.

        Raises:
            NonFiniteLatent: the VAE overflowed.
        """
        ordered = sorted(jobs, key=lambda job: _area(job.box), reverse=True)
        moments_of = partial(_encoded, encode=encode, batch_size=batch_size)
        return self.build(ordered, name=name, mine=mine, made_of=moments_of)

    def read(self, keys: Sequence[str], out: torch.Tensor) -> None:
        """Fill `out`, float16 `[B, C', h, w]` and contiguous, with what is cached of these crops.

        Raises:
            KeyError: a crop was not encoded.
        """
        for row, record in zip(out.view(torch.uint8).numpy().reshape(len(keys), -1), self.store.records(keys)):
            row[:] = record.content


def latent_key(content: str, size: Size, method: str, box: Box) -> str:
    """The key of a crop in the cache: `content` is the hash of the file's bytes."""
    words = f"{content} {size} {method} {' '.join(map(str, box))}"
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def _area(box: Box) -> tuple[int, int]:
    """What crops are ordered by: area, and width, so that those of one size follow each other."""
    width, height = box[2] - box[0], box[3] - box[1]
    return width * height, width


def _encoded(decoded: Decoded, encode: Encode, batch_size: int) -> Iterator[tuple[Job, np.ndarray | Unreadable]]:
    waiting: list[tuple[LatentJob, np.ndarray]] = []
    for job, image in decoded:
        if isinstance(image, Unreadable):
            yield job, image
            continue
        left, top, right, bottom = job.box
        crop = image[top:bottom, left:right]
        if waiting and (len(waiting) == batch_size or waiting[0][1].shape != crop.shape):
            yield from _batch(waiting, encode)
            waiting = []
        waiting.append((job, crop))
    if waiting:
        yield from _batch(waiting, encode)


def _batch(crops: Sequence[tuple[LatentJob, np.ndarray]], encode: Encode) -> Iterator[tuple[LatentJob, np.ndarray]]:
    moments = encode(torch.from_numpy(np.stack([crop for _, crop in crops])))
    for (job, _), row in zip(crops, moments):
        if not torch.isfinite(row).all():
            raise NonFiniteLatent(
                f"the VAE returned inf or NaN for {printable(job.path)}: its weights are damaged, or were made for less"
                " than float32 can hold; name another model (MODEL_NAME, --pretrained_model_name_or_path)"
            )
        yield job, row.numpy()
