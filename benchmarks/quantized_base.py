#!/usr/bin/env python3
"""What BASE_MODEL_PRECISION saves and what it costs: a LoRA beside weights of 8 and 4 bits.

    python -m benchmarks.quantized_base [--only memory drift learning] [--full_size] [--output FILE]

memory: what a step of the published stage I models takes as `--dry_run` estimates it; and of I-M, with random weights
in bfloat16 on this machine, the tensors that live during a step, and its time, in turns.
drift: how much the predictions of the demo's stage I and Stable Diffusion change along the way of a sampling, and how
near the pictures of the same noise are, beside rounding the weights to bfloat16.
learning: the demo's LoRA, trained on the base in each precision, and then used on the base in full: its loss, and how
far what it predicts is from what the LoRA does that was trained on the base in full, as a part of what that changed.
Beside it stands one that was trained like that from other first values.
What was measured before on the same machine stays in the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from benchmarks.gpu_train import Case, estimated_gb, shrunk
from benchmarks.machine import ROOT, describe_machine, keep_result
from benchmarks.step_overhead import our_loop
from benchmarks.synthetic import create_run, random_batch, random_parts
from examples.demo.draw import CAPTIONS, KNOWN
from examples.demo.score import load_pipeline
from helpers.data.collate import Batch
from helpers.data.sampler import Position
from helpers.diffusion.noising import add_noise
from helpers.models import loading
from helpers.models.facts import origin_of
from helpers.models.families import SPECS
from helpers.models.ledger import Ledger
from helpers.models.lora import LoRA
from helpers.models.parts import LossSettings, Parts
from helpers.models.published import architecture
from helpers.models.quantized import PACK, pack
from helpers.training.loop import train
from helpers.training.schedules import LearningRate

DEMO = ROOT / "examples" / "demo"
FAMILY = "deepfloyd-i"
SPEC = SPECS[FAMILY]
MODELS = {"DeepFloyd stage I": DEMO / "model", "Stable Diffusion": DEMO / "sd"}
PRECISIONS = (None, *PACK)
IN_FULL = "no_change"
EDGE = 64


def memory(models: Sequence[str], steps: int, batch: int, full_size: bool) -> dict[str, Any]:
    """GB (1e9 bytes) that a step takes, estimated of these models and counted of I-M, and what its time is."""
    return {"estimates": list(_estimates(models, full_size)), "counted": _counted(steps, batch, full_size)}


def _estimates(models: Sequence[str], full_size: bool) -> Iterator[dict[str, Any]]:
    for model in models:
        for base in PRECISIONS:
            cases = [Case(model, "lora", 4, checkpointing, base=base) for checkpointing in (False, True)]
            config = UNet2DConditionModel.load_config(architecture(cases[0].hub_id))
            config = config if full_size else shrunk(config)
            peaks = [round(estimated_gb(case, config, case.batch), 2) for case in cases]
            yield {"model": model, "precision": base or IN_FULL, "peak_gb": peaks[0], "checkpointed_gb": peaks[1]}


def _counted(steps: int, batch: int, full_size: bool) -> dict[str, Any]:
    """What a forward and a backward pass of real tensors hold, and the steps' seconds of this process."""
    case = Case("I-M", "lora", batch)
    config = UNet2DConditionModel.load_config(architecture(case.hub_id))
    config, accelerator = config if full_size else shrunk(config), Accelerator()
    figures, runs = {}, {}
    for base in PRECISIONS:
        torch.manual_seed(0)
        parts = random_parts(case.family, config, torch.bfloat16, accelerator.device)
        adapter = replace(case.adapter, base_precision=base)
        runs[base] = create_run(parts, adapter, torch.bfloat16, "adamw_bf16", accelerator)
        data = random_batch(parts, batch, accelerator.device)
        ledger = Ledger(parts.denoiser.parameters())
        with ledger:
            x = torch.randn(batch, 3, *data.images.shape[1:3], dtype=torch.bfloat16)
            output = runs[base].denoiser(x, torch.full((batch,), 500), data.prompt_embeds)
            output.float().square().mean().backward()
        runs[base].optimizer.zero_grad()
        figures[base or IN_FULL] = {
            "weights_gb": sum(parameter.nbytes for parameter in parts.unet.parameters()) / 1e9,
            "activations_gb": ledger.most_activations / 1e9,
        }
    turns = [{base: _seconds(run, data) for base, run in runs.items()} for _ in range(steps)]
    for base in PRECISIONS:
        figures[base or IN_FULL]["times_the_time"] = statistics.median(turn[base] / turn[None] for turn in turns)
    return {"model": "I-M", "batch": batch, "shrunk": not full_size, "precisions": figures}


