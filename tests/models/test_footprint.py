"""The memory that sampling will take, told from shapes: it is what real tensors take."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoModelForTextEncoding

from helpers.models.footprint import (
    Footprint,
    decode_pass,
    of_text_encoder,
    of_unet,
    of_vae,
    text_pass,
    unet_pass,
)
from helpers.models.ledger import Ledger
from helpers.models.published import ARCHITECTURES
from helpers.sizes import Size

GB = 1e9


def counted(model: torch.nn.Module, run) -> int:
    """The most that really lives at one time during a pass on the CPU, besides the weights."""
    ledger = Ledger([*model.parameters(), *model.buffers()])
    with torch.no_grad(), ledger:
        run()
    return ledger.most_activations


def bytes_of(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model, size", [
    ("tiny_model", Size(64, 48)), ("tiny_stage2", Size(64, 64)), ("tiny_sd", Size(16, 24)),
])
def test_a_unet_takes_what_real_tensors_take(request, model, size, dtype):
    folder = request.getfixturevalue(model) / "unet"
    unet = UNet2DConditionModel.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
    told = of_unet(unet.config, size, dtype)
    assert told.weights == bytes_of(unet)
    for pictures in (1, 3):  # each is computed twice, for guidance
        real = counted(unet, lambda: unet_pass(unet, 2 * pictures, size, 77))
        assert told.each * pictures == pytest.approx(real, rel=0.03)
    real = counted(unet, lambda: unet_pass(unet, 1, size, 77))
    assert of_unet(unet.config, size, dtype, guided=False).each == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sd"])
def test_a_text_encoder_takes_what_real_tensors_take(request, model):
    folder = request.getfixturevalue(model) / "text_encoder"
    encoder = AutoModelForTextEncoding.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True).eval()
    told = of_text_encoder(folder / "config.json")
    assert told.weights == bytes_of(encoder)
    assert told.each == pytest.approx(counted(encoder, lambda: text_pass(encoder, 1, 77)), rel=0.05)
    assert told.each * 4 >= counted(encoder, lambda: text_pass(encoder, 4, 77))


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_a_vae_takes_what_real_tensors_take(tiny_sd, tiled):
    vae = AutoencoderKL.from_pretrained(tiny_sd / "vae", use_safetensors=True).eval()
    vae.use_tiling = tiled
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = Size(4 * vae.tile_latent_min_size, 3 * vae.tile_latent_min_size)
    image = Size(*(factor * edge for edge in latents))
    told = of_vae(vae.config, image, tiled)
    assert told.weights == bytes_of(vae)
    real = counted(vae, lambda: decode_pass(vae, 1, latents))
    assert told.each == pytest.approx(real, rel=0.05)


def test_what_is_in_groups_takes_less_and_more_at_a_time_takes_more():
    footprint = Footprint(weights=1000, group=100, each=10)
    assert footprint.peak(4) == 1040 and footprint.peak(4, by_groups=True) == 140


def published(name: str) -> dict:
    return json.loads((ARCHITECTURES / f"{name}.json").read_text("utf-8"))


def test_a_tiled_vae_takes_a_tenth():
    config = published("stable-diffusion-x4-upscaler_vae")
    whole, tiled = (of_vae(config, Size(1024, 1024), tiled) for tiled in (False, True))
    assert 3 * GB < whole.each < 3.5 * GB and tiled.each < whole.each / 10
    assert tiled.weights == whole.weights == 221_303_708
    assert of_vae(config, Size(128, 128), tiled=True) == of_vae(config, Size(128, 128))
