"""torchao's 8-bit AdamW, as a run uses it: a rate that is a plain number, a state of plain tensors.

This module needs torchao, which is optional.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit


class TorchaoAdamW8bit(AdamW8bit):
    """AdamW with moments of 8 bits (Dettmers et al. 2022, blocks of 256), rounded stochastically to bfloat16 weights.

    torchao compiles the step for each shape of weights. On a CPU that would need a C++ compiler, so it is not done.
    Its rounding makes -0.0 of CUDA's NaN, 0x7FFFFFFF, which would look sound: here such weights become NaN.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"])  # torchao takes no number, which would be compiled in
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            loss = super().step(closure)
        for parameter in (one for group in self.param_groups for one in group["params"] if one.grad is not None):
            parameter.detach().masked_fill_(parameter.grad.isnan(), torch.nan)
        return loss

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        states = {
            index: {name: _unwrapped(value) for name, value in state.items()}
            for index, state in packed["state"].items()
        }
        return {**packed, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = {
            index: {name: _wrapped(value) for name, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})


def _unwrapped(value: object) -> object:
    """torchao's tensor of 8 bits as the tensors that it is made of."""
    if not isinstance(value, OptimState8bit):
        return value
    return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}


def _wrapped(value: object) -> object:
    return OptimState8bit(**value, dtype=torch.float32) if isinstance(value, dict) else value
