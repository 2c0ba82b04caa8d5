"""Stable Diffusion: how fast this trainer is beside diffusers' own example, and how much memory either takes.

    python -m benchmarks.versus_diffusers_sd PATH/TO/train_text_to_image_lora.py [--batch 4] [--steps 100] [--rounds 3]

The path is that of `examples/text_to_image/train_text_to_image_lora.py` in a copy of the repository of diffusers, on
GitHub; what it needs besides this project's packages (`pip install datasets torchvision`) is told where it lacks.

Both train a LoRA on the same pipeline, images and captions, at the same resolution, batch, rank, learning rate and
precision, by AdamW, without validation. They take turns, so that a busy machine slows both alike. A run has as many
images as its steps need, so that neither begins an epoch anew. On a GPU the pipeline has Stable Diffusion 1.5's
architecture and random weights, on whose values neither speed nor memory depends, and the precision is bf16. There the
example keeps its adapter in bfloat16, and ours in float32: so ours is measured with PURE_BF16 too. Without a GPU the
pipeline is tiny, for trying the script anywhere; that tells little of real ones.

The JSON has of each, as medians over the rounds:

samples a second, in steady state: after the first steps;
the peak of the memory in 1e9 bytes: of tensors on a GPU, there also of the training alone, or of the process on a CPU;
seconds to the end of the first step. Ours encodes all images and captions before it, once: in its first run, not in
later ones. The example encodes each batch as it comes.

Target: at least 1.3 times the example's samples a second at the same batch, with no more peak memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.data import write_photo
from benchmarks.side_by_side import LEARNING_RATE, Contest, Setup, Target, contest, parse
from examples.demo import make_sd
from helpers.config.families import STABLE_DIFFUSION
from helpers.config.jsonfile import load_json
from helpers.models.published import architecture, vae_of
from helpers.sizes import Size

TARGET = Target(speed=1.3, peak=1.0)

TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
"""That of Stable Diffusion 1.5."""


def example_command(script: Path, setup: Setup, cache: Path, folder: Path) -> list[str]:
    """The example's own flags; `folder` is for what a run writes, besides what all of its runs cache."""
    return [
        str(script),
        f"--pretrained_model_name_or_path={setup.pipeline}",
        f"--train_data_dir={setup.images}",
        f"--cache_dir={cache}",
        f"--output_dir={folder / 'output'}",
        f"--resolution={setup.resolution}",
        "--center_crop",
        f"--train_batch_size={setup.batch}",
        f"--max_train_steps={setup.steps}",
        f"--checkpointing_steps={setup.steps + 1}",
        f"--learning_rate={LEARNING_RATE}",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        f"--mixed_precision={setup.precision}",
        f"--rank={setup.rank}",
        f"--dataloader_num_workers={setup.workers}",
        "--seed=42",
        *(["--gradient_checkpointing"] if setup.checkpointing else []),
    ]


def make_pipeline(folder: Path, full_size: bool) -> None:
    """A Stable Diffusion 1.x pipeline with random weights, of the published widths or tiny."""
    if not full_size:
        make_sd.make(folder)
        return
    torch.manual_seed(0)
    pieces = make_sd.tokenizer(1)
    ends = {"bos_token_id": pieces.bos_token_id, "eos_token_id": pieces.eos_token_id}
    published = architecture(STABLE_DIFFUSION.flavours["1.5"])
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(load_json(vae_of(published))),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, **ends)),
        tokenizer=pieces,
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(published)),
        scheduler=PNDMScheduler.from_config(make_sd.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    pieces.backend_tokenizer.model.save(str(folder / "tokenizer"))


def write_images(folder: Path, count: int, size: Size) -> None:
    """Captioned photos, as both read them: the caption is the file's name, and stands in `metadata.jsonl`."""
    folder.mkdir()
    captions = [f"a photo of number {number}" for number in range(count)]
    for number, caption in enumerate(captions):
        write_photo(folder / f"{caption}.jpg", size, number)
    rows = [json.dumps({"file_name": f"{caption}.jpg", "text": caption}) for caption in captions]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


def make(setup: Setup, full_size: bool) -> None:
    """Pipeline and images, of which each run sees each once."""
    make_pipeline(setup.pipeline, full_size)
    resolution = setup.resolution
    write_images(setup.images, setup.batch * setup.steps, Size(resolution * 2, resolution * 3 // 2))


def contest_with(script: Path) -> Contest:
    return Contest(
        example=partial(example_command, script),
        ours=("--model_type=lora", "--vae_batch_size=4"),
        make=make,
        target=lambda setup, on_gpu: TARGET,
        resolution=lambda full_size: 512 if full_size else 128,
        dataset={"caption_strategy": "filename"},
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    options = parse(__doc__, "versus_diffusers_sd.json", arguments)
    return contest(contest_with(options.script), options)


if __name__ == "__main__":
    main()
