"""Stages II and III see in training what their pipelines show them when they sample."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler, IFSuperResolutionPipeline, StableDiffusionUpscalePipeline
from PIL import Image

from helpers.config.families import DEEPFLOYD_II
from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import schedule_from_betas
from helpers.images.geometry import Rules, plans
from helpers.models import loading
from helpers.models.conditioning import NoisedLowRes, Reduced, TextOnly, reduce, upscale
from helpers.models.families import SPECS
from helpers.sizes import Size

SPEC, SPEC_III = SPECS["deepfloyd-ii"], SPECS["deepfloyd-iii"]
SIZE = (64, 96)  # height, width


@pytest.fixture(scope="module")
def schedule():
    return schedule_from_betas(DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas)


def images(count: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randint(256, (count, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def reduced(count: int, size: tuple[int, int] = SIZE) -> Reduced:
    return partial(reduce, images(count, size))


def conditioned(schedule, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t given, the low-res channels and the levels."""
    x_t = torch.zeros(count, 3, *size)
    joined, level = NoisedLowRes()(x_t, reduced(count, size), schedule, Draws(torch.Generator().manual_seed(1)))
    assert torch.equal(joined[:, :3], x_t)
    return x_t, joined[:, 3:], level


def test_stage_i_gets_nothing_but_x_t():
    x_t = torch.randn(2, 3, 8, 8)
    assert TextOnly()(x_t, pytest.fail, None, Draws(torch.Generator())) == (x_t, None)


def test_the_low_resolution_is_what_pillow_makes_of_the_image():
    image = images(1)
    pillow = Image.fromarray(image[0].numpy()).resize((24, 16), Image.Resampling.BICUBIC)
    ours = reduce(image, 4)[0].permute(1, 2, 0)
    assert (ours.int() - torch.tensor(list(pillow.getdata())).view(16, 24, 3)).abs().max() <= 1


