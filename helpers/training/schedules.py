"""Learning-rate schedules as functions of the optimizer step, so that there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


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
        cycles: of the sine, over the run.
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
        decaying = self.total_steps - 1 - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / decaying) if decaying > 0 else 0.0
        return self.end + (self.highest - self.end) * SHAPES[self.schedule](self, progress)


# From progress 0..1 to the part of the way from `end` up to `highest`.
SHAPES: dict[str, Callable[[LearningRate, float], float]] = {
    "constant": lambda rate, progress: 1.0,
    "constant_with_warmup": lambda rate, progress: 1.0,
    "linear": lambda rate, progress: 1 - progress,
    "polynomial": lambda rate, progress: (1 - progress) ** rate.power,
    "cosine": lambda rate, progress: (1 + math.cos(math.pi * progress)) / 2,
    "sine": lambda rate, progress: (1 + math.cos(2 * math.pi * rate.cycles * progress)) / 2,
}
