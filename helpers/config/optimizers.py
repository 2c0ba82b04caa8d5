"""Plain facts about the optimizers, for checks that come before torch is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ADAM_SETTINGS = ("adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")


@dataclass(frozen=True)
class OptimizerFacts:
    """What the options of an optimizer are held against.

    Attributes:
        settings: those of `ADAM_SETTINGS` that it has.
        package: what `import` and `pip install` call its library, where that is not one that everything needs.
        learning_rate, beta2: the defaults.
        least_rate, greatest_rate: a learning_rate outside is a mistake. Prodigy's is only a factor of what it finds.
        one_rate: all that is trained has one rate.
        lost_in_bf16: what becomes of its steps where the weights are kept in bfloat16, if it cannot be used there.
        needs_all: why it cannot update some parameters before the gradients of the others are there, if so.
    """

    settings: tuple[str, ...] = ADAM_SETTINGS
    package: str | None = None
    learning_rate: float = 4e-5
    beta2: float = 0.999
    least_rate: float = 0.0
    greatest_rate: float = 0.1
    one_rate: bool = False
    lost_in_bf16: str | None = None
    needs_all: str | None = None


OPTIMIZERS: Mapping[str, OptimizerFacts] = MappingProxyType({
    "adamw": OptimizerFacts(lost_in_bf16="bf16 weights would round most of its steps away"),
    "adamw_bf16": OptimizerFacts(),
    "adamw8bit": OptimizerFacts(package="bitsandbytes"),
    "ao_adamw8bit": OptimizerFacts(
        package="torchao", needs_all="rounds with random numbers in the order in which it updates",
    ),
    "adafactor": OptimizerFacts(settings=("adam_weight_decay",)),
    "lion": OptimizerFacts(
        settings=("adam_beta1", "adam_beta2", "adam_weight_decay"), package="bitsandbytes",
        learning_rate=1e-5, beta2=0.99,
    ),
    "prodigy": OptimizerFacts(
        package="prodigyopt", learning_rate=1.0, least_rate=0.01, greatest_rate=math.inf, one_rate=True,
        lost_in_bf16="bf16 weights would not move: it begins with steps far below their precision",
        needs_all="finds its rate by all gradients at once",
    ),
})
