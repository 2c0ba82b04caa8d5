"""Runs over the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.config.load import load
from helpers.models.families import SPECS
from helpers.training import assembly
from helpers.training.loop import Run


@pytest.fixture
def make_run(tiny_model: Path) -> Callable[..., Run]:
    """A run over the tiny model; keyword arguments are options."""

    def make(steps: int = 3, **options: object) -> Run:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        usual = {"model_type": "deepfloyd-lora", "mixed_precision": "no", "report_to": "none", "lora_rank": 2}
        values = {**usual, **options}
        config = load([f"--{name}={value}" for name, value in values.items() if value is not None]).config
        spec = SPECS[config.family.key]
        accelerator = assembly.create_accelerator(config)
        return assembly.create_run(config, spec, tiny_model, assembly.adapter_of(config), accelerator, steps)

    return make
