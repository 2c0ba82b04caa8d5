"""The optimizers by the name that `--optimizer` gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optimi
import torch
from torch.nn import Parameter


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
    # Kahan summation keeps what an update loses to bfloat16's 8 bits of precision and adds it to a later one. Plain
    # AdamW in bfloat16 makes 58 % of the intended movement at lr 4e-5, and 2 % at 1e-6.
    return optimi.AdamW(
        parameters,
        lr,
        betas=(adam.beta1, adam.beta2),
        eps=adam.epsilon,
        weight_decay=adam.weight_decay,
        kahan_sum=True,
    )


OPTIMIZERS: dict[str, Callable[[Sequence[Parameter], float, AdamSettings], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_bf16": _adamw_bf16,
}
