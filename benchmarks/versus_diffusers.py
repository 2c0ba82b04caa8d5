"""DeepFloyd IF: how fast this trainer is beside diffusers' own example, and how much memory and start-up either takes.

    python -m benchmarks.versus_diffusers PATH/TO/train_dreambooth_lora.py [--batch 4] [--steps 100] [--rounds 3]

The path is that of `examples/dreambooth/train_dreambooth_lora.py` in a copy of the repository of diffusers, on GitHub;
what it needs besides this project's packages (`pip install torchvision`) is told where it lacks.

Both train a LoRA of stage I on the same pipeline and images with one prompt, at the same resolution, batch, rank,
learning rate and precision, by AdamW, without validation; the example with its text encoded before the training, as its
guide has it. They take turns, so that a busy machine slows both alike. A run sees each image once. On a GPU the UNet has
IF-I-M's architecture and random weights, on whose values neither speed nor memory depends, and the precision is bf16;
the text encoder is tiny there too, since both encode one prompt. Ours is measured with PURE_BF16 too. Without a GPU the
pipeline is the demo's: real weights, tiny.

The JSON has of each, as medians over the rounds:

samples a second, in steady state: after the first steps;
the peak of the memory in 1e9 bytes: of tensors on a GPU, there also of the training alone, or of the process on a CPU;
seconds to the end of the first step. Ours decodes all images before it, once: in its first run, not in later ones.

Targets: on a CPU the example's speed, and 0.7 times its start in later runs; on a GPU 2.5 times its samples a second and
half its peak memory at a batch of 4, 1.5 times its samples a second at 64.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from diffusers import UNet2DConditionModel

from benchmarks.data import write_photo
from benchmarks.machine import ROOT
from benchmarks.side_by_side import LEARNING_RATE, Contest, Setup, Target, contest, parse
from helpers.config.families import DEEPFLOYD_I
from helpers.models.published import architecture
from helpers.sizes import Size

DEMO = ROOT / "examples" / "demo" / "model"
PROMPT = "a photo of a purple heart"
LARGE_BATCH = 64


def example_command(script: Path, setup: Setup, cache: Path, folder: Path) -> list[str]:
    """The example's own flags, as its guide has them for IF; it caches nothing between runs."""
    return [
        str(script),
        f"--pretrained_model_name_or_path={setup.pipeline}",
        f"--instance_data_dir={setup.images}",
        f"--instance_prompt={PROMPT}",
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
        "--pre_compute_text_embeddings",
        "--tokenizer_max_length=77",
        "--text_encoder_use_attention_mask",
        f"--dataloader_num_workers={setup.workers}",
        "--seed=42",
        *(["--gradient_checkpointing"] if setup.checkpointing else []),
    ]


def make(setup: Setup, full_size: bool) -> None:
    """Pipeline and images, of which each run sees each once."""
    shutil.copytree(DEMO, setup.pipeline)
    if full_size:
        shutil.rmtree(setup.pipeline / "unet")
        config = dict(UNet2DConditionModel.load_config(architecture(DEEPFLOYD_I.flavours["i-medium-400m"])))
        # That of the tiny text encoder, of whose embeddings only the first projection depends.
        width = UNet2DConditionModel.load_config(DEMO / "unet")["encoder_hid_dim"]
        UNet2DConditionModel.from_config(config | {"encoder_hid_dim": width}).save_pretrained(setup.pipeline / "unet")
    setup.images.mkdir()
    for number in range(setup.batch * setup.steps):
        write_photo(setup.images / f"{number:05}.jpg", Size(setup.resolution * 6, setup.resolution * 4), number)


def target(setup: Setup, on_gpu: bool) -> Target:
    if not on_gpu:
        return Target(speed=1.0, start=0.7)
    return Target(speed=1.5) if setup.batch >= LARGE_BATCH else Target(speed=2.5, peak=0.5)


def contest_with(script: Path) -> Contest:
    return Contest(
        example=partial(example_command, script),
        ours=("--model_type=deepfloyd-lora",),
        make=make,
        target=target,
        resolution=lambda full_size: 64,
        dataset={"caption_strategy": "instanceprompt", "instance_prompt": PROMPT},
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    options = parse(__doc__, "versus_diffusers.json", arguments)
    return contest(contest_with(options.script), options)


if __name__ == "__main__":
    main()
