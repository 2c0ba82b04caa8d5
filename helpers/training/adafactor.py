"""Adafactor, as a run uses it: with a state that is small for convolutions too."""

from __future__ import annotations

from collections.abc import Callable

from transformers.optimization import Adafactor

from helpers.training.rounding import whole


class MatrixAdafactor(Adafactor):
    """transformers' Adafactor, which sees a convolution's weight `[O, I, k, k]` as the matrix `[O, I k k]`.

    It keeps sums over the last two dimensions only: of 3x3 weights two numbers for three, of 1x1 weights two for each.

    Attributes:
        pieces_of: how it cuts a parameter: not at all.
    """

    pieces_of = staticmethod(whole)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        lent = [(one, one.data, one.grad) for one in parameters if one.ndim > 2 and one.grad is not None]
        for parameter, values, gradient in lent:
            parameter.grad = None  # it must have its parameter's shape
            parameter.data, parameter.grad = values.view(len(values), -1), gradient.reshape(len(values), -1)
        super().step()
        for parameter, values, gradient in lent:
            parameter.grad = None
            parameter.data, parameter.grad = values, gradient
        return loss
