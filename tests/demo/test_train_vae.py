"""The VAE's training lowers its loss and sets the scale; the committed one keeps what a picture shows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from examples.demo import train_vae
from examples.demo.draw import draw
from examples.demo.make_sd import make
from examples.demo.score import tally
from examples.demo.train_vae import EVERYTHING, latents_of, pictures, psnr

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(DEMO / "sd" / "vae").eval()


@pytest.fixture(scope="module")
def of_stage3() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(DEMO / "stage3" / "vae").eval()


@pytest.mark.parametrize("size, least", [((64, 64), 28), ((128, 128), 29.5), ((256, 256), 30)])
def test_the_vae_of_stage_iii_reconstructs_pictures_that_it_never_saw(of_stage3, size, least):
    assert psnr(of_stage3, pictures(8, size, np.random.default_rng(99))) >= least


def test_latents_of_stage_iii_fit_the_one_scale_that_its_pipeline_knows(of_stage3):
    latents = latents_of(of_stage3, pictures(48, (64, 64), np.random.default_rng(7))) * 0.08333
    assert latents.std().item() == pytest.approx(1, abs=0.05) and latents.mean((0, 2, 3)).abs().max() < 0.2


def test_pieces_are_parts_of_larger_pictures():
    pieces = pictures(9, (64, 32), np.random.default_rng(1), piece_of=256)
    assert pieces.shape == (9, 3, 32, 64)
    spread = pieces.std((2, 3)).amax(1)
    assert spread.min() < 0.05 and spread.max() > 0.3, "some show nothing but the ground, others an edge"


def test_stretched_latents_decode_to_the_same_pictures(tmp_path):
    vae = make(tmp_path).vae
    images = pictures(4, (64, 64), np.random.default_rng(3))
    before, picture = vae.encode(images).latent_dist, vae(images).sample
    train_vae.stretch(vae, 12.0)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close(after.mean, 12 * before.mean)
    torch.testing.assert_close(after.std, 12 * before.std)
    torch.testing.assert_close(vae(images).sample, picture, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size, least", [((128, 128), 27), ((64, 64), 22), ((192, 128), 26), ((64, 128), 23)])
def test_the_demos_vae_reconstructs_pictures_that_it_never_saw(trained, size, least):
    assert psnr(trained, pictures(16, size, np.random.default_rng(99))) >= least


def test_every_colour_and_shape_survives_the_demos_vae(trained):
    rng = np.random.default_rng(6)
    drawn = np.stack([np.asarray(draw(thing, (128, 128), rng)) for thing in EVERYTHING])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = trained.decode(latents_of(trained, images)).sample.clamp(-1, 1)
    shown = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert tally(EVERYTHING, shown).both >= 0.96


def test_scaled_latents_of_the_demos_vae_have_a_standard_deviation_of_1_around_0(trained):
    latents = latents_of(trained, pictures(48, (128, 128), np.random.default_rng(7))) * trained.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert latents.mean((0, 2, 3)).abs().max() < 0.2
    assert 0.35 < latents.std((0, 2, 3)).min() and latents.std((0, 2, 3)).max() < 1.4


def test_a_little_noise_in_the_latents_is_a_little_noise_in_the_picture(trained):
    """A diffusion model's latents are never exact."""
    images = pictures(8, (128, 128), np.random.default_rng(8))
    with torch.no_grad():
        latents = trained.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        exact, noisy = (trained.decode(latents + k / trained.config.scaling_factor * noise).sample for k in (0, 0.1))
    assert (exact - noisy).square().mean().sqrt() < 0.1


def test_centred_latents_decode_to_the_same_pictures(tmp_path):
    vae = make(tmp_path).vae
    images = pictures(8, (64, 64), np.random.default_rng(3))

    def mean_and_picture() -> tuple[float, torch.Tensor]:
        return latents_of(vae, images).mean((0, 2, 3)).abs().max().item(), vae(images).sample

    mean, picture = mean_and_picture()
    train_vae.centre(vae, images)
    mean_after, picture_after = mean_and_picture()
    assert mean_after < 1e-4 < 1e-2 < mean
    torch.testing.assert_close(picture_after, picture, atol=1e-4, rtol=0)


def test_training_improves_the_same_vae_by_the_same_amount_and_writes_its_scale(tmp_path, monkeypatch):
    images = pictures(8, (32, 32), np.random.default_rng(1))
    monkeypatch.setattr(train_vae, "OTHER_EDGES", (1, 1.25))
    trained = []
    for name in "ab":
        before = make(tmp_path / name).vae
        monkeypatch.setattr(sys, "argv", ["train_vae", str(tmp_path / name), "--steps=20", "--edge=32"])
        train_vae.main()
        trained.append(AutoencoderKL.from_pretrained(tmp_path / name / "vae"))
        assert str(tmp_path) not in (tmp_path / name / "vae" / "config.json").read_text("utf-8")
    a, b = trained
    assert psnr(a, images) > psnr(before, images) + 1
    assert a.config.scaling_factor == b.config.scaling_factor != before.config.scaling_factor
    fresh = pictures(50, (32, 32), np.random.default_rng(2))
    assert latents_of(a, fresh).std().item() * a.config.scaling_factor == pytest.approx(1, abs=0.1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
