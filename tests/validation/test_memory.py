"""What a validation takes is told: the larger of sampling and decoding, beside the VAE's weights."""

from __future__ import annotations

import torch

from helpers.config.jsonfile import load_json
from helpers.config.load import load
from helpers.models import footprint
from helpers.models.families import SPECS
from helpers.models.published import ARCHITECTURES, vae_of
from helpers.sizes import Size
from helpers.training.memory_report import report, setup_of
from helpers.validation.memory import sampling_bytes
from helpers.validation.render import at_once

FLAGS = ["--mixed_precision=bf16", "--pure_bf16=true", "--optimizer=adamw_bf16"]


def test_a_picture_of_stage_iii_takes_what_its_vae_takes_and_a_large_one_is_decoded_in_tiles():
    architecture = ARCHITECTURES / "stable-diffusion-x4-upscaler_unet.json"
    spec, config = SPECS["deepfloyd-iii"], load(["--model_type=deepfloyd-stage3-lora", *FLAGS]).config
    setup = setup_of(config, spec, architecture, Size(512, 512))
    whole = sampling_bytes(spec, setup, (Size(1024, 1024),), guided=True)
    assert 3.3e9 < whole < 3.6e9
    assert sampling_bytes(spec, setup, (Size(512, 512), Size(1024, 1024)), guided=True) == whole
    just_tiled = (Size(1024, 1024), Size(1088, 1024))
    assert sampling_bytes(spec, setup, just_tiled, guided=True) >= whole, "in tiles a larger one takes less"
    assert sampling_bytes(spec, setup, (Size(2048, 2048),), guided=True) < 2 * whole, "whole it is four times that"


def test_pixels_have_no_vae_and_are_sampled_many_at_a_time():
    architecture = ARCHITECTURES / "IF-I-M-v1.0_unet.json"
    spec, config = SPECS["deepfloyd-i"], load(["--model_type=deepfloyd-lora", *FLAGS]).config
    setup, size = setup_of(config, spec, architecture, Size(64, 64)), Size(64, 64)
    plain, guided = (sampling_bytes(spec, setup, (size,), guided) for guided in (False, True))
    each = footprint.of_unet(load_json(architecture), size, torch.bfloat16, True, setup.tokens).each
    assert at_once(size) == 16 and guided == 16 * each and 1.8 < guided / plain < 2.2


def test_published_models_have_a_known_vae():
    names = sorted(path.name for path in ARCHITECTURES.glob("stable-diffusion*_unet.json"))
    assert len(names) == 4 and all(vae_of(ARCHITECTURES / name).is_file() for name in names)
    assert vae_of(ARCHITECTURES / "IF-I-M-v1.0_unet.json") is None


def test_a_dry_run_tells_it_and_a_gpu_too_small_for_it_is_warned_of():
    architecture, size = ARCHITECTURES / "IF-I-M-v1.0_unet.json", Size(64, 64)
    config = load(["--model_type=deepfloyd-lora", *FLAGS, "--dry_run"]).config
    said = report(config, SPECS["deepfloyd-i"], architecture, size, None, validating=10**9)
    assert "at validation, for pictures of 64x64: 1.77 GB" in said.splitlines()[-1]
    said = report(config, SPECS["deepfloyd-i"], architecture, size, 10**10, validating=10**10)
    assert "pictures of 64x64 need about 10.77 GB" in said and "VALIDATION_RESOLUTION" in said
    assert "pictures" not in report(config, SPECS["deepfloyd-i"], architecture, size, 10**10)
