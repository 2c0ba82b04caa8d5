#!/usr/bin/env python3
"""What it saves, and costs, to update weights in the backward pass (OPTIMIZER_RELEASE_GRADIENTS), on a CPU.

    python -m benchmarks.released_gradients [--only memory|time] [--batch 4] [--steps 10] [--rounds 7] [--output FILE]

Memory: the most bytes of tensors at one time in a step of full tuning of IF-I-M at 64 px, with random weights and
gradient checkpointing, in pure bf16 with adamw_bf16, beside what `--dry_run` estimates: minutes and some 4 GB for each.
Time: steps of the demo's model, with and without, in turns, cut into as many chunks and buckets as IF-I-M is; the
median over the rounds of the ratio of the process's time. Gradients are clipped in neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from benchmarks.gpu_train import Case, estimated_gb
from benchmarks.machine import ROOT, write_result
from benchmarks.step_overhead import DEMO, our_loop
from benchmarks.synthetic import create_run, random_batch, random_parts
from helpers.models.adapters import trainable_parameters
from helpers.models.full import Full
from helpers.models.gradient_checkpointing import checkpoint_everything
from helpers.models.ledger import Ledger
from helpers.models.published import architecture
from helpers.training import released, rounding
from helpers.training.loop import Run
from helpers.training.released import Released

OUTPUT = ROOT / "benchmarks" / "results" / "released_gradients.json"


def memory(case: Case, batch: int, config: dict[str, object]) -> dict[str, float]:
    """1e9 bytes of tensors at the most, and of gradients alone, in the second step; and as estimated."""
    run = _run(config, case.trained)
    if case.checkpointing:
        checkpoint_everything(run.parts.unet)
    parameters, optimizer = trainable_parameters(run.denoiser), run.optimizer.optimizer
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = [one for own in optimizer.state.values() for one in own.values() if isinstance(one, torch.Tensor)]
    known = [*run.denoiser.parameters(), *run.denoiser.buffers(), *state]
    ledger = Ledger(known)
    for parameter in parameters:  # before those of `Released`, which free the gradients
        parameter.register_post_accumulate_grad_hook(ledger.count_as_gradient)
    run.released = Released(optimizer) if case.releases else None
    data = random_batch(run.parts, batch, torch.device("cpu"))
    with ledger:
        our_loop(run, data, 1)
    return {
        "peak_gb": (sum(tensor.nbytes for tensor in known) + ledger.most) / 1e9,
        "gradients_gb": ledger.most_gradients / 1e9,
        "estimated_gb": estimated_gb(case, config, batch),
    }


def times(batch: int, steps: int, rounds: int) -> dict[str, object]:
    """Seconds of the process a step, and the ratio of with to without."""
    config = UNet2DConditionModel.load_config(DEMO / "unet" / "config.json")
    runs = {releases: _run(config, torch.bfloat16, releases) for releases in (False, True)}
    data = random_batch(runs[True].parts, batch, torch.device("cpu"))
    for run in runs.values():
        our_loop(run, data, 1)
    turns = [{releases: _seconds(run, data, steps) for releases, run in runs.items()} for _ in range(rounds)]
    return {
        "plain_seconds_a_step": statistics.median(turn[False] for turn in turns) / steps,
        "released_seconds_a_step": statistics.median(turn[True] for turn in turns) / steps,
        "ratio": statistics.median(turn[True] / turn[False] for turn in turns),
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
    }


@contextmanager
def cut_finely() -> Iterator[None]:
    """Within it the demo's model, 330 times smaller than IF-I-M, goes by as many chunks and buckets."""
    before = rounding.CHUNK, released.BUCKET
    rounding.CHUNK, released.BUCKET = (size // 256 for size in before)
    try:
        yield
    finally:
        rounding.CHUNK, released.BUCKET = before


def _run(config: dict[str, object], dtype: torch.dtype, releases: bool = False) -> Run:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    parts = random_parts("deepfloyd-i", config, dtype, accelerator.device)
    run = create_run(parts, Full(), dtype, "adamw_bf16", accelerator, releases)
    run.max_grad_norm = 0.0
    return run


def _seconds(run: Run, data: object, steps: int) -> float:
    start = time.process_time()
    our_loop(run, data, steps)
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description="Measure updates in the backward pass beside plain steps.")
    parser.add_argument("--only", choices=("memory", "time"), help="what is not measured stays as it is in the file")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--architecture", type=Path, help="a UNet's config.json in place of IF-I-M's")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    figures = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    if options.only != "time":
        plain = Case("I-M", "full", options.batch, checkpointing=True)
        cases = [plain, replace(plain, releases=True)]
        config = UNet2DConditionModel.load_config(options.architecture or architecture(cases[0].hub_id))
        figures["memory"] = {case.name: memory(case, options.batch, config) for case in cases}
    if options.only != "memory":
        with cut_finely():
            figures["time"] = times(options.batch, options.steps, options.rounds)
    return write_result(options.output, figures)


if __name__ == "__main__":
    main()
