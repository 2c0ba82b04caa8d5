"""Learning-rate schedules as functions of the optimizer step, so that there is no state to save."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every optimizer step of a run.

    Attributes:
        schedule: a key of `SHAPES`.
        highest: the rate after the warm-up.
        end: where decays arrive at the last step, and the bottom of every valley of those that oscillate.
        warmup_steps: steps of linear rise; 0 is none.
        total_steps: optimizer steps of the whole run.
        power: of the polynomial.
        cycles: over the run: waves of the sine; valleys of the cosine and decays of cosine_with_restarts, which are
            whole numbers.
    """

    schedule: str
    highest: float
    end: float
    warmup_steps: int
    total_steps: int
    power: float = 1.0
    cycles: float = 1.0

    def at(self, step: int) -> float:
        """The rate of optimizer step `step`, 0 <= step < total_steps."""
        if step < self.warmup_steps and self.schedule != "constant":
            return self.highest * (step + 1) / (self.warmup_steps + 1)
        last = self.total_steps - 1 - self.warmup_steps
        share = SHAPES[self.schedule](self, min(step - self.warmup_steps, last), last) if last > 0 else 1.0
        return self.end + (self.highest - self.end) * share


def _sine(rate: LearningRate, step: int, last: int) -> float:
    return _between(_turns(last, 2 * rate.cycles), step)


def _cosine(rate: LearningRate, step: int, last: int) -> float:
    """Down, and for each further cycle up and down again."""
    return _between(_turns(last, 2 * rate.cycles - 1), step)


def _cosine_with_restarts(rate: LearningRate, step: int, last: int) -> float:
    starts = [round((last + 1) * cycle / rate.cycles) for cycle in range(int(rate.cycles) + 1)]
    return _between([turn for start, next in pairwise(starts) for turn in ((start, 1.0), (next - 1, 0.0))], step)


def _turns(last: int, half_waves: float) -> list[tuple[int, float]]:
    """The steps at which a wave is at its top (1) or its bottom (0). They are whole, so that it gets there exactly."""
    return [(round(last * number / half_waves), 1.0 - number % 2) for number in range(math.ceil(half_waves) + 1)]


def _between(turns: Sequence[tuple[int, float]], step: int) -> float:
    """The height at `step` of a line through `turns` (step, height) that is half a cosine between each two of them."""
    after = bisect_right(turns, step, key=lambda turn: turn[0])
    (start, left), (stop, right) = turns[after - 1], turns[min(after, len(turns) - 1)]
    progress = (step - start) / (stop - start) if stop > start else 0.0
    return right + (left - right) * (1 + math.cos(math.pi * progress)) / 2


# From a step 0..last after the warm-up to the part of the way from `end` up to `highest`.
SHAPES: dict[str, Callable[[LearningRate, int, int], float]] = {
    "constant": lambda rate, step, last: 1.0,
    "constant_with_warmup": lambda rate, step, last: 1.0,
    "linear": lambda rate, step, last: 1 - step / last,
    "polynomial": lambda rate, step, last: (1 - step / last) ** rate.power,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "sine": _sine,
}
