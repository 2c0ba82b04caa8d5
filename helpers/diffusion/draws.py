"""The random numbers of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.processes import Share


@dataclass(frozen=True)
class Draws:
    """Draws for the images of a batch that this process trains; without a share, for all of them.

    Numbers are drawn for the whole batch, and those of the others dropped: so each image has the same ones however
    many processes there are, and the generator stands at the same place in each of them.
    """

    generator: torch.Generator
    share: Share | None = None

    def normal(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1) of `shape` `[B, ...]`, float32, on the generator's device."""
        drawn, own = self._drawn(shape[0])
        return torch.randn((drawn, *shape[1:]), generator=self.generator, device=self.generator.device)[own]

    def uniform(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """U[0, 1) `[B]`."""
        drawn, own = self._drawn(count)
        return torch.rand(drawn, dtype=dtype, device=device, generator=self.generator)[own]

    def integers(self, high: int, count: int) -> Tensor:
        """Of 0..high-1, int64 `[B]`, on the generator's device."""
        drawn, own = self._drawn(count)
        return torch.randint(high, (drawn,), generator=self.generator, device=self.generator.device)[own]

    def _drawn(self, count: int) -> tuple[int, slice]:
        """For how many images to draw, and which of them are the `count` own ones."""
        if self.share is None:
            return count, slice(None)
        return self.share.total, slice(self.share.start, self.share.stop)
