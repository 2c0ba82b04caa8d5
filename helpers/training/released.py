"""Updates that are made while the backward pass goes on, so that the gradients never lie in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from helpers.training.nonfinite import gradient_norm
from helpers.training.rounding import chunks_of, slices

BUCKET = 1 << 23
"""Elements of a bucket, at the least. With fewer a GPU is waited for more often, with more there are more gradients."""


class Released:
    """Has an optimizer update a bucket of parameters as soon as their gradients are there, and frees these.

    Where all parameters get gradients, the weights and the optimizer's state become those of a step that is made of all
    of these at once, to the bit: `config/checks.py` lets no optimizer through that looks at more than one parameter at
    a time. What is left after
    the backward pass, since a parameter of a bucket had no gradient, is left to the optimizer's own step, which also
    counts the step.

    Where the loss is not finite, nothing is updated. Where a gradient is not, neither its bucket nor any after it is:
    the buckets before are updated already, and stay so.

    Attributes:
        updated: the parameters that were updated in the last backward pass.
        count: all of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        groups = [group["params"] for group in optimizer.param_groups]
        pieces_of = getattr(optimizer, "pieces_of", slices)
        self._arrivals = [
            Arrivals(buckets_of(group, pieces_of), partial(self._update, number)) for number, group in enumerate(groups)
        ]
        self.count = sum(map(len, groups))
        self.updated = 0

    def begin(self, loss: Tensor) -> None:
        """Take the loss, a scalar, before its backward pass."""
        self._largest = loss.detach().abs()
        self.updated = 0
        for arrivals in self._arrivals:
            arrivals.restart()

    def norm(self) -> Tensor:
        """A number that is finite where the loss and all gradients of the pass are; on the device."""
        left = [one.grad for group in self._optimizer.param_groups for one in group["params"] if one.grad is not None]
        return torch.maximum(self._largest, gradient_norm(left)) if left else self._largest

    def _update(self, group: int, bucket: Sequence[Parameter]) -> None:
        self._largest = torch.maximum(self._largest, gradient_norm([parameter.grad for parameter in bucket]))
        if self._largest.isfinite():
            with _alone(self._optimizer, group, bucket):
                self._optimizer.step()
            self.updated += len(bucket)
        for parameter in bucket:
            parameter.grad = None


class Arrivals:
    """Calls `complete` with each bucket whose parameters have all got their gradients, in a backward pass."""

    def __init__(
        self, buckets: Sequence[Sequence[Parameter]], complete: Callable[[Sequence[Parameter]], None]
    ) -> None:
        self._buckets, self._complete = buckets, complete
        self.restart()
        for number, bucket in enumerate(buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, number))

    def restart(self) -> None:
        """Wait for all gradients, as before the first pass: in the last one some may not have come."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def _arrive(self, number: int, parameter: Parameter) -> None:
        self._missing[number] -= 1
        if not self._missing[number]:
            self._complete(self._buckets[number])


def buckets_of(
    parameters: Sequence[Parameter], pieces_of: Callable[[Tensor], Sequence[Tensor]]
) -> list[list[Parameter]]:
    """Runs of parameters that end where a chunk of their pieces does, as soon as they have `BUCKET` elements.

    So an optimizer that goes by such chunks makes the same ones of a bucket as of all parameters.
    """
    pieces = [(index, piece) for index, parameter in enumerate(parameters) for piece in pieces_of(parameter)]
    owners = [index for index, _ in pieces]
    buckets, begun = [], 0
    for chunk in chunks_of([piece for _, piece in pieces]):
        end = owners[chunk.stop - 1] + 1
        run, is_last = parameters[begun:end], chunk.stop == len(pieces)
        ends_inside = not is_last and owners[chunk.stop] < end
        if is_last or (not ends_inside and sum(parameter.numel() for parameter in run) >= BUCKET):
            buckets.append(run)
            begun = end
    return buckets


@contextmanager
def _alone(optimizer: torch.optim.Optimizer, group: int, bucket: Sequence[Parameter]) -> Iterator[None]:
    """Within it the optimizer has this bucket of one of its groups to update, and does not count that as a step."""
    before = [{key: one[key] for key in ("params", "step") if key in one} for one in optimizer.param_groups]
    for number, one in enumerate(optimizer.param_groups):
        one["params"] = bucket if number == group else []
    try:
        yield
    finally:
        for one, kept in zip(optimizer.param_groups, before):
            one.update(kept)