def _seconds(run: Any, data: Batch) -> float:
    start = time.process_time()
    our_loop(run, data, 1)
    return time.process_time() - start


def drift(steps: int) -> dict[str, Any]:
    """Of each of the demo's models: the predictions' relative change, and the PSNR of pictures, by precision."""
    return {name: _drift_of(folder, steps) for name, folder in MODELS.items()}


def _drift_of(folder: Path, steps: int) -> dict[str, Any]:
    pipeline = load_pipeline(folder, None)
    unet, prompts = pipeline.unet.requires_grad_(False), [CAPTIONS[0].format(thing=thing) for thing in KNOWN[:4]]
    calls: list[tuple[tuple, dict, Tensor]] = []

    def remember(module: torch.nn.Module, inputs: tuple, named: dict, result: tuple) -> None:
        calls.append((deepcopy(inputs), deepcopy(named), _predicted(unet, result)))

    handle = unet.register_forward_hook(remember, with_kwargs=True)
    pictures = _draw(pipeline, prompts, steps)
    handle.remove()
    figures = {}
    for name in ("bfloat16", *PACK):
        changed = _in_bfloat16(unet) if name == "bfloat16" else deepcopy(unet)
        if name in PACK:
            pack(changed, name)
        with torch.no_grad():
            pairs = [(_predicted(unet, changed(*inputs, **named)), before) for inputs, named, before in calls]
        errors = torch.stack([(after - before).square().sum() for after, before in pairs])
        sizes = torch.stack([before.square().sum() for _, before in pairs])
        pipeline.unet = changed
        error = float(np.square(_draw(pipeline, prompts, steps) - pictures).mean())
        figures[name] = {
            "relative_change": float((errors.sum() / sizes.sum()).sqrt()),
            "psnr_of_pictures": -10 * float(np.log10(max(error, 1e-10))),
        }
    return figures


def _predicted(unet: UNet2DConditionModel, result: tuple) -> Tensor:
    """What was predicted of the noise, without a variance."""
    return result[0][:, : unet.config.in_channels]


def _in_bfloat16(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy whose weights are rounded to bfloat16, and which computes in float32, as the packed ones do here."""
    return deepcopy(unet).bfloat16().float()


def _draw(pipeline: DiffusionPipeline, prompts: Sequence[str], steps: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompts, num_inference_steps=steps, generator=generator, output_type="np").images


def learning(steps: int, batch: int) -> dict[str, Any]:
    """What LoRAs learned on the base in each precision do on the base in full: see the module."""
    with torch.no_grad():
        pictures = _pictures()
    held_out = next(_batches(pictures, 16, seed=1))[1]
    base = _predictions(_base(), held_out)
    learned = {base_precision or IN_FULL: _learn(base_precision, pictures, held_out, steps, batch, seed=0)
               for base_precision in PRECISIONS}  # fmt: skip
    learned["no_change, other first values"] = _learn(None, pictures, held_out, steps, batch, seed=1)
    reference = learned[IN_FULL][0]
    figures: dict[str, Any] = {"steps": steps, "batch": batch, "loss_of_the_base": base[1]}
    for name, (predicted, loss, losses) in learned.items():
        last = losses[-max(1, steps // 4):]
        figures[name] = {
            "loss": loss,
            "training_loss": statistics.mean(last),
            "distance": float((predicted - reference).norm() / (reference - base[0]).norm()),
        }
    return figures


def _pictures() -> list[tuple[Tensor, Tensor]]:
    """The demo's training pictures, uint8 `[64, 64, 3]`, those of its subject seven times, with their embeddings."""
    pipeline = load_pipeline(MODELS["DeepFloyd stage I"], None)
    paths = [path for kind, times in (("subject", 7), ("known", 1))
             for path in sorted((DEMO / "images" / kind).glob("*.[jp]*g")) * times]  # fmt: skip
    captions = {path: path.with_suffix(".txt").read_text("utf-8").strip() for path in paths}
    embeds = {path: pipeline.encode_prompt(caption)[0][0] for path, caption in captions.items()}
    images = {path: torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((EDGE, EDGE)))) for path in paths}
    return [(images[path], embeds[path]) for path in paths]


