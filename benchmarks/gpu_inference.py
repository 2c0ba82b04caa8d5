#!/usr/bin/env python3
"""Memory and speed of the cascade to 1024 px on a GPU, with random weights of the published architectures.

    python -m benchmarks.gpu_inference [--only NAME ...] [--steps 10] [--folder DIR] [--output FILE]
    python -m benchmarks.gpu_inference --estimate

For IF-I-M, IF-II-M and the x4 upscaler, and for IF-I-XL, IF-II-L and the same, at each class of `inference.py --vram`:
the peak of the GPU's memory and the seconds of each component, placed as `inference.py` places it, beside what was
estimated. Weights are written to a folder first: 13 GB for M, 23 GB for XL. `--estimate` needs no GPU, and prints the
estimates alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoConfig, AutoModelForTextEncoding

from benchmarks.machine import ROOT, describe_machine, keep_result
from helpers.inference.placement import GB, Budget, Place, budget_of, place
from helpers.inference.stages import Stage, decode, open_stage, sample
from helpers.models import bases
from helpers.models.bases import Base
from helpers.models.footprint import Footprint, of_text_encoder, of_unet, of_vae
from helpers.models.ledger import META
from helpers.models.lora_files import bare_unet
from helpers.models.published import ARCHITECTURES, architecture
from helpers.models.schedulers import SCHEDULER_CONFIG
from helpers.sizes import Size

DTYPE = torch.bfloat16
VRAM: Mapping[str, int | None] = {"6": None, "auto on 12 GB": 12 * GB, "16": None, "24": None, "max": None}
"""The classes of --vram; of auto with the bytes that a GPU has free."""

MOST_CAPTIONS, MOST_PICTURES = 8, 16
STAGES = ("stage1", "stage2", "upscaler")
EDGES = (64, 256, 1024)
X4 = "stabilityai/stable-diffusion-x4-upscaler"
CASCADES: Mapping[str, tuple[str, str, str]] = {
    "M/M/x4": ("DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-II-M-v1.0", X4),
    "XL/L/x4": ("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0", X4),
}
DEMO = dict(zip(STAGES, ("model", "stage2", "stage3")))
TEXT_ENCODER, VAE = "t5-v1_1-xxl_text_encoder", "stable-diffusion-x4-upscaler_vae"


@dataclass(frozen=True)
class Component:
    """What is on the device at a time.

    Attributes:
        name: "text", "stage1", "stage2", "upscaler" or "VAE".
        place: how it works.
    """

    name: str
    footprint: Footprint
    place: Place


def components(cascade: str, budget: Budget, edges: Sequence[int] = EDGES) -> Iterator[Component]:
    """The components of a published cascade, as they work within a budget."""
    text = of_text_encoder(ARCHITECTURES / f"{TEXT_ENCODER}.json")
    yield Component("text", text, place(text, budget, most=MOST_CAPTIONS))
    for name, hub_id, edge in zip(STAGES, CASCADES[cascade], edges):
        x = Size(edge, edge) if name != "upscaler" else Size(edge // 4, edge // 4)
        unet = of_unet(_config(architecture(hub_id)), x, DTYPE)
        yield Component(name, unet, place(unet, budget, edge * edge, MOST_PICTURES))
    picture = Size(edges[-1], edges[-1])
    whole, tiled = (of_vae(_config(ARCHITECTURES / f"{VAE}.json"), picture, tiled) for tiled in (False, True))
    yield Component("VAE", whole, place(whole, budget, picture.width * picture.height, 1, tiled))


def _config(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def budget_at(vram: str) -> Budget:
    """What a class of `VRAM` allows."""
    return budget_of(vram.partition(" ")[0], "cuda", VRAM[vram])


def as_row(component: Component) -> dict[str, Any]:
    where = component.place
    words = {"by_groups": where.by_groups, "batch": where.batch, "tiled": where.tiled}
    return words | {"estimated_gb": where.bytes / GB, "weights_gb": component.footprint.weights / GB}


def estimates() -> dict[str, dict[str, Any]]:
    """What every case is estimated to take: {case: {component: figures}}."""
    return {
        f"{cascade} --vram {vram}": {one.name: as_row(one) for one in components(cascade, budget_at(vram))}
        for cascade in CASCADES for vram in VRAM
    }


def table(cases: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The cases as Markdown, in GB."""
    names = list(next(iter(cases.values())))
    lines = [f"| case | {' | '.join(names)} | peak |", f"|---{'|---' * (len(names) + 1)}|"]
    for case, rows in cases.items():
        peak = max(row.get("peak_gb", row["estimated_gb"]) for row in rows.values())
        lines.append(f"| {case} | {' | '.join(_cell(row) for row in rows.values())} | {peak:.1f} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    how = ["in groups"] * row["by_groups"] + ["in tiles"] * row["tiled"]
    how += [f"{row['batch']} at a time"] * (row["batch"] > 1)
    measured = f" ({row['peak_gb']:.1f} measured)" if "peak_gb" in row else ""
    return f"{row['estimated_gb']:.1f}{measured}{''.join(f', {word}' for word in how)}"


# Folders with random weights

def write_folders(cascade: str, folder: Path, device: torch.device) -> dict[str, Path]:
    """The models of a cascade as inference.py takes them, with random weights; those that are there stay.

    Of the text encoders only stage I's is written, and all small files are the demo's.
    """
    folders = {}
    for name, hub_id in zip(STAGES, CASCADES[cascade]):
        target = folder / hub_id.rpartition("/")[2]
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(ROOT / "examples" / "demo" / DEMO[name], partial, ignore=_large)
            _write_weights(name, hub_id, partial, device)
            partial.rename(target)
        folders[name] = target
    return folders


def _large(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors")}


def _write_weights(name: str, hub_id: str, folder: Path, device: torch.device) -> None:
    _save(bare_unet(_config(architecture(hub_id))), folder / "unet", DTYPE, device)
    if name == "upscaler":
        with META:
            vae = AutoencoderKL.from_config(_config(ARCHITECTURES / f"{VAE}.json"))
        _save(vae, folder / "vae", torch.float32, device)
    else:
        for component in ("scheduler", "image_noising_scheduler"):
            if (folder / component).exists():
                shutil.copy(ARCHITECTURES / f"{name}_{component}.json", folder / component / SCHEDULER_CONFIG)
    if name == "stage1":
        config = _config(ARCHITECTURES / f"{TEXT_ENCODER}.json")
        with META:
            encoder = AutoModelForTextEncoding.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        _save(encoder, folder / "text_encoder", DTYPE, device)
    else:
        for part in bases.TEXT:
            shutil.rmtree(folder / part, ignore_errors=True)


def _save(model: torch.nn.Module, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Write a model of shapes alone, filled with noise, which on a GPU is quick to draw."""
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    del model
    give_back(device)


# Measuring

def measure(
    component: Component, folders: Mapping[str, Path], sizes: Sequence[Size], device: torch.device, steps: int
) -> dict[str, float]:
    """What one component really takes: its peak, on a GPU, and seconds, without those of loading it.

    Args:
        sizes: of the three stages' pictures.
    """
    give_back(device)
    where = component.place
    if component.name == "text":
        base = bases.find(str(folders["stage1"]), download=False)
        encoder = base.spec.text.load(folders["stage1"], device, None, where.by_groups)
        return _measured(lambda: encoder(["a photo of a dog"] * where.batch), device)
    number = STAGES.index(component.name) if component.name in STAGES else 2
    base = bases.find(str(folders[STAGES[number]]), download=False)
    if component.name == "VAE":
        vae = base.spec.space.load(folders["upscaler"], device, None)
        vae.use_tiling = where.tiled
        x = base.spec.space.size(sizes[number])
        return _measured(lambda: decode(vae, torch.randn(base.spec.space.channels, x.height, x.width)), device)
    stage = stage_of(STAGES[number], base, sizes[number], steps)
    dtype = DTYPE if device.type == "cuda" else torch.float32
    pipeline = open_stage(stage, folders[stage.option], device, dtype, where.by_groups)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.randn(where.batch, 77, base.unet.get("encoder_hid_dim") or base.unet["cross_attention_dim"])
    images = [Image.new("RGB", sizes[number - 1], "gray")] * where.batch if number else None
    return _measured(lambda: sample(pipeline, stage, text, text, range(where.batch), images), device)


def stage_of(option: str, base: Base, size: Size, steps: int) -> Stage:
    level = base.family.validation_noise_level if base.family.upscales else None
    return Stage(option, base, (), size, steps, base.family.validation_guidance, level, None, None)


def _measured(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds} | ({"peak_gb": torch.cuda.max_memory_allocated() / GB} if on_gpu else {})


def give_back(device: torch.device) -> None:
    """Free what was let go of, so that it is in no later peak."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Measure memory and speed of sampling with random weights.")
    parser.add_argument("--estimate", action="store_true", help="only print what is estimated; needs no GPU")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="the cases to measure; * is anything")
    parser.add_argument("--steps", type=int, default=10, help="of each stage")
    parser.add_argument("--folder", type=Path, help="for the weights, kept; without it a temporary one, deleted")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_inference.json")
    options = parser.parse_args(arguments)
    cases = {f"{cascade} --vram {vram}": (cascade, vram) for cascade in CASCADES for vram in VRAM}
    chosen = [case for case in cases if any(fnmatchcase(case, pattern) for pattern in options.only)]
    if not chosen:
        parser.error(f"--only: no such case; there are {', '.join(cases)}")
    if options.estimate:
        told = {case: rows for case, rows in estimates().items() if case in chosen}
        print(table(told))
        return told
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here whose memory could be measured: type --estimate for the estimates alone")
    device, sizes = torch.device("cuda"), [Size(edge, edge) for edge in EDGES]
    rows = _measured_before(options.output)
    with tempfile.TemporaryDirectory() as temporary:
        for case in chosen:
            cascade, vram = cases[case]
            folders = write_folders(cascade, options.folder or Path(temporary), device)
            rows[case] = {
                one.name: as_row(one) | measure(one, folders, sizes, device, options.steps)
                for one in components(cascade, budget_at(vram))
            }
            print(case, json.dumps(rows[case]), flush=True)
            result = keep_result(options.output, {"steps": options.steps, "dtype": "bf16, VAE fp32", "cases": rows})
    print(table(rows))
    return result


def _measured_before(path: Path) -> dict[str, Any]:
    """The cases in the file, if they were measured on this machine with these versions."""
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return result["cases"] if result.get("machine") == describe_machine() else {}


if __name__ == "__main__":
    main()
