"""Make the demo's untrained stage III: the x4 upscaler's architecture, tiny widths, random weights.

    python -m examples.demo.make_stage3 FOLDER

`examples.demo.train_vae` then trains its VAE.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline, UNet2DConditionModel

from examples.demo.make_sd import TEXT_WIDTH, text_encoder, tokenizer

SCALING_FACTOR = 0.08333
"""The published VAE's. The pipeline sets it in any other."""

VAE = {
    "sample_size": 64,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (12, 24, 32),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "scaling_factor": SCALING_FACTOR,
}
"""The upscaler's own but for its attention, which at 1024 px, of 65,536 positions, takes longer than all else."""

UNET = {
    "sample_size": 16,
    "in_channels": 7,
    "out_channels": 4,
    "num_class_embeds": 1000,
    "block_out_channels": (16, 32, 32, 48),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "only_cross_attention": (True, True, True, False),
    "use_linear_projection": True,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 2, 2, 3),
    "cross_attention_dim": TEXT_WIDTH,
}
"""The upscaler's blocks and conditioning, tiny. Its `attention_head_dim` is the number of heads, and so it is here."""

BETAS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
SCHEDULER = BETAS | {
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
"""The upscaler's own scheduler; its low-resolution image is noised on the same betas."""
MAX_NOISE_LEVEL = 350


def make(folder: Path, seed: int = 0) -> StableDiffusionUpscalePipeline:
    """Write an untrained pipeline for `StableDiffusionUpscalePipeline.from_pretrained`; the seed gives its weights."""
    torch.manual_seed(seed)
    pieces = tokenizer(version=2)
    pipeline = StableDiffusionUpscalePipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder(pieces),
        tokenizer=pieces,
        unet=UNet2DConditionModel(**UNET),
        low_res_scheduler=DDPMScheduler(**BETAS),
        scheduler=DDIMScheduler(**SCHEDULER),
        max_noise_level=MAX_NOISE_LEVEL,
    )
    pipeline.save_pretrained(folder)
    pieces.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's untrained stage III.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
