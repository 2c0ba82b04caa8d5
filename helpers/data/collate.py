"""From a planned batch to tensors: cached pixels and cached embeddings, read into buffers that are used again.

A fresh tensor of 10-40 MB for each batch costs more in page faults than reading it costs; worker processes would
copy everything once more. So a few buffers go round, and one thread reads ahead.
"""

from __future__ import annotations

import math
import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from helpers.caching.embeds import EmbedCache
from helpers.caching.pixels import PixelCache, pixel_key
from helpers.data.sampler import BatchPlan, Position, Use
from helpers.processes import Share

Item = TypeVar("Item")
_END = object()


class Source(NamedTuple):
    """The caches of one dataset; `method` is the downsample_method that its pixels were made with."""

    pixels: PixelCache
    embeds: EmbedCache
    method: str


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch: they live in reused buffers, so clone what has to outlast the following batch."""

    images: Tensor  # uint8 [B, H, W, 3]
    prompt_embeds: Tensor  # bfloat16 [B, 77, D]
    uses: tuple[Use, ...]
    share: Share | None = None  # what of a whole batch it is, where several processes train

    def to(self, device: torch.device) -> Batch:
        return replace(self, images=self.images.to(device), prompt_embeds=self.prompt_embeds.to(device))


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
        self._ring = cycle([_Slot(pin_memory) for _ in range(ahead + 1)])

    def __call__(self, plan: BatchPlan) -> Batch:
        source = self._sources[plan.dataset_id]
        slot = next(self._ring)
        images = slot.images(len(plan.uses), plan.target.height, plan.target.width, 3)
        keys = [pixel_key(use.record.content, use.plan.intermediate, source.method) for use in plan.uses]
        source.pixels.announce(keys)
        for image, key, use in zip(images.numpy(), keys, plan.uses):
            source.pixels.read_into(key, image, left=use.box[0], top=use.box[1])
        embeds = slot.embeds(len(plan.uses), *source.embeds.row_shape)
        source.embeds.read([self._prepared[use.caption] for use in plan.uses], embeds)
        return Batch(images, embeds, plan.uses, plan.share)

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

    def __init__(self, pin_memory: bool) -> None:
        self.images = Buffer(torch.uint8, pin_memory)
        self.embeds = Buffer(torch.bfloat16, pin_memory)


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
