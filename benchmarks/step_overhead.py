#!/usr/bin/env python3
"""What this project's loop costs beyond a bare one: same UNet, batch and optimizer, in one run.

    python -m benchmarks.step_overhead [--architecture CONFIG] [--batch 4] [--steps 10] [--rounds 7] [--output FILE]

The bare loop noises the batch, runs the UNet, takes the mean squared error, clips and steps AdamW: nothing else. Ours is
the loop that `./train.sh` runs, with its variance term, learning-rate schedule and progress bar. The two take turns,
so that a busy machine slows both alike; the overhead is the median over the rounds of the ratio of their times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from benchmarks.machine import ROOT, write_result
from benchmarks.synthetic import create_run, endless, random_batch, random_parts
from helpers.data.collate import Batch
from helpers.diffusion.draws import Draws
from helpers.diffusion.noising import add_noise
from helpers.models.adapters import trainable_parameters
from helpers.models.lora import LoRA
from helpers.training.loop import Run, train

DEMO = ROOT / "examples" / "demo" / "model"


def measure(architecture: Path, batch_size: int, steps: int, rounds: int) -> dict[str, object]:
    """Seconds a step of both loops, and the overhead as the median of the rounds' ratios minus 1."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(architecture)
    parts = random_parts("deepfloyd-i", config, torch.float32, accelerator.device)
    adapter = LoRA(rank=16, alpha=16, dropout=0.0, targets="attention")
    run = create_run(parts, adapter, torch.float32, "adamw", accelerator)
    batch = random_batch(parts, batch_size, accelerator.device)
    bare_loop(run, batch, 2)
    our_loop(run, batch, 2)
    turns = [(timed(bare_loop, run, batch, steps), timed(our_loop, run, batch, steps)) for _ in range(rounds)]
    return {
        "bare_seconds_a_step": statistics.median(bare for bare, _ in turns) / steps,
        "our_seconds_a_step": statistics.median(ours for _, ours in turns) / steps,
        "overhead": statistics.median(ours / bare for bare, ours in turns) - 1,
        "batch": batch_size,
        "steps": steps,
        "rounds": rounds,
    }


def bare_loop(run: Run, batch: Batch, steps: int) -> None:
    unet, optimizer, parameters = run.parts.unet, run.optimizer.optimizer, trainable_parameters(run.parts.unet)
    text = batch.prompt_embeds.float()
    for _ in range(steps):
        x = run.parts.spec.space.encode(batch.images, Draws(run.generator))
        noise = torch.randn_like(x)
        t = torch.randint(1000, (len(x),), device=x.device)
        output = unet(add_noise(run.parts.schedule, x, noise, t), t, text).sample
        torch.nn.functional.mse_loss(output[:, :3], noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def our_loop(run: Run, batch: Batch, steps: int) -> None:
    last = run.step + steps

    def stop(run: Run) -> None:
        run.requests.stop = 1 if run.step == last else None

    run.requests.stop = None
    train(run, endless(batch), [stop])


def timed(loop: Callable[[Run, Batch, int], None], run: Run, batch: Batch, steps: int) -> float:
    start = time.perf_counter()
    loop(run, batch, steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description="Measure what the training loop costs beyond a bare one.")
    parser.add_argument("--architecture", type=Path, default=DEMO / "unet" / "config.json")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "step_overhead.json")
    options = parser.parse_args(arguments)
    figures = measure(options.architecture, options.batch, options.steps, options.rounds)
    return write_result(options.output, figures)


if __name__ == "__main__":
    main()
