"""AdamW that keeps its moments in the weights' own bfloat16 too, with nothing lost to its 8 bits of precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from helpers.training.rounding import chunks_of, flat, generator_of, scatter, slices, stochastically_rounded


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), computed in float32 and rounded stochastically to what is kept.

    Weights and both moments stay in the parameters' dtype: 8 bytes a parameter with its gradient, half of float32.
    Kahan summation in bfloat16 goes less far: it loses steps below 2^-17 of the weight, so norm scales and weight decay
    stand still at small rates.

    Parameters are gathered into flat chunks, and large ones cut into several: so a step takes some dozens of kernels, not
    some for each parameter, and little memory beside what stays.
    The random bits go by the step and the chunk: a resumed run draws the same ones.

    Attributes:
        pieces_of: how it cuts a parameter.
    """

    pieces_of = staticmethod(slices)

    def __init__(
        self, params: Iterable[Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        places = accumulate((len(slices(parameter)) for parameter in parameters), initial=0)
        self._places = dict(zip(parameters, places))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["step"] += 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            rows = (
                parameters,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [parameter.grad for parameter in parameters],
            )
            pieces = [[piece for tensor in row for piece in slices(tensor)] for row in rows]
            places = [self._places[one] + number for one in parameters for number, _ in enumerate(slices(one))]
            for chunk in chunks_of(pieces[0]):
                *kept, gradients = (row[chunk] for row in pieces)
                bits = generator_of(group["step"], places[chunk.start], gradients[0].device)
                self._update(kept, gradients, group, bits)
        return loss

    def _update(
        self,
        kept: Sequence[Sequence[Tensor]],
        gradients: Sequence[Tensor],
        group: dict[str, Any],
        generator: torch.Generator,
    ) -> None:
        """`kept`: weights, means of gradients, and means of squared ones, which are updated in place."""
        beta1, beta2 = group["betas"]
        weights, exp_avg, exp_avg_sq = (flat(tensors) for tensors in kept)
        gradient = flat(gradients)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.lerp_(gradient.square_(), 1 - beta2)
        root = (exp_avg_sq / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(exp_avg, root, value=-group["lr"] / (1 - beta1 ** group["step"]))
        for tensors, updated in zip(kept, (weights, exp_avg, exp_avg_sq)):
            scatter(tensors, stochastically_rounded(updated, tensors[0].dtype, generator))

    def _state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state
