"""From a planned batch to tensors: cached pixels and cached embeddings, read into buffers that are used again.

A fresh tensor of 10-40 MB for each batch costs more in page faults than reading it costs; worker processes would
copy everything once more. So a few buffers go round, and one thread reads ahead.
"""

from __future__ import annotations

import math
import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from helpers.caching.embeds import EmbedCache
from helpers.caching.latents import LatentCache, latent_key
from helpers.caching.pixels import PixelCache, pixel_key
from helpers.caching.tokens import Tokens
from helpers.data.sampler import BatchPlan, Position, Use
from helpers.processes import Share

Item = TypeVar("Item")
_END = object()


@dataclass(frozen=True)
class CachedPixels:
    """Images as they were cached; `method` is the downsample_method that they were made with."""

    cache: PixelCache
    method: str
    dtype: torch.dtype = torch.uint8

    def read(self, uses: Sequence[Use], buffer: Buffer) -> Tensor:
        """The crops of a batch, uint8 `[B, H, W, 3]`."""
        images = buffer(len(uses), uses[0].plan.target.height, uses[0].plan.target.width, 3)
        keys = [pixel_key(use.record.content, use.plan.intermediate, self.method) for use in uses]
        self.cache.read(keys, [use.box[:2] for use in uses], images.numpy())
        return images


@dataclass(frozen=True)
class CachedMoments:
    """What a VAE made of the crops of a dataset; see `CachedPixels`."""

    cache: LatentCache
    method: str
    dtype: torch.dtype = torch.float16

    def read(self, uses: Sequence[Use], buffer: Buffer) -> Tensor:
        """What is cached of a batch, float16 `[B, C', h, w]`: see `Latents.cached_of`."""
        keys = [latent_key(use.record.content, use.plan.intermediate, self.method, use.box) for use in uses]
        moments = buffer(len(uses), *self.cache.store.shape(keys[0]))
        self.cache.read(keys, moments)
        return moments


class Source(NamedTuple):
    """Where the images and the captions of one dataset are read, and its conditioning images if it has any."""

    images: CachedPixels | CachedMoments
    embeds: EmbedCache | Tokens
    control: CachedPixels | None = None


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch: they live in reused buffers, so clone what has to outlast the following batch."""

    images: Tensor  # what the model's space encodes: uint8 [B, H, W, 3], or moments float16 [B, C', h, w]
    prompt_embeds: Tensor  # bfloat16 [B, 77, D]; for a text encoder in training the tokens, int64 [B, 77]
    uses: tuple[Use, ...]
    share: Share | None = None  # what of a whole batch it is, where several processes train
    control: Tensor | None = None  # the conditioning images, uint8 [B, H, W, 3]

    def to(self, device: torch.device) -> Batch:
        control = None if self.control is None else self.control.to(device)
        images, embeds = self.images.to(device), self.prompt_embeds.to(device)
        return replace(self, images=images, prompt_embeds=embeds, control=control)


class Collator:
    """Reads batches into a ring of buffers: the tensors of a batch stay valid while `ahead` more are read.

    `prepared` has the text that was encoded for each caption: to make it here would cost more than all the reading.
    Copy a batch to a device before asking for the next: with pinned buffers, without `non_blocking`.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        prepared: Mapping[str, str],
        ahead: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._sources = sources
        self._prepared = prepared
        self._ahead = ahead
        [dtypes] = {(source.images.dtype, source.embeds.dtype) for source in sources.values()}
        self._ring = cycle([_Slot(*dtypes, pin_memory) for _ in range(ahead + 1)])

    def __call__(self, plan: BatchPlan) -> Batch:
        source = self._sources[plan.dataset_id]
        slot = next(self._ring)
        images = source.images.read(plan.uses, slot.images)
        embeds = slot.embeds(len(plan.uses), *source.embeds.row_shape)
        source.embeds.read([self._prepared[use.caption] for use in plan.uses], embeds)
        control = source.control and self._control(source.control, plan.uses, slot.control)
        return Batch(images, embeds, plan.uses, plan.share, control)

    @staticmethod
    def _control(control: CachedPixels, uses: Sequence[Use], buffer: Buffer) -> Tensor:
        """The conditioning images, by the plans and boxes of their images."""
        return control.read([use._replace(record=use.record.control) for use in uses], buffer)

    def stream(self, plans: Iterable[tuple[Position, BatchPlan]]) -> Iterator[tuple[Position, Batch]]:
        """Each position with its batch, read ahead of their use by one thread."""
        return prefetch(((position, self(plan)) for position, plan in plans), self._ahead)


def prefetch(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items; one thread makes up to `depth` of them ahead. Its errors come up here, in their turn."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        pending = deque(thread.submit(next, iterator, _END) for _ in range(depth))
        while (item := pending.popleft().result()) is not _END:
            pending.append(thread.submit(next, iterator, _END))
            yield item


class _Slot:
    """The buffers of one batch; each grows to the largest size asked for, then is used again."""

    def __init__(self, images: torch.dtype, embeds: torch.dtype, pin_memory: bool) -> None:
        self.images = Buffer(images, pin_memory)
        self.embeds = Buffer(embeds, pin_memory)
        self.control = Buffer(torch.uint8, pin_memory)


class Buffer:
    """Memory for one tensor after another; it grows to the largest that was asked for."""

    def __init__(self, dtype: torch.dtype, pin_memory: bool = False) -> None:
        self._pin_memory = pin_memory
        self._memory = torch.empty(0, dtype=dtype)

    def __call__(self, *shape: int) -> Tensor:
        """A tensor of this shape over the buffer's memory, with whatever is in it."""
        count = math.prod(shape)
        if self._memory.numel() < count:
            self._memory = _memory(count, self._memory.dtype, self._pin_memory)
        return self._memory[:count].view(shape)


def _memory(count: int, dtype: torch.dtype, pin_memory: bool) -> Tensor:
    """Memory in huge pages where Linux has them: copying an embed into it takes 58 us, into small pages 71."""
    if pin_memory or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, pin_memory=pin_memory)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count)
