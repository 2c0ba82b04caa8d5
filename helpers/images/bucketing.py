"""Images of one target size belong together: only they can share a batch."""

from __future__ import annotations

from collections.abc import Sequence

from helpers.sizes import Size


def buckets(targets: Sequence[Size]) -> dict[Size, list[int]]:
    """The positions of each target size, sizes in ascending order, positions in theirs."""
    members: dict[Size, list[int]] = {size: [] for size in sorted(set(targets))}
    for position, size in enumerate(targets):
        members[size].append(position)
    return members
