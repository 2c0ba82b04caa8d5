"""The optimizers by the name that `--optimizer` gives them.

For each, pure bfloat16 weights either keep all of the movement that float32 weights would make, or `config/checks.py`
refuses the pairing: `adamw` and `prodigy`. The libraries of the optional ones are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from helpers.libraries import bitsandbytes
from helpers.training.adamw_bf16 import AdamWBf16
from helpers.training.rounding import InFloat32


@dataclass(frozen=True)
class AdamSettings:
    """What all variants of Adam share. Lion has no epsilon, Adafactor only the weight decay."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2


RATE_FACTOR = "rate_factor"
"""By what a group of parameters multiplies the learning rate; without it, by 1."""

Trained = Sequence[Parameter] | Sequence[Mapping[str, Any]]
"""What an optimizer trains: parameters, or groups of them, as PyTorch has both."""

Make = Callable[[Trained, float, AdamSettings], torch.optim.Optimizer]


def _for_bf16_too(make: Make, elementwise: bool) -> Make:
    """An optimizer of float32 weights, made to lose nothing where the weights are bfloat16."""

    def made(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
        if all(parameter.dtype == torch.float32 for parameter in _parameters(parameters)):
            return make(parameters, lr, adam)
        return InFloat32(parameters, lr, lambda stand_ins: make(stand_ins, lr, adam), elementwise)

    return made


def _parameters(trained: Trained) -> list[Parameter]:
    return [one for some in trained for one in (some["params"] if isinstance(some, Mapping) else [some])]


def _adamw(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr, betas=adam.betas, eps=adam.epsilon, weight_decay=adam.weight_decay, fused=True
    )


def _adamw_bf16(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    return AdamWBf16(parameters, lr, adam.betas, adam.epsilon, adam.weight_decay)


def _adamw8bit(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    """Moments of 8 bits (Dettmers et al. 2022); float32 for parameters of less than 4096 elements."""
    return bitsandbytes().AdamW8bit(parameters, lr, adam.betas, adam.epsilon, adam.weight_decay)


def _ao_adamw8bit(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    from helpers.training.torchao_adamw import TorchaoAdamW8bit

    return TorchaoAdamW8bit(
        parameters, lr, adam.betas, adam.epsilon, adam.weight_decay, bf16_stochastic_round=True
    )


def _adafactor(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018) without its relative steps: the rate is ours, and means what it does to Adam.

    PyTorch's own scales each step by the size of the weights, so that a LoRA, which begins at zero, hardly moves.
    """
    from helpers.training.adafactor import MatrixAdafactor

    return MatrixAdafactor(parameters, lr, weight_decay=adam.weight_decay, scale_parameter=False, relative_step=False)


def _lion(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023), whose steps are all of the size of the rate."""
    return bitsandbytes().Lion(parameters, lr, adam.betas, adam.weight_decay)


def _prodigy(parameters: Trained, lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko & Defazio 2024) with what its authors recommend for diffusion models and for warm-ups."""
    from prodigyopt import Prodigy

    groups = parameters if isinstance(parameters[0], Mapping) else [{"params": parameters}]
    # As a keyword the weight decay would be announced on stdout.
    groups = [{**group, "weight_decay": adam.weight_decay} for group in groups]
    return Prodigy(groups, lr, adam.betas, eps=adam.epsilon, use_bias_correction=True, safeguard_warmup=True)


OPTIMIZERS: dict[str, Make] = {
    "adamw": _adamw,
    "adamw_bf16": _adamw_bf16,
    "adamw8bit": _for_bf16_too(_adamw8bit, elementwise=True),
    "ao_adamw8bit": _ao_adamw8bit,
    "adafactor": _for_bf16_too(_adafactor, elementwise=False),
    "lion": _for_bf16_too(_lion, elementwise=True),
    "prodigy": _prodigy,
}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Have the next step made at this learning rate; a group with a factor of its own at so much of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)


def restore_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on with a saved state, but with the settings and the groups' rates that the optimizer was made with."""
    optimizer.load_state_dict(_with_settings(state, optimizer.state_dict()))


def _with_settings(saved: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    groups = [
        group | {key: new[key] for key in ("betas", "eps", "weight_decay", RATE_FACTOR) if key in new}
        for group, new in zip(saved["param_groups"], made["param_groups"])
    ]
    inner = {"inner": _with_settings(saved["inner"], made["inner"])} if "inner" in saved else {}
    return {**saved, "param_groups": groups, **inner}
