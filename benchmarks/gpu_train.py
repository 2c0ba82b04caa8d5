#!/usr/bin/env python3
"""Memory and speed of a training step on the real architecture, with random weights: neither depends on their values.

    python -m benchmarks.gpu_train [--steps 30] [--output FILE]

On a GPU: IF-I-M, LoRA of rank 32, batch 4, pure bf16. Without one: the demo's tiny UNet in the same configuration, so
that the script itself is tested everywhere. The documents' figure for the first is 22-24 GB.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.machine import ROOT, write_result
from benchmarks.step_overhead import DEMO, our_loop
from benchmarks.synthetic import create_run, random_batch, random_parts
from helpers.models.adapters import LoRA

ARCHITECTURES = ROOT / "benchmarks" / "architectures"
RANK, BATCH, WARM_UP = 32, 4, 5


def measure(steps: int) -> dict[str, object]:
    """Peak memory in GB, seconds a step and samples a second of LoRA training in pure bf16."""
    accelerator = Accelerator()
    on_gpu = accelerator.device.type == "cuda"
    torch.manual_seed(0)
    architecture = ARCHITECTURES / "IF-I-M-v1.0_unet.json" if on_gpu else DEMO / "unet" / "config.json"
    parts = random_parts(architecture, ARCHITECTURES / "stage1_scheduler.json", torch.bfloat16, accelerator.device)
    adapter = LoRA("IFPipeline", rank=RANK, alpha=RANK, dropout=0.0, targets="attention")
    run = create_run(parts, adapter, torch.bfloat16, "adamw_bf16", accelerator)
    batch = random_batch(parts, BATCH, accelerator.device)
    our_loop(run, batch, WARM_UP if on_gpu else 1)
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    our_loop(run, batch, steps)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    return {
        "architecture": "IF-I-M-v1.0" if on_gpu else "demo",
        "parameters": sum(parameter.numel() for parameter in parts.unet.parameters()),
        "trained_parameters": sum(p.numel() for p in parts.unet.parameters() if p.requires_grad),
        "rank": RANK,
        "batch": BATCH,
        "precision": "pure bf16",
        "steps": steps,
        "peak_gb": peak_gb(on_gpu),
        "peak_is": "allocated on the GPU" if on_gpu else "resident in the process",
        "seconds_a_step": seconds,
        "samples_a_second": BATCH / seconds,
    }


def peak_gb(on_gpu: bool) -> float:
    """The most memory held so far, in 1e9 bytes."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description="Measure memory and speed of LoRA training with random weights.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_train.json")
    options = parser.parse_args(arguments)
    return write_result(options.output, measure(options.steps))


if __name__ == "__main__":
    main()
