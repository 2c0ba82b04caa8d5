#!/usr/bin/env python3
"""Memory and speed of training the published architectures, with random weights: neither depends on their values.

    python -m benchmarks.gpu_train [--only NAME ...] [--steps 30] [--batch N] [--full_size] [--output FILE]

Pure bf16 and adamw_bf16, LoRA of rank 32 or full, through the loop that `./train.sh` runs; cases called mixed keep
what is trained in float32, and compute in bf16; those called released update weights in the backward pass. DeepFloyd IF
I-M, I-XL and II-M, the x4 upscaler at 512 px, and Stable Diffusion 1.5 at 512 px and 2.1 at 768 px; the images of the
last three are in their cache already, as latents. `--only` takes names of cases, such as "I-M lora b4" or "SD-*"; what
was measured before on the same machine and commit stays in the file.
Without a GPU the architectures are shrunk, for trying the script anywhere, and no peak is told, which PyTorch does not
know of a CPU; `--full_size` takes them as they are. Beside each peak stands what `--dry_run` estimates for it. The
documents' figure for the first case is 22-24 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel

from benchmarks.machine import ROOT, describe_machine, keep_result
from benchmarks.step_overhead import our_loop
from benchmarks.synthetic import create_run, random_batch, random_parts
from helpers.config.families import DEEPFLOYD_III, STABLE_DIFFUSION
from helpers.models.adapters import Adapter, trainable_parameters
from helpers.models.families import SPECS
from helpers.models.full import Full
from helpers.models.gradient_checkpointing import checkpoint_everything
from helpers.models.lora import LoRA
from helpers.models.published import architecture
from helpers.sizes import Size
from helpers.training.loop import Run
from helpers.training.memory import Setup, estimate

RANK, WARM_UP, OPTIMIZER = 32, 5, "adamw_bf16"
FAMILIES = {"I": "deepfloyd-i", "II": "deepfloyd-ii", "III": "deepfloyd-iii", "SD": "sd"}
PREDICTIONS = {"SD-2.1": "v_prediction", "III-x4": "v_prediction"}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        model: such as "I-M" or "SD-1.5".
        training: "lora" or "full".
        mode: of torch.compile; None: not compiled.
        mixed: whether what is trained is float32; else all is bfloat16.
        base: what a LoRA's frozen weights are kept in, as BASE_MODEL_PRECISION says; None: as they are.
        releases: whether weights are updated in the backward pass, and gradients are not clipped.
        optimizer: a key of `OPTIMIZERS`.
    """

    model: str
    training: str
    batch: int
    checkpointing: bool = False
    mode: str | None = None
    mixed: bool = False
    base: str | None = None
    releases: bool = False
    optimizer: str = OPTIMIZER

    @property
    def name(self) -> str:
        words = [self.model, self.training, f"b{self.batch}", "mixed" if self.mixed else "", self.base or ""]
        words += ["checkpointed" if self.checkpointing else "", "released" if self.releases else ""]
        words += [self.optimizer if self.optimizer != OPTIMIZER else ""]
        words += [{None: "", "default": "compiled"}.get(self.mode, f"compiled for {self.mode}")]
        return " ".join(filter(None, words))

    @property
    def family(self) -> str:
        return FAMILIES[self.model.partition("-")[0]]

    @property
    def hub_id(self) -> str:
        kind, _, flavour = self.model.partition("-")
        if kind == "III":
            return DEEPFLOYD_III.flavours[self.model.lower()]
        return STABLE_DIFFUSION.flavours[flavour] if kind == "SD" else f"DeepFloyd/IF-{self.model}-v1.0"

    @property
    def trained(self) -> torch.dtype:
        return torch.float32 if self.mixed else DTYPE

    @property
    def adapter(self) -> Adapter:
        if self.training == "full":
            return Full()
        return LoRA(RANK, RANK, dropout=0.0, targets="attention", base_precision=self.base)


CASES = [
    Case(model, training, 4, checkpointing, mode)
    for model in ("I-M", "II-M")
    for training in ("lora", "full")
    for checkpointing in (False, True)
    for mode in (None, "default")
] + [
    Case("I-M", "lora", 4, mode="reduce-overhead"),
    Case("I-M", "lora", 64),
    Case("I-M", "lora", 64, mode="default"),
    Case("I-XL", "lora", 4),
    Case("I-XL", "lora", 4, checkpointing=True),
]
CASES += [
    Case(model, "lora", 4, checkpointing, base=base)
    for model in ("I-M", "I-XL")
    for base in ("int8", "nf4")
    for checkpointing in (False, True)
] + [Case("I-M", "lora", 4, mode="default", base="int8")]
CASES += [
    case
    for model in ("III-x4", "SD-1.5", "SD-2.1")
    for case in (
        Case(model, "lora", 4),
        Case(model, "lora", 4, mixed=True),
        Case(model, "lora", 4, checkpointing=True),
        Case(model, "lora", 4, mode="default"),
        Case(model, "full", 4, checkpointing=True),
    )
]
CASES += [
    Case("I-M", "full", 4, releases=True),
    Case("I-M", "full", 4, checkpointing=True, releases=True),
    Case("I-XL", "full", 4, checkpointing=True),
    Case("I-XL", "full", 4, checkpointing=True, releases=True),
    Case("I-XL", "full", 4, checkpointing=True, releases=True, optimizer="adafactor"),
]


