"""Does a stage II learn more when it is shown its low-resolution image, as it is when it samples?

    ./examples/demo/make_stage2.sh                       once, for its pictures and its untrained model
    python -m benchmarks.stage2_conditioning             then this

trains the demo's untrained stage II twice, for the same steps on the same batches: as this project does it, and with x_t
in the place of the low-resolution image and t in that of its noise level, as diffusers' example does it. Both then upscale
pictures that they never saw, through IFSuperResolutionPipeline, beside bicubic upscaling.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import train_sd2x
from benchmarks.machine import ROOT, write_result
from examples.demo import score_stage2
from helpers.config.env import flags_from_exports
from helpers.data.collate import Batch
from helpers.diffusion import timesteps
from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import add_noise, gaussian
from helpers.models.parts import Parts
from helpers.training import loop
from helpers.training.step import StepLoss, training_loss

ENV_FILE = ROOT / "examples" / "demo" / "sd2x-env-stage2-base.sh"
RESULT = ROOT / "benchmarks" / "results" / "stage2_conditioning.json"


def x_t_twice(parts: Parts, denoiser: torch.nn.Module, batch: Batch, generator: torch.Generator) -> StepLoss:
    """The loss of a step that never shows the low-resolution image."""
    draws = Draws(generator)
    x = parts.spec.space.encode(batch.images, draws)
    noise = gaussian(x.shape, parts.noise_offset, draws)
    t = timesteps.draw(parts.timestep_weights, len(x), draws)
    x_t = add_noise(parts.schedule, x, noise, t)
    unet_input = torch.cat([x_t, x_t], dim=1)
    output = denoiser(unet_input, t, batch.prompt_embeds, class_labels=t)
    return StepLoss(parts.objective(output.float(), x, x_t, noise, t), t)


CONDITIONINGS: dict[str, Callable[..., StepLoss]] = {"noised low resolution": training_loss, "x_t twice": x_t_twice}


def train(conditioning: str, output: Path, steps: int, env_file: Path) -> None:
    """Train in a process of its own, by the exports of the env file."""
    mine = [sys.executable, "-m", "benchmarks.stage2_conditioning", "--train", conditioning, "--steps", str(steps)]
    command = [*mine, "--output", str(output)]
    subprocess.run(["bash", "-c", 'set -a; . "$0"; exec "$@"', str(env_file), *command], cwd=ROOT, check=True)


def train_here(conditioning: str, output: Path, steps: int) -> int:
    """Train by this process's exports; returns the exit code."""
    loop.training_loss = CONDITIONINGS[conditioning]
    flags = flags_from_exports(os.environ, [], problems := [])
    if problems:
        raise SystemExit("\n".join(problems))
    more = [f"--max_train_steps={steps}", f"--output_dir={output}", "--num_eval_images=0", "--lr_warmup_steps=50"]
    return train_sd2x.main([*flags, *more])


def measure(output: Path, steps: int, pictures: int, env_file: Path) -> dict[str, object]:
    """The gain in PSNR over bicubic of each way to train, in dB."""
    figures: dict[str, object] = {"steps": steps, "pictures": pictures, "noise_level": 250}
    options = score_stage2.parse([str(output), f"--pictures={pictures}"])
    for conditioning in CONDITIONINGS:
        folder = output / conditioning.replace(" ", "_")
        train(conditioning, folder, steps, env_file)
        model, bicubic = score_stage2.gain(score_stage2.load_pipeline(folder / "pipeline"), options)
        figures |= {"bicubic_db": round(bicubic, 2), f"{conditioning.replace(' ', '_')}_db": round(model, 2)}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "stage2-conditioning")
    parser.add_argument("--env", type=Path, default=ENV_FILE, help="the env file that both are trained by")
    parser.add_argument("--train", choices=sorted(CONDITIONINGS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train_here(options.train, options.output, options.steps)
    write_result(RESULT, measure(options.output, options.steps, options.pictures, options.env))
    return 0


if __name__ == "__main__":
    sys.exit(main())
