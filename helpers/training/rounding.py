"""Weights that are kept in bfloat16 and updated in float32, with nothing lost to bfloat16's 8 bits of precision.

A bfloat16 weight cannot take a step below 1/512 of itself if it is rounded to the nearest; rounded up or down with a
probability that makes the mean exact, it takes all of them, weight decay included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

CHUNK = 1 << 22
"""Elements that are updated at a time, which bounds the float32 copies (20 to 32 bytes an element) of large models."""


class InFloat32(torch.optim.Optimizer):
    """Another optimizer, one that looks at each parameter by itself, for weights that are kept in bfloat16.

    It is given float32 stand-ins of weights and gradients, and the weights take what it makes of them, rounded
    stochastically. A stand-in has values only while its chunk is updated; what stays is the other optimizer's own
    state. The random bits come from a generator seeded with the step: a resumed run draws the same ones.
    """

    def __init__(
        self, params: Iterable[Parameter], lr: float, make: Callable[[list[Parameter]], torch.optim.Optimizer]
    ) -> None:
        """`make` gives the other optimizer, with one group, of the parameters that it is called with."""
        super().__init__(params, {"lr": lr, "step": 0})
        [group] = self.param_groups
        self._stand_ins = {parameter: Parameter(_nothing(parameter)) for parameter in group["params"]}
        self._inner = make(list(self._stand_ins.values()))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        [group], [inner] = self.param_groups, self._inner.param_groups
        group["step"] += 1
        inner["lr"], everything = group["lr"], inner["params"]
        generators = Generators(group["step"])
        for chunk in chunks_of([parameter for parameter in group["params"] if parameter.grad is not None]):
            inner["params"] = [self._stand_ins[parameter] for parameter in chunk]
            weights = self._lend_values(chunk, inner["params"])
            self._inner.step()
            scatter(chunk, stochastically_rounded(weights, chunk[0].dtype, generators.on(chunk[0].device)))
            for parameter in inner["params"]:
                parameter.data, parameter.grad = _nothing(parameter), None
        inner["params"] = everything
        return loss

    def _lend_values(self, chunk: Sequence[Parameter], stand_ins: Sequence[Parameter]) -> Tensor:
        """Give the stand-ins the chunk's values and gradients; returns the memory that all the values lie in."""
        weights, gradients = flat(chunk), flat([parameter.grad for parameter in chunk])
        for stand_in, value, gradient in zip(stand_ins, views(weights, chunk), views(gradients, chunk)):
            stand_in.data, stand_in.grad = value, gradient
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self._inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict["inner"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "inner"})


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def stochastically_rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 `values` in `dtype`; for bfloat16 rounded to one of two neighbours, on average to the value itself."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    # bfloat16 is the upper half of a float32: noise of the size of the lower half carries with just that probability.
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class Generators:
    """A generator for each device, all seeded alike."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._by_device: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._by_device:
            self._by_device[device] = torch.Generator(device).manual_seed(self._seed)
        return self._by_device[device]


def chunks_of(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Runs of parameters of one device and dtype, of up to `CHUNK` elements; a larger one is a chunk by itself."""
    chunk: list[Parameter] = []
    elements = 0
    for parameter in parameters:
        alike = chunk and (chunk[0].device, chunk[0].dtype) == (parameter.device, parameter.dtype)
        if chunk and not (alike and elements + parameter.numel() <= CHUNK):
            yield chunk
            chunk, elements = [], 0
        chunk.append(parameter)
        elements += parameter.numel()
    if chunk:
        yield chunk


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """A float32 copy of all elements, in one dimension."""
    gathered = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return gathered.float()  # `cat` made a copy already


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of `flat` that belong to the tensors it was made of, in their shapes."""
    return [piece.view(tensor.shape) for piece, tensor in zip(flat.split([one.numel() for one in like]), like)]


def scatter(tensors: Sequence[Tensor], flat: Tensor) -> None:
    torch._foreach_copy_(list(tensors), views(flat, tensors))
