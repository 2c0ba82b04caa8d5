"""Aspect buckets: only images of one target size can share a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from helpers.sizes import Size


class Batches(NamedTuple):
    """Batch k is members[starts[k]:stops[k]]; the batches of one bucket follow each other."""

    members: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def numbered(targets: Iterable[Size]) -> dict[Size, int]:
    """The buckets: each size with its number, by ascending size, whatever the order of the images."""
    return {size: number for number, size in enumerate(sorted(set(targets)))}


def batches(order: np.ndarray, buckets: np.ndarray, batch_size: int) -> Batches:
    """Cut an order of images into batches of one bucket; what remains of a bucket makes a smaller batch.

    Args:
        order: the images' indices, as they are to come within each bucket.
        buckets: the number of each image's bucket, by its index.
    """
    if not len(order):
        return Batches(order, order, order)
    members = order[np.argsort(buckets[order], kind="stable")]
    edges = np.flatnonzero(np.diff(buckets[members], prepend=-1, append=-1))  # where a bucket begins, and the end
    starts = np.concatenate([np.arange(a, b, batch_size) for a, b in zip(edges, edges[1:])])
    ends = edges[np.searchsorted(edges, starts, side="right")]  # of the bucket that each batch is in
    return Batches(members, starts, np.minimum(starts + batch_size, ends))
