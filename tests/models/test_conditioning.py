"""Stage II sees in training what IFSuperResolutionPipeline shows it when it samples."""

import pytest
import torch
from diffusers import DDPMScheduler, IFSuperResolutionPipeline
from PIL import Image

from helpers.config.families import DEEPFLOYD_II
from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import schedule_from_betas
from helpers.images.geometry import Rules, plans
from helpers.models import loading
from helpers.models.conditioning import NoisedLowRes, TextOnly, reduce, upscale
from helpers.models.families import SPECS
from helpers.sizes import Size

SPEC = SPECS["deepfloyd-ii"]
SIZE = (64, 96)  # height, width


@pytest.fixture(scope="module")
def schedule():
    return schedule_from_betas(DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas)


def images(count: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randint(256, (count, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def conditioned(schedule, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t given, the low-res channels and the levels."""
    x_t = torch.zeros(count, 3, *size)
    joined, level = NoisedLowRes()(x_t, images(count, size), schedule, Draws(torch.Generator().manual_seed(1)))
    assert torch.equal(joined[:, :3], x_t)
    return x_t, joined[:, 3:], level


def test_stage_i_gets_nothing_but_x_t():
    x_t = torch.randn(2, 3, 8, 8)
    assert TextOnly()(x_t, images(2), None, Draws(torch.Generator())) == (x_t, None)


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
    joined, level = NoisedLowRes()(eps, images(400), schedule, Draws(generator))
    signal = schedule.sqrt_alphas_cumprod[level].view(-1, 1, 1, 1) * upscale(reduce(images(400), 4), SIZE)
    noise = (joined[:, 3:] - signal) / schedule.sqrt_one_minus_alphas_cumprod[level].view(-1, 1, 1, 1)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), eps.flatten()]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([level, t]).float())[0, 1]) < 0.15
    assert noise.std() == pytest.approx(1, abs=0.01)


def test_levels_are_uniform_over_all_timesteps(schedule):
    x_t, tiny = torch.zeros(20_000, 3, 4, 4), images(20_000, (4, 4))
    _, level = NoisedLowRes()(x_t, tiny, schedule, Draws(torch.Generator().manual_seed(4)))
    counts = torch.histc(level.float(), 10, 0, 1000)
    assert counts.min() > 1800 and counts.max() < 2200
    assert (level.min(), level.max()) == (0, 999)


def test_the_schedule_of_its_noise_is_the_checkpoints_own(tiny_stage2, tiny_model, schedule):
    parts = loading.load(SPEC, tiny_stage2, torch.float32)
    assert torch.equal(parts.low_res_schedule.betas, schedule.betas)
    assert loading.load(SPECS["deepfloyd-i"], tiny_model, torch.float32).low_res_schedule is None
