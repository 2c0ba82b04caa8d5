"""What x is made of: pixels as they are, or a fresh draw from what a VAE says of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionUpscalePipeline

from helpers.diffusion.draws import Draws
from helpers.models.families import SPECS
from helpers.models.spaces import Latents, Pixels
from helpers.sizes import Size
from helpers.training.memory import Ledger

CPU = torch.device("cpu")
STAGE_III = SPECS["deepfloyd-iii"].space


def draws(seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Three pictures as the demo draws them, uint8 [3, 128, 192, 3]."""
    from examples.demo.draw import KNOWN, draw

    rng = np.random.default_rng(0)
    return torch.stack([torch.from_numpy(np.array(draw(thing, (192, 128), rng))) for thing in KNOWN[:3]])


def test_pixels_run_from_minus_one_to_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 1, 3)
    torch.testing.assert_close(Pixels().encode(images, draws()).flatten(), torch.tensor([-1, 1, -0.6]))


def test_each_draw_of_a_latent_is_another_with_the_mean_and_spread_of_its_moments():
    moments = torch.cat([torch.full((1, 4, 16, 16), 3.0), torch.full((1, 4, 16, 16), 0.5)], dim=1).half()
    one, two = (Latents().encode(moments, draws(seed)) for seed in (0, 1))
    assert one.dtype == torch.float32 and one.shape == (1, 4, 16, 16) and not torch.equal(one, two)
    assert one.mean() == pytest.approx(3, abs=0.06) and one.std() == pytest.approx(0.5, abs=0.03)


def test_moments_are_those_of_the_vae_scaled_as_its_configuration_says(tiny_sd, tmp_path, pictures):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18}))
    space = Latents()
    vae = space.load(folder, CPU)
    assert vae.dtype == torch.float32
    mean, std = space.cached_of(vae, pictures).chunk(2, dim=1)
    with torch.no_grad():
        posterior = vae.encode(Pixels().encode(pictures, draws())).latent_dist
    torch.testing.assert_close(mean.float(), posterior.mean * 0.18, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(std.float(), posterior.std * 0.18, rtol=1e-3, atol=1e-3)
    assert mean.shape == (3, 4, 16, 24) and space.size(Size(192, 128)) == Size(24, 16)


def test_moments_lead_back_to_the_pictures(tiny_sd, pictures):
    space = Latents()
    vae = space.load(tiny_sd, CPU)
    x = space.encode(space.cached_of(vae, pictures), draws())
    with torch.no_grad():
        decoded = vae.decode(x / vae.config.scaling_factor).sample
    error = (decoded - Pixels().encode(pictures, draws())).square().mean()
    assert 10 * torch.log10(4 / error) > 22


def test_a_cached_image_takes_what_is_said(tiny_sd, tiny_stage3, pictures):
    for space, model in ((Latents(), tiny_sd), (STAGE_III, tiny_stage3)):
        row = space.cached_of(space.load(model, CPU), pictures)[0]
        assert row.nbytes == space.cached_bytes(Size(192, 128))
    assert Pixels().cached_bytes(Size(192, 128)) == pictures[0].nbytes


def test_the_image_itself_is_cached_beside_its_latents_exactly(tiny_stage3, pictures):
    vae = STAGE_III.load(tiny_stage3, CPU)
    cached = STAGE_III.cached_of(vae, pictures)
    assert cached.shape == (3, 11, 32, 48) and cached.dtype == torch.float16
    assert torch.equal(STAGE_III.reduced(cached, 4), Pixels().reduced(pictures, 4))
    without = replace(STAGE_III, with_image=False)
    assert torch.equal(STAGE_III.encode(cached, draws()), without.encode(without.cached_of(vae, pictures), draws()))
    for space, scale in ((without, 4), (STAGE_III, 8)):
        with pytest.raises(ValueError, match=f"no images {scale} times smaller are cached"):
            space.reduced(cached, scale)


def test_where_the_pipeline_has_a_scale_of_its_own_it_is_trained_with_that(tiny_stage3, tmp_path, pictures):
    """StableDiffusionUpscalePipeline scales by 0.08333 whatever the configuration of the VAE says."""
    folder = shutil.copytree(tiny_stage3, tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(folder)
    vae = STAGE_III.load(folder, CPU)
    assert vae.config.scaling_factor == pipeline.vae.config.scaling_factor == 0.08333
    usual = STAGE_III.cached_of(STAGE_III.load(tiny_stage3, CPU), pictures)
    assert torch.equal(STAGE_III.cached_of(vae, pictures), usual)


@pytest.mark.parametrize("space, levels", [(Latents(), (128, 256, 512, 512)), (STAGE_III, (128, 256, 512))])
def test_encoding_takes_about_what_is_said(space, levels):
    """Of the architecture of all published VAEs of this factor, counted while it encodes tensors without data."""
    with torch.device("meta"), torch.inference_mode():
        vae = AutoencoderKL(
            block_out_channels=levels, down_block_types=("DownEncoderBlock2D",) * len(levels), layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * len(levels), latent_channels=4,
        )  # fmt: skip
        images, weights = torch.empty(2, 3, 512, 768), list(vae.parameters())
        with Ledger([*weights, images]) as ledger:
            vae.encode(images)
    taken = ledger.most + sum(weight.nbytes for weight in weights) + images.nbytes
    assert space.encoding_bytes(2, Size(768, 512)) == pytest.approx(taken, rel=0.02)


def test_the_fingerprint_is_that_of_the_vae_alone(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    before = Latents().fingerprint(folder)
    assert before.keys() == {"vae"}, "else all that was cached before would be made anew"
    assert STAGE_III.fingerprint(folder).keys() > before.keys()
    (folder / "unet" / "config.json").write_text("{}")
    assert Latents().fingerprint(folder) == before == Latents().fingerprint(tiny_sd)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert Latents().fingerprint(folder) != before
