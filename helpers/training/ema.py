"""The moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.nn import Parameter

from helpers.training.rounding import chunks_of, slices


class EMA:
    """An exponential moving average in float32, by diffusers' `EMAModel`, of the parameters that are trained.

    Its own update would take a copy of the whole average, so here it goes a chunk at a time.

    At update n the old average counts min(decay, n / (9 + n)), so that it covers about the last tenth of a run until
    `decay` is reached: at 0.999 after 9,000 steps.

    Args:
        decay: the share that the old average keeps at each update, 0 < decay < 1.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self.restart()

    def restart(self) -> None:
        """Begin anew at the parameters as they are."""
        self._average = EMAModel(self._parameters, decay=self._decay, foreach=True)
        self._average.to(dtype=torch.float32)  # at 0.999 an average in bfloat16 would never move

    def update(self) -> None:
        """Take in the parameters as they are, once an optimizer step."""
        self._average.optimization_step += 1
        share = 1 - self._average.get_decay(self._average.optimization_step)
        averages = [piece for average in self._average.shadow_params for piece in slices(average)]
        weights = [piece.detach() for parameter in self._parameters for piece in slices(parameter)]
        for chunk in chunks_of(weights):
            differences = torch._foreach_sub(averages[chunk], weights[chunk])
            torch._foreach_sub_(averages[chunk], differences, alpha=share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in place of the parameters, which come back as they were; they wait on the CPU."""
        self._average.store(self._parameters)
        try:
            self._average.copy_to(self._parameters)
            yield
        finally:
            self._average.restore(self._parameters)

    def state(self) -> dict[str, Any]:
        return {"updates": self._average.optimization_step, "weights": self._average.shadow_params}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._average.optimization_step = state["updates"]
        torch._foreach_copy_(self._average.shadow_params, list(state["weights"]))
