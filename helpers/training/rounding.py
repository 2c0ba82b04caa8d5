"""Weights that are kept in bfloat16 and updated in float32, with nothing lost to bfloat16's 8 bits of precision.

A bfloat16 weight cannot take a step below 1/512 of itself if it is rounded to the nearest; rounded up or down with a
probability that makes the mean exact, it takes all of them, weight decay included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

CHUNK = 1 << 22
"""Elements that are updated at a time, which bounds the float32 copies (15 to 27 bytes an element) of large models.

Whole blocks of 256, so that moments of 8 bits have the same scales in slices. It decides which states `InFloat32`
keeps: with another value checkpoints cannot be gone on with.
"""


class InFloat32(torch.optim.Optimizer):
    """Another optimizer, one that looks at each parameter by itself, for weights that are kept in bfloat16.

    It is given float32 stand-ins of weights and gradients, and the weights take what it makes of them, rounded
    stochastically. A stand-in has values only while its chunk is updated; what stays is the other optimizer's own
    state. The random bits go by the step and the chunk: a resumed run draws the same ones.

    Args:
        make: gives the other optimizer, with the groups of parameters that it is called with.
        elementwise: whether it may be given a large parameter in slices, since no element's step needs the others.

    Attributes:
        pieces_of: how it cuts a parameter.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[Mapping[str, Any]],
        lr: float,
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        elementwise: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "step": 0})
        self.pieces_of = slices if elementwise else whole
        self._stand_ins = {
            parameter: [Parameter(_nothing(piece)) for piece in self.pieces_of(parameter)]
            for group in self.param_groups
            for parameter in group["params"]
        }
        self._places = {one: place for place, one in enumerate(self._stand_ins_of(self._stand_ins))}
        self._inner = make([{"params": self._stand_ins_of(group["params"])} for group in self.param_groups])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        everything = [inner["params"] for inner in self._inner.param_groups]
        for inner in self._inner.param_groups:
            inner["params"] = []
        for group, inner in zip(self.param_groups, self._inner.param_groups):
            group["step"] += 1
            inner["lr"] = group["lr"]
            self._step_of(group, inner)
            inner["params"] = []
        for inner, stand_ins in zip(self._inner.param_groups, everything):
            inner["params"] = stand_ins
        return loss

    def _step_of(self, group: dict[str, Any], inner: dict[str, Any]) -> None:
        """Update one group of parameters, while all other groups of the other optimizer are empty."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        weights = [piece for parameter in parameters for piece in self.pieces_of(parameter)]
        gradients = [piece for parameter in parameters for piece in self.pieces_of(parameter.grad)]
        stand_ins = self._stand_ins_of(parameters)
        for chunk in chunks_of(weights):
            kept, inner["params"] = weights[chunk], stand_ins[chunk]
            values = _lend(inner["params"], kept, gradients[chunk])
            self._inner.step()
            bits = generator_of(group["step"], self._places[inner["params"][0]], kept[0].device)
            scatter(kept, stochastically_rounded(values, kept[0].dtype, bits))
            for stand_in in inner["params"]:
                stand_in.data, stand_in.grad = _nothing(stand_in), None

    def _stand_ins_of(self, parameters: Iterable[Parameter]) -> list[Parameter]:
        return [stand_in for parameter in parameters for stand_in in self._stand_ins[parameter]]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self._inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict["inner"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "inner"})


def _lend(stand_ins: Sequence[Parameter], weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Give the stand-ins values and gradients in float32; returns the memory that all the values lie in."""
    values = flat(weights)
    for stand_in, value, gradient in zip(stand_ins, views(values, weights), views(flat(gradients), gradients)):
        stand_in.data, stand_in.grad = value, gradient
    return values


def whole(tensor: Tensor) -> Sequence[Tensor]:
    return [tensor]


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def stochastically_rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 `values` in `dtype`; for bfloat16 rounded to one of two neighbours, on average to the value itself.

    Infinities and NaN stay what they are.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    # bfloat16 is the upper half of a float32: noise of the size of the lower half carries with just that probability.
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
    # CUDA's NaN has all its lower bits set: with the noise it would have become -0.0, and look sound.
    return rounded.masked_fill_(values.isnan(), torch.nan)


def generator_of(step: int, place: int, device: torch.device) -> torch.Generator:
    """The random bits of a chunk: the same ones whichever chunks of the step were updated before it.

    Args:
        step: the number of the step, from 1.
        place: that of the chunk's first piece among all that the optimizer updates.
    """
    return torch.Generator(device).manual_seed(step + (place << 20))  # different for 4,096 places and 2^20 steps


def slices(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor itself; of one that is larger than a chunk its elements, flat, a chunk at a time. All are views."""
    return [tensor] if tensor.numel() <= CHUNK else tensor.detach().view(-1).split(CHUNK)


def chunks_of(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Runs of tensors of one device and dtype, of up to `CHUNK` elements; a larger one is a chunk by itself."""
    start = elements = 0
    for index, tensor in enumerate(tensors):
        alike = (tensors[start].device, tensors[start].dtype) == (tensor.device, tensor.dtype)
        if index > start and not (alike and elements + tensor.numel() <= CHUNK):
            yield slice(start, index)
            start, elements = index, 0
        elements += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """A float32 copy of all elements, in one dimension."""
    gathered = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return gathered.float()  # `cat` made a copy already


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of `flat` that belong to the tensors it was made of, in their shapes."""
    return [piece.view(tensor.shape) for piece, tensor in zip(flat.split([one.numel() for one in like]), like)]


def scatter(tensors: Sequence[Tensor], flat: Tensor) -> None:
    torch._foreach_copy_(list(tensors), views(flat, tensors))
