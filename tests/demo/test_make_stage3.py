"""The demo's untrained stage III is the published upscaler but for its widths."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionUpscalePipeline

from examples.demo.make_stage3 import UNET
from helpers.config.families import DEEPFLOYD_III
from helpers.models.published import architecture


@pytest.fixture(scope="module")
def pipeline(tiny_stage3) -> StableDiffusionUpscalePipeline:
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(tiny_stage3)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_its_unet_has_the_published_blocks_and_conditioning():
    published = json.loads(architecture(DEEPFLOYD_III.flavours["iii-x4"]).read_text("utf-8"))
    widths = {"sample_size", "block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim",
              "cross_attention_dim"}  # fmt: skip
    own = json.loads(json.dumps(UNET))
    assert {name for name in own if published[name] != own[name]} == widths


def test_both_schedules_are_those_of_the_published_one(pipeline):
    """Its first and last signal-to-noise ratios, of betas from 0.0001 to 0.02."""
    assert type(pipeline.scheduler) is DDIMScheduler and pipeline.config.max_noise_level == 350
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and not pipeline.scheduler.config.clip_sample
    for scheduler in (pipeline.scheduler, pipeline.low_res_scheduler):
        kept = scheduler.alphas_cumprod
        assert kept[0].item() == pytest.approx(0.9999) and kept[-1].item() == pytest.approx(0.00066, abs=2e-4)


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_it_makes_a_picture_4_times_larger(pipeline, size):
    small = torch.rand(1, 3, *size) * 2 - 1
    large = pipeline("a red circle", image=small, num_inference_steps=1, guidance_scale=1).images[0]
    assert large.size == (4 * size[1], 4 * size[0])
