"""Stable Diffusion's text encoder trained beside the UNet, end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.models.facts import read_adapter_facts
from helpers.models.kohya import KOHYA_FILE
from helpers.models.lora import LORA_FILE

PROMPT = "a red circle"


@pytest.fixture
def sd(trainer, tiny_sd, tmp_path, photos) -> Callable[..., int]:
    """The trainer on the tiny Stable Diffusion and its text encoder, with images of 64 px."""
    data = tmp_path / "sd.json"
    data.write_text(json.dumps([{"id": "photos", "instance_data_dir": str(photos), "caption_strategy": "textfile"}]))

    def run(**flags: object) -> int:
        return trainer(**{
            "model_type": "lora",
            "pretrained_model_name_or_path": tiny_sd,
            "data_backend_config": data,
            "resolution": 64,
            "validation_resolution": "64",
            "train_text_encoder": True,
            **flags,
        })

    return run


def pipeline_of(base: Path, adapter: Path | None = None, **how: str) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
    if adapter:
        pipeline.load_lora_weights(adapter, **how)
    return pipeline


@torch.no_grad()
def text_of(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    tokens = pipeline.tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    return pipeline.text_encoder(tokens).last_hidden_state


@pytest.mark.parametrize("flags", [{}, {"use_dora": True}, {"use_ema": True}], ids=["lora", "dora", "ema"])
def test_the_result_has_both_adapters_and_no_caption_was_cached(sd, tmp_path, tiny_sd, flags):
    assert sd(learning_rate=1e-2, text_encoder_lora_rank=2, **flags) == 0
    names = load_file(tmp_path / "output" / LORA_FILE)
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    assert read_adapter_facts(tmp_path / "output" / LORA_FILE).text_encoder_rank == 2
    base, trained = pipeline_of(tiny_sd), pipeline_of(tiny_sd, tmp_path / "output")
    assert (text_of(trained) - text_of(base)).abs().max() > 1e-2
    assert not list((tmp_path / "cache" / "text").rglob("*.safetensors"))


@pytest.mark.parametrize("flags", [
    {"lora_dropout": 0.2, "use_ema": True, "text_encoder_learning_rate": 1e-4},
    {"use_dora": True, "mixed_precision": "bf16", "pure_bf16": True, "gradient_checkpointing": True},
], ids=["fp32", "pure bf16 dora"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(sd, tmp_path, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"learning_rate": 1e-3, "checkpointing_steps": 2, "max_train_steps": 4, **flags}
    assert sd(output_dir=whole, **common) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    assert sd(output_dir=parts, **common) == 0
    for file in [path.relative_to(whole) for path in (whole / "checkpoint-4").rglob("*.safetensors")]:
        one, two = load_file(whole / file), load_file(parts / file)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), file


@pytest.mark.parametrize("use_ema", [False, True])
def test_validation_reads_its_prompts_with_the_text_encoder_as_it_is_then(sd, tmp_path, tiny_sd, use_ema):
    """The last picture is the one that diffusers makes with what was exported."""
    negative = "a blue square"
    flags = {"validation_prompt": PROMPT, "validation_negative_prompt": negative, "use_ema": use_ema}
    assert sd(max_train_steps=3, learning_rate=1e-2, **flags) == 0
    folder = tmp_path / "output" / "validation_images"
    made = {step: np.asarray(Image.open(folder / f"step_{step}" / "a_red_circle_64x64.png")) for step in (0, 3)}
    for step, adapter in ((0, None), (3, tmp_path / "output")):
        pipeline = pipeline_of(tiny_sd, adapter)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        generator = torch.Generator().manual_seed(42)
        [expected] = pipeline(
            PROMPT, negative_prompt=negative, height=64, width=64, num_inference_steps=2, guidance_scale=7.5,
            generator=generator,
        ).images
        assert np.abs(made[step].astype(int) - np.asarray(expected)).max() <= 1, step
    assert np.abs(made[0].astype(int) - made[3]).max() > 1


def test_what_is_exported_for_other_tools_has_the_text_encoder_too(sd, tmp_path, tiny_sd):
    assert sd(learning_rate=1e-2, export="kohya") == 0
    one = pipeline_of(tiny_sd, tmp_path / "output")
    two = pipeline_of(tiny_sd, tmp_path / "output", weight_name=KOHYA_FILE)
    torch.testing.assert_close(text_of(one), text_of(two), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"train_text_encoder": False}, {"text_encoder_lora_rank": 2}])
def test_a_checkpoint_with_another_text_encoder_is_not_gone_on_with(sd, capsys, change):
    assert sd(max_train_steps=1) == 0
    assert sd(max_train_steps=2, **change) == 2
    [option] = change
    assert f'key "{option}") was' in capsys.readouterr().err


def test_a_dry_run_tells_the_memory_of_both_and_no_encoder_that_runs_before(sd, capsys):
    said = {}
    for trained in (True, False):
        assert sd(dry_run=True, train_text_encoder=trained) == 0
        said[trained] = capsys.readouterr().out
    weights = {
        trained: float(line.split()[1])
        for trained, text in said.items() for line in text.splitlines() if line.startswith("  weights")
    }
    assert weights[True] > weights[False]
    assert "text embeds of" in said[False] and "text embeds of" not in said[True]
    assert "TEXT_ENCODER_DEVICE" not in said[True]


def test_a_text_encoder_that_was_changed_in_its_place_is_noticed_on_resume(sd, tiny_sd, tmp_path, capsys):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    assert sd(pretrained_model_name_or_path=model) == 0
    weights = load_file(model / "text_encoder" / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, model / "text_encoder" / "model.safetensors",
              {"format": "pt"})
    assert sd(pretrained_model_name_or_path=model, max_train_steps=4) == 2
    assert "the weights' files there have changed since checkpoint-2" in capsys.readouterr().err
