"""The optimizers by the name that `--optimizer` gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from helpers.training.adamw_bf16 import AdamWBf16


@dataclass(frozen=True)
class AdamSettings:
    """What all variants of Adam share."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


def _adamw(parameters: Sequence[Parameter], lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr, betas=(adam.beta1, adam.beta2), eps=adam.epsilon, weight_decay=adam.weight_decay, fused=True
    )


def _adamw_bf16(parameters: Sequence[Parameter], lr: float, adam: AdamSettings) -> torch.optim.Optimizer:
    return AdamWBf16(parameters, lr, (adam.beta1, adam.beta2), adam.epsilon, adam.weight_decay)


OPTIMIZERS: dict[str, Callable[[Sequence[Parameter], float, AdamSettings], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_bf16": _adamw_bf16,
}
