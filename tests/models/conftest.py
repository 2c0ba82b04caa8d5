"""What the tests of adapters share: a loaded UNet, what it gives, and what the adapters are told of their base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel

from helpers.models import loading
from helpers.models.adapters import trainable_parameters
from helpers.models.facts import Origin, origin_of
from helpers.models.families import SPECS
from helpers.models.parts import LossSettings

SPEC = SPECS["deepfloyd-i"]


@pytest.fixture
def unet_in(tiny_model) -> Callable[..., UNet2DConditionModel]:
    """The tiny model's UNet in a dtype, float32 unless one is given."""
    return lambda dtype=torch.float32: loading.load(SPEC, tiny_model, dtype).unet


@pytest.fixture
def pipeline(tiny_model) -> IFPipeline:
    return IFPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)


@pytest.fixture
def origin(tiny_model) -> Origin:
    return origin_of(str(tiny_model), "deepfloyd-i", SPEC, tiny_model, LossSettings())


@pytest.fixture
def output_of() -> Callable[..., torch.Tensor]:
    """What a UNet gives for one fixed input, as float32, optionally under autocast to bfloat16."""

    def output_of(unet: torch.nn.Module, autocast: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, unet.config.in_channels, 64, 64, generator=generator).to(unet.dtype)
        text = torch.randn(2, 77, 64, generator=generator).to(unet.dtype)
        labels = torch.tensor([100, 250]) if unet.config.class_embed_type else None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return unet.eval()(x, torch.tensor([3, 700]), text, class_labels=labels).sample.float()

    return output_of


@pytest.fixture
def moved() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """A UNet whose trained parameters were all changed."""

    def moved(unet: torch.nn.Module) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(2)
        for parameter in trainable_parameters(unet):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        return unet

    return moved


@pytest.fixture
def small_run(trainer, tmp_path) -> Callable[..., tuple[Path, Path]]:
    """Train four steps, twice: through, and again from its own checkpoint of step 2. Returns both output folders."""
    def small_run(**flags: object) -> tuple[Path, Path]:
        flags = {"learning_rate": 1e-2, "max_train_steps": 4, "checkpointing_steps": 2, **flags}
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert trainer(output_dir=whole, **flags) == 0
        shutil.copytree(whole, parts)
        for last in (*parts.glob("*.safetensors"), parts / "checkpoint-4", parts / "pipeline"):
            shutil.rmtree(last) if last.is_dir() else last.unlink(missing_ok=True)
        assert trainer(output_dir=parts, **flags) == 0
        return whole, parts

    return small_run
