"""AdamW for weights that are kept in bfloat16, with nothing lost to its 8 bits of precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

CHUNK = 1 << 22
"""Elements that are updated at a time, which bounds the float32 copies (about 20 bytes an element) of large models."""


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), computed in float32 and rounded stochastically to what is kept.

    Weights and both moments stay in the parameters' dtype: 8 bytes a parameter with its gradient, half of float32. A
    bfloat16 weight cannot take a step below 1/512 of itself if it is rounded to the nearest; rounded up or down with a
    probability that makes the mean exact, it takes all of them, weight decay included. Kahan summation in bfloat16 goes
    less far: it loses steps below 2^-17 of the weight, so norm scales and weight decay stand still at small rates.

    Parameters are gathered into flat chunks, so that a step takes some dozens of kernels, not some for each parameter.
    The random bits come from a generator seeded with the step: a resumed run draws the same ones.
    """

    def __init__(
        self, params: Iterable[Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["step"] += 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            generators = _Generators(group["step"])
            for chunk in _chunks(parameters):
                self._update(chunk, group, generators.on(chunk[0].device))
        return loss

    def _update(self, chunk: Sequence[Parameter], group: dict[str, Any], generator: torch.Generator) -> None:
        beta1, beta2 = group["betas"]
        states = [self._state_of(parameter) for parameter in chunk]
        kept = (list(chunk), [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states])
        weights, exp_avg, exp_avg_sq = (_flat(tensors) for tensors in kept)
        gradient = _flat([parameter.grad for parameter in chunk])
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.lerp_(gradient.square_(), 1 - beta2)
        root = (exp_avg_sq / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(exp_avg, root, value=-group["lr"] / (1 - beta1 ** group["step"]))
        for tensors, updated in zip(kept, (weights, exp_avg, exp_avg_sq)):
            _scatter(tensors, stochastically_rounded(updated, tensors[0].dtype, generator))

    def _state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def stochastically_rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 `values` in `dtype`; for bfloat16 rounded to one of the two neighbours, on average to the value itself."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    # bfloat16 is the upper half of a float32: noise of the size of the lower half carries with just that probability.
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class _Generators:
    """A generator for each device, all seeded alike."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._by_device: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._by_device:
            self._by_device[device] = torch.Generator(device).manual_seed(self._seed)
        return self._by_device[device]


def _chunks(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
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


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """A float32 copy of all elements, in one dimension."""
    gathered = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return gathered.float()  # `cat` made a copy already


def _scatter(tensors: Sequence[Tensor], flat: Tensor) -> None:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors)])