def _batches(pictures: Sequence[tuple[Tensor, Tensor]], size: int, seed: int) -> Iterator[tuple[Position, Batch]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = [pictures[i] for i in torch.randint(len(pictures), (size,), generator=generator)]
        yield Position(0, 0), Batch(*(torch.stack(list(one)) for one in zip(*chosen)), (None,) * size)


def _base() -> Parts:
    loss = LossSettings(snr_gamma=0.5)  # as the demo's env file has it
    return loading.load(SPEC, MODELS["DeepFloyd stage I"], torch.float32, loss=loss)


def _learn(
    base: str | None, pictures: Sequence[tuple[Tensor, Tensor]], held_out: Batch, steps: int, batch: int, seed: int
) -> tuple[Tensor, float, list[float]]:
    """What a LoRA predicts and its loss, on the base in full, and its losses as it was trained."""
    torch.manual_seed(seed)
    model, parts = MODELS["DeepFloyd stage I"], _base()
    origin = origin_of(str(model), FAMILY, SPEC, model, LossSettings())
    adapter = LoRA(16, 32, 0.0, "attention+conv", base_precision=base, origin=origin)
    run = create_run(parts, adapter, torch.float32, "adamw", Accelerator())
    run.learning_rate = LearningRate("cosine", 5e-3, 0.0, 10, steps)
    losses: list[float] = []
    objective = parts.objective

    def remember(*inputs: Tensor) -> Tensor:
        loss = objective(*inputs)
        losses.append(float(loss.detach().mean()))
        return loss

    run.parts = replace(parts, objective=remember)
    train(run, islice(_batches(pictures, batch, seed=0), steps), [])
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_weights(parts.denoiser, Path(folder))
        in_full, plain = replace(adapter, base_precision=None), _base()
        in_full.attach(plain.denoiser, torch.float32)
        in_full.load_weights(plain.denoiser, Path(folder))
    return *_predictions(plain, held_out), losses


@torch.no_grad()
def _predictions(parts: Parts, batch: Batch) -> tuple[Tensor, float]:
    """The noise that is predicted of pictures at timesteps all over, `[B, 3, H, W]`, and its mean squared error."""
    x = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    t = torch.linspace(50, 950, len(x)).long()
    output = parts.denoiser.eval()(add_noise(parts.schedule, x, noise, t), t, batch.prompt_embeds)[:, :3]
    return output, float(F.mse_loss(output, noise))


def measured_before(path: Path) -> dict[str, Any]:
    """The parts in the file, if they were measured on this machine with these versions, of any commit."""
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    same = {**result.pop("machine", {}), "commit": ""} == {**describe_machine(), "commit": ""}
    return result if same else {}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("memory", "drift", "learning")
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--models", nargs="+", default=("I-M", "I-L", "I-XL"), help="whose memory is estimated")
    parser.add_argument("--steps", type=int, default=80, help="of the training")
    parser.add_argument("--timed_steps", type=int, default=3)
    parser.add_argument("--sampling_steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8, help="of the training")
    full_size = argparse.BooleanOptionalAction
    parser.add_argument("--full_size", action=full_size, default=True, help="or --no-full_size, which shrinks them")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quantized_base.json")
    options = parser.parse_args(arguments)
    measure = {
        "memory": lambda: memory(options.models, options.timed_steps, 1, options.full_size),
        "drift": lambda: drift(options.sampling_steps),
        "learning": lambda: learning(options.steps, options.batch),
    }
    result = measured_before(options.output)
    for part in options.only:
        result = {name: own for name, own in result.items() if name != "machine"} | {part: measure[part]()}
        print(part, json.dumps(result[part], indent=2), flush=True)
        result = keep_result(options.output, result)
    return result


if __name__ == "__main__":
    main()
