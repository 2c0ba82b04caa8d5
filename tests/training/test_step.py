"""What a UNet is shown in a training step, seen from the UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.data.collate import Batch
from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import at
from helpers.models import loading
from helpers.models.conditioning import reduce, upscale
from helpers.models.families import SPECS
from helpers.models.parts import Parts
from helpers.training.step import training_loss

COUNT, EDGE = 300, 16


def shown(family: str, model: Path) -> tuple[Parts, torch.Tensor, dict[str, torch.Tensor]]:
    """A step on `COUNT` different images: the model's parts, the images, and what its UNet was called with."""
    parts = loading.load(SPECS[family], model, torch.float32)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (COUNT, EDGE, EDGE, 3), dtype=torch.uint8, generator=generator)
    seen: dict[str, torch.Tensor] = {}

    def record(module: torch.nn.Module, arguments: tuple, named: dict) -> None:
        seen.update(input=arguments[0], t=arguments[1], text=arguments[2], labels=named["class_labels"])

    parts.unet.register_forward_pre_hook(record, with_kwargs=True)
    text = torch.randn(COUNT, 77, 64, generator=generator).bfloat16()
    with torch.no_grad():
        training_loss(parts, parts.denoiser, Batch(images, text, ()), generator)
    assert torch.equal(seen["text"], text.float())
    return parts, images, seen


def encoded(parts: Parts, images: torch.Tensor) -> torch.Tensor:
    return parts.spec.space.encode(images, Draws(torch.Generator()))


def noise_in(x_t: torch.Tensor, x_0: torch.Tensor, schedule, t: torch.Tensor) -> torch.Tensor:
    """The eps that turned x_0 into x_t: standard normal only if x_0 and t are those that were used."""
    return (x_t - at(schedule.sqrt_alphas_cumprod, t) * x_0) / at(schedule.sqrt_one_minus_alphas_cumprod, t)


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].item()


def assert_standard_normal(eps: torch.Tensor) -> None:
    assert eps.std() == pytest.approx(1, abs=0.01) and abs(eps.mean()) < 0.01
    assert eps.abs().max() < 6


def test_stage_ii_is_shown_the_image_itself_in_low_resolution_with_its_own_noise_at_its_own_level(tiny_stage2):
    parts, images, seen = shown("deepfloyd-ii", tiny_stage2)
    t, level = seen["t"], seen["labels"]
    assert t.dtype == level.dtype == torch.int64
    eps = noise_in(seen["input"][:, :3], encoded(parts, images), parts.schedule, t)
    low_res = upscale(reduce(images, 4), (EDGE, EDGE))
    own = noise_in(seen["input"][:, 3:], low_res, parts.low_res_schedule, level)
    assert_standard_normal(eps)
    assert_standard_normal(own)
    assert abs(correlation(own, eps)) < 0.01
    assert abs(correlation(own, low_res)) < 0.01
    assert abs(correlation(level, t)) < 0.2 and (level != t).float().mean() > 0.95
    tenths = torch.histc(level.float(), 10, 0, 1000)
    assert 10 <= tenths.min() and tenths.max() <= 60


def test_stage_iii_is_shown_the_image_that_was_cached_beside_its_latents(tiny_stage3):
    parts = loading.load(SPECS["deepfloyd-iii"], tiny_stage3, torch.float32)
    generator = torch.Generator().manual_seed(1)
    latents = torch.cat([torch.randn(COUNT, 4, EDGE, EDGE, generator=generator), torch.zeros(COUNT, 4, EDGE, EDGE)], 1)
    small = torch.randint(256, (COUNT, 3, EDGE, EDGE), generator=generator)
    seen: dict[str, torch.Tensor] = {}

    def record(module: torch.nn.Module, arguments: tuple, named: dict) -> None:
        seen.update(input=arguments[0], t=arguments[1], labels=named["class_labels"])

    parts.unet.register_forward_pre_hook(record, with_kwargs=True)
    text = torch.randn(COUNT, 77, 64, generator=generator).bfloat16()
    with torch.no_grad():
        batch = Batch(torch.cat([latents, small], 1).half(), text, ())
        training_loss(parts, parts.denoiser, batch, generator)
    eps = noise_in(seen["input"][:, :4], latents[:, :4].half().float(), parts.schedule, seen["t"])
    own = noise_in(seen["input"][:, 4:], small / 127.5 - 1, parts.low_res_schedule, seen["labels"])
    assert_standard_normal(eps)
    assert_standard_normal(own)
    assert abs(correlation(own, eps[:, :3])) < 0.01
    assert abs(correlation(seen["labels"], seen["t"])) < 0.2
    assert seen["labels"].dtype == torch.int64 and 300 < seen["labels"].max() < 350


def test_stage_i_is_shown_the_noised_image_alone(tiny_model):
    parts, images, seen = shown("deepfloyd-i", tiny_model)
    assert seen["labels"] is None and seen["input"].shape == (COUNT, 3, EDGE, EDGE)
    assert_standard_normal(noise_in(seen["input"], encoded(parts, images), parts.schedule, seen["t"]))
