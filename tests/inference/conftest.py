"""The tiny cascade as `inference.py` draws with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from helpers.models.bitfit import BitFit
from helpers.models.denoiser import Denoiser
from helpers.models.facts import origin_of
from helpers.models.families import SPECS
from helpers.models.lora import LoRA
from helpers.models.parts import LossSettings


@pytest.fixture(scope="session")
def embeds(tmp_path_factory) -> Path:
    """A cache folder, so that each prompt is encoded once in all tests."""
    return tmp_path_factory.mktemp("embeds")


@pytest.fixture
def draw(tmp_path, tiny_model, tiny_stage2, embeds, capsys) -> Callable[..., SimpleNamespace]:
    """Run `inference.py` on the tiny cascade, 16 px to 64; keyword arguments are flags that win, None leaves one out.

    Returns:
        its exit code, what it said, and the PNG files that are new in its output folder.
    """
    import inference

    def draw(**flags: object) -> SimpleNamespace:
        values = {
            "prompt": "a photo of a red circle",
            "stage1": tiny_model,
            "stage2": tiny_stage2,
            "upscaler": "none",
            "size": "64x64",
            "steps": 2,
            "cache_dir": embeds,
            "output": tmp_path / "pictures",
            **flags,
        }
        output = Path(values["output"])
        before = set(output.glob("*.png"))
        capsys.readouterr()
        code = inference.main([f"--{name}={value}" for name, value in values.items() if value is not None])
        said = capsys.readouterr()
        return SimpleNamespace(
            code=code, said=said.out + said.err, files=sorted(set(output.glob("*.png")) - before), output=output
        )

    return draw


@pytest.fixture(scope="session")
def adapter_on(tmp_path_factory) -> Callable[..., Path]:
    """The output folder of a training that gave every trained weight some value."""

    def adapter_on(model: Path, family: str, kind: str = "lora", trains_variance: bool = True, **options) -> Path:
        output = tmp_path_factory.mktemp("adapter")
        spec = SPECS[family]
        origin = origin_of(str(model), family, spec, model, LossSettings(trains_variance))
        adapter = BitFit(origin=origin) if kind == "bitfit" else LoRA(
            rank=4, alpha=4, dropout=0.0, targets="attention", origin=origin, **options
        )
        denoiser = Denoiser(UNet2DConditionModel.from_pretrained(model / "unet"))
        if options.get("text_encoder_rank"):
            denoiser = Denoiser(denoiser.unet, spec.text.trainable(model, torch.float32))
        adapter.attach(denoiser, torch.float32)
        generator = torch.Generator().manual_seed(5)
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        replace(adapter).save_weights(denoiser, output)
        return output

    return adapter_on
