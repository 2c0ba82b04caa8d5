"""One stage: precision, and whose text encoder it reads by."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.inference.stages import Stage, decode, noise_level_problem, open_stage, sample, to_images
from helpers.inference.texts import readers
from helpers.models import bases
from helpers.models.errors import WeightsError
from helpers.models.schedulers import LAMBDA_MIN_OF_COSINE, SAMPLERS
from helpers.sizes import Size


def stage_of(option: str, folder) -> Stage:
    base = bases.find(str(folder), download=False)
    level = 250 if base.family.upscales else None
    return Stage(option, base, (), Size(16, 16), 2, 1.0, level, None, None)


@pytest.mark.parametrize("scheduler", [None, "ddpm", "dpm++", "ddim", "unipc"])
@pytest.mark.parametrize("fixture, option, kind", [
    ("tiny_model", "stage1", "IFPipeline"),
    ("tiny_stage2", "stage2", "IFSuperResolutionPipeline"),
    ("tiny_stage3", "upscaler", "StableDiffusionUpscalePipeline"),
    ("tiny_sd", "stage1", "StableDiffusionPipeline"),
])  # fmt: skip
def test_a_stage_makes_what_diffusers_own_pipeline_makes(request, fixture, option, kind, scheduler):
    folder = request.getfixturevalue(fixture)
    stage = replace(stage_of(option, folder), size=Size(128, 64), steps=4, guidance=3.0, scheduler=scheduler)
    factor, own = getattr(stage.base.spec.space, "factor", 1), getattr(diffusers, kind).from_pretrained(folder)
    own.set_progress_bar_config(disable=True)
    if scheduler:
        config = {**own.scheduler.config, "clip_sample": False} if factor > 1 else dict(own.scheduler.config)
        if scheduler != "ddpm" and factor == 1:
            config |= {"variance_type": "fixed_small", "lambda_min_clipped": LAMBDA_MIN_OF_COSINE}
        own.scheduler = SAMPLERS[scheduler].from_config(config)
    width = own.unet.config.encoder_hid_dim or own.unet.config.cross_attention_dim
    text, negative = torch.randn(2, 1, 77, width, generator=torch.Generator().manual_seed(0))
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8))
    upscales = stage.noise_level is not None
    theirs = own(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        num_inference_steps=stage.steps,
        guidance_scale=stage.guidance,
        generator=torch.Generator().manual_seed(7),
        **({"image": small, "noise_level": stage.noise_level} if upscales else {}),
        **({} if option == "upscaler" else {"width": stage.size.width, "height": stage.size.height}),
    ).images[0]
    pipeline = open_stage(stage, folder, torch.device("cpu"), torch.float32, by_groups=False)
    pipeline.set_progress_bar_config(disable=True)
    x = sample(pipeline, stage, text, negative, [7], [small] if upscales else None)
    [ours] = to_images(decode(own.vae, x[0]) if factor > 1 else x)
    assert ours.size == theirs.size == stage.size
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1  # rounded here, cut off there


def test_what_lies_between_the_steps_is_not_rounded_to_what_the_unet_computes_in(tiny_model):
    """bfloat16 has fewer levels between 0.5 and 1 than a picture has."""
    stage = stage_of("stage1", tiny_model)
    pipeline = open_stage(stage, tiny_model, torch.device("cpu"), torch.bfloat16, by_groups=False)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.zeros(1, 77, pipeline.unet.config.encoder_hid_dim, dtype=torch.bfloat16)
    shown: list[torch.Tensor] = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: shown.append(arguments[0]))
    shown.append(sample(pipeline, stage, text, text, [1], None))
    assert pipeline.unet.unet.dtype == torch.bfloat16
    for x in shown:
        assert x.dtype == torch.float32 and (x != x.bfloat16().float()).float().mean() > 0.9


def test_a_model_of_more_noise_levels_than_usual_is_used_with_them(tiny_stage3, tmp_path):
    folder = shutil.copytree(tiny_stage3, tmp_path / "own")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "max_noise_level": 500}))
    stage = replace(stage_of("upscaler", folder), size=Size(64, 64), noise_level=400)
    assert noise_level_problem(stage.base, 400) is None and "up to 500" in noise_level_problem(stage.base, 501)
    pipeline = open_stage(stage, folder, torch.device("cpu"), torch.float32, by_groups=False)
    text = torch.zeros(1, 77, pipeline.unet.config.cross_attention_dim)
    assert sample(pipeline, stage, text, text, [1], [Image.new("RGB", (16, 16))]).isfinite().all()


def test_stages_of_one_text_encoder_read_by_it_and_others_by_their_own(tiny_model, tiny_stage2, tiny_stage3, tmp_path):
    same = shutil.copytree(tiny_model / "text_encoder", tmp_path / "same" / "text_encoder")
    shutil.copytree(tiny_stage2, tmp_path / "same", dirs_exist_ok=True, ignore=shutil.ignore_patterns("text_encoder"))
    other = shutil.copytree(tmp_path / "same", tmp_path / "other")
    weights = load_file(other / "text_encoder" / "model.safetensors")
    save_file({name: 2 * one for name, one in weights.items()}, other / "text_encoder" / "model.safetensors")
    first, second, third = readers([
        stage_of("stage1", tiny_model), stage_of("stage2", same.parent), stage_of("upscaler", tiny_stage3)
    ])  # fmt: skip
    assert first is second and third.base.name == str(tiny_stage3)
    assert len(set(readers([stage_of("stage1", tiny_model), stage_of("stage2", other)]))) == 2


def test_a_stage_two_without_a_text_encoder_reads_by_that_of_stage_one(tiny_model, tiny_stage2, tmp_path):
    bare = shutil.copytree(tiny_stage2, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    first, second = readers([stage_of("stage1", tiny_model), stage_of("stage2", bare)])
    assert first is second
    with pytest.raises(WeightsError, match="has no text encoder"):
        readers([stage_of("stage2", bare)])