@pytest.mark.parametrize("size", [SIZE, (256, 384)], ids=["64 high", "256 high"])
def test_the_channels_are_those_that_the_pipeline_builds(tiny_stage2, schedule, size):
    """Of the same image, noise and level: the pipeline is asked for one step, and its UNet's input is taken."""
    pipeline = IFSuperResolutionPipeline.from_pretrained(tiny_stage2)
    height, width = size
    image = images(1, size)
    x_t, low_res, level = conditioned(schedule, 1, size)
    generator = torch.Generator().manual_seed(1)
    torch.randint(1000, (1,), generator=generator)
    noise = torch.randn(1, 3, *size, generator=generator)
    seen = {}

    def take(module, arguments, named):
        seen["input"], seen["labels"] = arguments[0], named["class_labels"]

    pipeline.unet.register_forward_pre_hook(take, with_kwargs=True)
    draws = iter([torch.zeros(1, 3, *size), noise, *[torch.zeros(1, 3, *size)] * 9])
    with pytest.MonkeyPatch.context() as patched:
        module = "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution.randn_tensor"
        patched.setattr(module, lambda *_, **__: next(draws))
        small = Image.fromarray(reduce(image, 4)[0].permute(1, 2, 0).numpy())
        sampled = {"height": height, "width": width, "noise_level": int(level)}
        pipeline("", image=small, **sampled, num_inference_steps=1, guidance_scale=1)
    assert small.size == (width // 4, height // 4)
    torch.testing.assert_close(low_res, seen["input"][:, 3:], rtol=0, atol=2e-6)
    assert torch.equal(level, seen["labels"]) and level.dtype == torch.int64


@pytest.mark.parametrize("size", [(64, 128), (256, 192)], ids=["64 high", "256 high"])
def test_the_channels_of_stage_iii_are_those_that_the_pipeline_shows_its_unet(tiny_stage3, size):
    """Of the same image, noise and level. The image comes as it is cached, beside its latents."""
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(tiny_stage3)
    pipeline.set_progress_bar_config(disable=True)
    parts, image = loading.load(SPEC_III, tiny_stage3, torch.float32), images(1, size)
    cached = SPEC_III.space.cached_of(SPEC_III.space.load(tiny_stage3, torch.device("cpu")), image)
    x_t = SPEC_III.space.encode(cached, Draws(torch.Generator().manual_seed(2)))
    kept = partial(SPEC_III.space.reduced, cached)
    joined, level = SPEC_III.conditioning(x_t, kept, parts.low_res_schedule, Draws(torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(1)
    torch.randint(350, (1,), generator=generator)
    noise = torch.randn(1, 3, size[0] // 4, size[1] // 4, generator=generator)
    seen = {}

    def take(module, arguments, named):
        seen["input"], seen["labels"] = arguments[0], named["class_labels"]

    pipeline.unet.register_forward_pre_hook(take, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patched:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale.randn_tensor"
        patched.setattr(module, lambda shape, **_: noise if shape[1] == 3 else x_t)
        small = Image.fromarray(reduce(image, 4)[0].permute(1, 2, 0).numpy())
        pipeline("", image=small, noise_level=int(level), num_inference_steps=1, guidance_scale=1)
    assert joined.shape == seen["input"].shape == (1, 7, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(joined, seen["input"], rtol=0, atol=2e-6)
    assert torch.equal(level, seen["labels"]) and level.dtype == torch.int64
    clean = upscale(reduce(image, 4), joined.shape[2:])
    assert (joined[:, 4:] - clean).abs().max() > 0.01, "the image itself, without noise, is not what is shown"
    unscaled = joined[:, 4:] - clean * parts.low_res_schedule.sqrt_alphas_cumprod[level]
    torch.testing.assert_close(
        unscaled, noise * parts.low_res_schedule.sqrt_one_minus_alphas_cumprod[level], rtol=0, atol=1e-5
    )


def test_an_image_that_has_its_size_already_is_not_resampled():
    small = reduce(images(1), 4)
    assert torch.equal(upscale(small, small.shape[2:]), small.float() / 127.5 - 1)


@pytest.mark.parametrize("source, target", [
    (Size(1200, 800), Size(384, 256)), (Size(800, 1200), Size(256, 384)), (Size(1600, 900), Size(448, 256)),
    (Size(1000, 999), Size(256, 256)),
])
def test_the_low_resolution_image_of_every_aspect_is_a_quarter_exactly(source, target):
    rules = Rules(DEEPFLOYD_II.resolution, alignment=DEEPFLOYD_II.alignment, crop_aspect="preserve")
    [plan] = plans(source, rules)
    assert plan.target == target
    low_res = reduce(images(1, (target.height, target.width)), NoisedLowRes().scale)
    assert low_res.shape[2:] == (target.height / 4, target.width / 4)


def test_its_noise_and_its_levels_are_its_own(schedule):
    """Against noise and timesteps drawn just before from the same generator, as a training step draws them."""
    generator = torch.Generator().manual_seed(3)
    eps = torch.randn(400, 3, *SIZE, generator=generator)
    t = torch.randint(1000, (400,), generator=generator)
    joined, level = NoisedLowRes()(eps, reduced(400), schedule, Draws(generator))
    signal = schedule.sqrt_alphas_cumprod[level].view(-1, 1, 1, 1) * upscale(reduce(images(400), 4), SIZE)
    noise = (joined[:, 3:] - signal) / schedule.sqrt_one_minus_alphas_cumprod[level].view(-1, 1, 1, 1)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), eps.flatten()]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([level, t]).float())[0, 1]) < 0.15
    assert noise.std() == pytest.approx(1, abs=0.01)


def test_levels_are_uniform_over_all_timesteps(schedule):
    x_t, tiny = torch.zeros(20_000, 3, 4, 4), reduced(20_000, (4, 4))
    _, level = NoisedLowRes()(x_t, tiny, schedule, Draws(torch.Generator().manual_seed(4)))
    counts = torch.histc(level.float(), 10, 0, 1000)
    assert counts.min() > 1800 and counts.max() < 2200
    assert (level.min(), level.max()) == (0, 999)


def test_levels_of_stage_iii_are_uniform_over_those_that_its_pipeline_takes(tiny_stage3, tmp_path):
    x_t, tiny = torch.zeros(20_000, 4, 1, 1), reduced(20_000, (4, 4))
    model = shutil.copytree(tiny_stage3, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    for count, kept in ((350, {}), (200, {"max_noise_level": 200}), (350, {"max_noise_level": 350})):
        index.pop("max_noise_level", None)
        (model / "model_index.json").write_text(json.dumps({**index, **kept}))
        schedule = loading.load(SPEC_III, model, torch.float32).low_res_schedule
        _, level = SPEC_III.conditioning(x_t, tiny, schedule, Draws(torch.Generator().manual_seed(4)))
        counts = torch.histc(level.float(), 10, 0, count)
        assert counts.min() > 1800 and counts.max() < 2200
        assert (level.min(), level.max()) == (0, count - 1)


def test_the_schedule_of_its_noise_is_the_checkpoints_own(tiny_stage2, tiny_model, schedule):
    parts = loading.load(SPEC, tiny_stage2, torch.float32)
    assert torch.equal(parts.low_res_schedule.betas, schedule.betas)
    assert loading.load(SPECS["deepfloyd-i"], tiny_model, torch.float32).low_res_schedule is None
