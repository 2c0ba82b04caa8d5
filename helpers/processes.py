"""The processes that train one model together, one for each GPU: who does what, and what they tell each other.

Gradients go from GPU to GPU by NCCL. All else is numbers and names; it goes over gloo, as JSON: no pickle is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from helpers.heartbeat import Pulse
from helpers.launch import rank_and_count

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long one waits for the others, who may encode captions or validate for hours. Losing one is seen otherwise."""


class TooFewGPUs(Exception):
    """There are more processes than GPUs."""


class PeerLost(Exception):
    """Another process ended while this one needed it."""


@dataclass(frozen=True)
class Share:
    """The images of a batch that one process trains: `start` to `stop` of its `total`.

    Attributes:
        weight: of this process's mean over its images in the mean of all processes' means, so that it is the mean over
            all images; 0 for a process that stands in with an image of another one, where there are too few for all.
    """

    start: int
    stop: int
    total: int
    weight: float = 1.0


@dataclass(frozen=True)
class Processes:
    """One of `count` processes, the `rank`-th from 0. The first one writes, prints and draws pictures for all."""

    rank: int = 0
    count: int = 1
    pulse: Pulse = field(default_factory=Pulse)
    _talk: distributed.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> Share:
        """What of a batch of `total` images, 1 or more, this one trains: as many as the others, or one fewer."""
        start, stop = total * self.rank // self.count, total * (self.rank + 1) // self.count
        if start == stop:
            return Share(0, 1, total, weight=0.0)
        return Share(start, stop, total, (stop - start) * self.count / total)

    def has(self, key: str) -> bool:
        """Whether this one makes the record of a cache that has this key, which is hexadecimal.

        Not by its place among those that are missing: the others may have made some while this one looked.
        """
        return int(key[:8], 16) % self.count == self.rank

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in the order of their ranks: anything that JSON can hold.

        Raises:
            PeerLost: one has ended.
        """
        if self.count == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with lost_peers_told():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            distributed.all_gather(sizes, torch.tensor([len(content)]), group=self._talk)
            longest = int(max(sizes))
            padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
            own = torch.nn.functional.pad(content, (0, longest - len(content)))
            distributed.all_gather(padded, own, group=self._talk)
        return [json.loads(told[: int(size)].numpy().tobytes()) for told, size in zip(padded, sizes)]

    def union(self, value: Mapping[str, T]) -> dict[str, T]:
        """What each process knows, joined."""
        return {key: known for told in self.gather(dict(value)) for key, known in told.items()}

    def highest(self, number: int) -> int:
        """The highest of the numbers that the processes give.

        Raises:
            PeerLost: one has ended.
        """
        if self.count == 1:
            return number
        told = torch.tensor([number])
        with lost_peers_told():
            distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._talk)
        return int(told)

    def wait(self) -> None:
        """Until all are here.

        Raises:
            PeerLost: one has ended.
        """
        self.highest(0)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first one makes, known to all; the others do not make it. Anything that JSON can hold."""
        return self.gather(make() if self.is_first else None)[0]

    def first_does(self, action: Callable[[], object]) -> None:
        """The first one does it; the others wait until it is done."""
        if self.is_first:
            action()
        self.wait()

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first one goes through it alone, then all others: what it downloads or notes down is there for them."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


@contextmanager
def connected(pulse: Pulse) -> Iterator[Processes]:
    """Within it this process is one of those that a launcher started, on its own GPU; without a launcher it is alone.

    Raises:
        TooFewGPUs: there are some, but not one for each.
        PeerLost: another one has ended, wherever that shows.
    """
    rank, count = rank_and_count()
    if count == 1:
        yield Processes(pulse=pulse)
        return
    if 0 < torch.cuda.device_count() < count:
        words = f"found {count}, but this machine has {torch.cuda.device_count()} GPUs: type that"
        raise TooFewGPUs(f"export TRAINING_NUM_PROCESSES: {words}")
    from accelerate import PartialState

    with lost_peers_told():
        # It chooses the GPU and, for gradients, NCCL or gloo; where nothing is said, a CPU is taken for alone.
        PartialState(cpu=not torch.cuda.is_available())
        yield Processes(rank, count, pulse, distributed.new_group(backend="gloo", timeout=PATIENCE))
        distributed.destroy_process_group()


@contextmanager
def lost_peers_told() -> Iterator[None]:
    """Within it the many words in which gloo and NCCL tell of a process that has ended become `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        if not _tells_of_peers(error):
            raise
        # Of "[a file of gloo's] Connection closed by peer. What that may come of. What to do." what happened.
        raise PeerLost(str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]) from error


def _tells_of_peers(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