def measure(case: Case, steps: int, batch: int, full_size: bool, backend: str) -> dict[str, Any]:
    """What one case is estimated to take, and what it took: see `_measured`."""
    config = UNet2DConditionModel.load_config(architecture(case.hub_id))
    config = config if full_size else shrunk(config)
    row = {"batch": batch, "estimated_gb": estimated_gb(case, config, batch)}
    try:
        return {**row, **_measured(case, config, steps, batch, backend)}
    except torch.OutOfMemoryError:
        return {**row, "out_of_memory": True}


def _measured(case: Case, config: dict[str, Any], steps: int, batch: int, backend: str) -> dict[str, Any]:
    """Seconds a step and samples a second; on a GPU also the peak of the memory, in 1e9 bytes."""
    AcceleratorState._reset_state(True)  # accelerate keeps the precision of the case before, and refuses another
    accelerator = Accelerator(mixed_precision="bf16" if case.mixed else "no")
    on_gpu = accelerator.device.type == "cuda"
    _forget(on_gpu)
    torch.manual_seed(0)
    parts = random_parts(case.family, config, DTYPE, accelerator.device, PREDICTIONS.get(case.model, "epsilon"))
    parameters = sum(parameter.numel() for parameter in parts.unet.parameters())
    run = create_run(parts, case.adapter, case.trained, case.optimizer, accelerator, case.releases)
    if on_gpu:  # a run quantises on the CPU, before the weights come to the GPU
        torch.cuda.reset_peak_memory_stats()
    if case.checkpointing:
        checkpoint_everything(parts.unet)
    if case.mode:
        run.denoiser = torch.compile(run.denoiser, backend=backend, mode=case.mode, fullgraph=True, dynamic=False)
    data = random_batch(parts, batch, accelerator.device)
    first = _seconds(run, data, 1)
    if on_gpu:
        our_loop(run, data, WARM_UP)
    a_step = _seconds(run, data, steps) / steps
    return {
        "parameters": parameters,
        "trained_parameters": sum(parameter.numel() for parameter in trainable_parameters(parts.denoiser)),
        **({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {}),
        "seconds_of_the_first_step": first,
        "seconds_a_step": a_step,
        "samples_a_second": batch / a_step,
    }


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same blocks, with one layer each and a sixteenth of the widths."""
    smaller = {
        "sample_size": config["sample_size"] // 2,
        "block_out_channels": [width // 16 for width in config["block_out_channels"]],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "encoder_hid_dim": 32,
        "addition_embed_type_num_heads": 4,
        "time_embedding_dim": 32,
    }
    return config | {name: value for name, value in smaller.items() if config.get(name)}


def estimated_gb(case: Case, config: dict[str, Any], batch: int) -> float:
    """What a dry run says of this case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), "utf-8")
        edge = config["sample_size"]
        setup = Setup(
            architecture=path,
            adapter=case.adapter,
            weights=DTYPE,
            trained=case.trained,
            autocast=case.mixed,
            optimizer=case.optimizer,
            ema=False,
            checkpointing=case.checkpointing,
            batch_size=batch,
            size=Size(edge, edge),
            tokens=77,
            channels=SPECS[case.family].space.channels,
            releases=case.releases,
        )
        return estimate(setup).peak / 1e9


def _forget(on_gpu: bool) -> None:
    """Free what an earlier case left behind."""
    gc.collect()
    torch._dynamo.reset()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _seconds(run: Run, batch: Any, steps: int) -> float:
    start = time.perf_counter()
    our_loop(run, batch, steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured_before(path: Path) -> dict[str, Any]:
    """The cases in the file, if they were measured on this machine with these versions."""
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return result["cases"] if result.get("machine") == describe_machine() else {}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Measure memory and speed of training with random weights.")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="the cases to measure; * is anything")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, help="in place of the cases' own")
    full_size = argparse.BooleanOptionalAction
    parser.add_argument("--full_size", action=full_size, default=torch.cuda.is_available(), help="or --no-full_size")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_train.json")
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in options.only)]
    if not chosen:
        parser.error(f"--only: no such case; there are {', '.join(case.name for case in CASES)}")
    rows = measured_before(options.output)
    for case in chosen:
        row = measure(case, options.steps, options.batch or case.batch, options.full_size, options.backend)
        rows[case.name] = {**row, "shrunk": not options.full_size, "steps": options.steps}
        print(case.name, json.dumps(rows[case.name]), flush=True)
        result = keep_result(options.output, {"rank": RANK, "precision": "pure bf16 where not mixed", "cases": rows})
    return result


if __name__ == "__main__":
    main()
