"""The plans of a dataset's images, as compact as a million of them have to be: tables of numbers, not objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import overload

import numpy as np

from helpers.images.geometry import Plan
from helpers.sizes import Size

KEPT = 4096
"""Sizes of images whose plans are kept as objects once they were asked for."""


class Plans(Sequence[tuple[Plan, ...]]):
    """The plans that each image may be trained by. Images of one size share theirs.

    Args:
        choices: the plans of each size of images.
        numbers: by image which of the choices it has, int `[N]`.
    """

    def __init__(self, choices: Sequence[tuple[Plan, ...]], numbers: Sequence[int]) -> None:
        rows = [plan for plans in choices for plan in plans]
        geometry = [(*plan.source, *plan.intermediate, *plan.target) for plan in rows]
        self._geometry = np.array(geometry, np.int32).reshape(-1, 6)
        self._weights = np.array([plan.weight for plan in rows], np.float64)
        self._starts = np.cumsum([0, *map(len, choices)], dtype=np.int32)
        self._use(numbers)

    def _use(self, numbers: Sequence[int]) -> None:
        self._numbers = np.asarray(numbers, np.int32)
        self._plans, self._sums = lru_cache(KEPT)(self._made), lru_cache(KEPT)(self._summed)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[Plan, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> Plans: ...

    def __getitem__(self, index: int | slice) -> tuple[Plan, ...] | Plans:
        if isinstance(index, slice):
            return self.taken(np.arange(len(self))[index])
        return self._plans(int(self._numbers[index]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(own == another for own, another in zip(self, other))

    __hash__ = None

    def taken(self, indices: Sequence[int]) -> Plans:
        """The plans of these images, in their order."""
        plans = object.__new__(Plans)
        plans._geometry, plans._weights, plans._starts = self._geometry, self._weights, self._starts
        plans._use(self._numbers[np.asarray(indices, np.int64)])
        return plans

    def counted(self) -> Iterator[tuple[tuple[Plan, ...], int]]:
        """The plans of each size of images, and how many images have them."""
        numbers, counts = np.unique(self._numbers, return_counts=True)
        return zip(map(self._made, numbers.tolist()), counts.tolist())

    def first_rows(self) -> np.ndarray:
        """By image the number of its first plan in the table of all, int32 `[N]`; its others follow."""
        return self._starts[self._numbers]

    def targets(self) -> list[Size]:
        """The target of each plan in the table."""
        return [Size(*target) for target in self._geometry[:, 4:].tolist()]

    def drawn(self, index: int, u: float) -> int:
        """Which of an image's plans is drawn by a uniform number in [0, 1): by their weights."""
        sums = self._sums(int(self._numbers[index]))
        return next((i for i, upper in enumerate(sums) if u * sums[-1] < upper), len(sums) - 1)

    def has_choices(self) -> bool:
        """Whether any image has several plans."""
        return bool((np.diff(self._starts)[self._numbers] > 1).any())

    def _rows(self, number: int) -> slice:
        return slice(int(self._starts[number]), int(self._starts[number + 1]))

    def _made(self, number: int) -> tuple[Plan, ...]:
        rows = self._rows(number)
        return tuple(
            Plan(Size(*numbers[:2]), Size(*numbers[2:4]), Size(*numbers[4:]), weight)
            for numbers, weight in zip(self._geometry[rows].tolist(), self._weights[rows].tolist())
        )

    def _summed(self, number: int) -> tuple[float, ...]:
        return tuple(accumulate(self._weights[self._rows(number)].tolist()))
