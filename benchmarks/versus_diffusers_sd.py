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

Target: at least 1.3 times the example's samples a second at the same batch, with less peak memory.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.data import write_photo
from benchmarks.machine import ROOT, write_result
from examples.demo import make_sd
from helpers.config.families import STABLE_DIFFUSION
from helpers.models.published import architecture
from helpers.sizes import Size

TARGET = 1.3
WARM_UP = 10
LAST_LINES = 15
NEEDS = ("datasets", "torchvision")
WATCHED = ROOT / "benchmarks" / "watched.py"
LEARNING_RATE = 1e-5

VAE = {
    "sample_size": 512,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
"""Those of Stable Diffusion 1.5."""


@dataclass(frozen=True)
class Setup:
    """What both trainers are told.

    Attributes:
        precision: "bf16" or "no".
        steps: of each run.
        workers: processes that load the example's images; ours has its own thread.
    """

    pipeline: Path
    images: Path
    resolution: int
    batch: int
    rank: int
    steps: int
    precision: str
    checkpointing: bool
    workers: int


@dataclass(frozen=True)
class Figures:
    """What one run took. Seconds and 1e9 bytes; `peak_gb_of_training` is not known of a CPU."""

    samples_a_second: float
    seconds_to_first_step: float
    peak_gb: float
    peak_gb_of_training: float | None


def missing_needs(script: Path) -> list[str]:
    """The packages that a script imports at its beginning, and that are not installed."""
    names: list[str] = []
    for node in ast.parse(script.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    roots = dict.fromkeys(name.partition(".")[0] for name in names)
    return [name for name in roots if find_spec(name) is None]


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


def our_command(setup: Setup, cache: Path, folder: Path, pure_bf16: bool = False) -> list[str]:
    """The same for `train_sd2x.py`."""
    dataset = {
        "id": "photos",
        "instance_data_dir": str(setup.images),
        "resolution": setup.resolution,
        "crop_style": "center",
        "caption_strategy": "filename",
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.json"
    data.write_text(json.dumps([dataset]), "utf-8")
    return [
        str(ROOT / "train_sd2x.py"),
        "--model_type=lora",
        f"--pretrained_model_name_or_path={setup.pipeline}",
        f"--data_backend_config={data}",
        f"--cache_dir={cache}",
        f"--output_dir={folder / 'output'}",
        "--resume_from_checkpoint=none",
        f"--resolution={setup.resolution}",
        "--resolution_type=pixel",
        f"--validation_resolution={setup.resolution}",  # of no validation, but it is checked beside the other
        "--caption_dropout_probability=0",
        "--vae_batch_size=4",
        f"--train_batch_size={setup.batch}",
        f"--max_train_steps={setup.steps}",
        "--checkpointing_steps=0",
        f"--learning_rate={LEARNING_RATE}",
        "--lr_scheduler=constant",
        f"--mixed_precision={setup.precision}",
        f"--pure_bf16={str(pure_bf16).lower()}",
        f"--lora_rank={setup.rank}",
        f"--gradient_checkpointing={str(setup.checkpointing).lower()}",
        "--seed=42",
    ]


def watched(name: str, command: Sequence[str], setup: Setup, folder: Path) -> Figures:
    """Run a trainer to its end.

    Raises:
        SystemExit: it failed, or made other steps than it was told; with its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, log = folder / "report.json", folder / "log.txt"
    with log.open("wb") as out:
        # The pipeline and the images are here: nothing is to be asked of a hub.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        run = [sys.executable, str(WATCHED), str(report), *command]
        code = subprocess.run(run, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=environment).returncode
    told = json.loads(report.read_text("utf-8")) if report.exists() else {"seconds_of_steps": []}
    ends = told["seconds_of_steps"]
    if code or len(ends) != setup.steps:
        lines = "\n".join(log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:])
        raise SystemExit(f"{name} made {len(ends)} of {setup.steps} steps, and ended with exit code {code}:\n{lines}")
    first = min(WARM_UP, (len(ends) - 1) // 2)
    seconds_a_step = (ends[-1] - ends[first]) / (len(ends) - 1 - first)
    return Figures(setup.batch / seconds_a_step, ends[0], told["peak_gb"], told.get("peak_gb_of_training"))


def measure(script: Path, setup: Setup, rounds: int, folder: Path) -> dict[str, object]:
    """Figures of the example and of ours, and of ours how many times the example's they are."""
    commands: dict[str, Callable[[Path, Path], list[str]]] = {
        "example": partial(example_command, script, setup),
        "ours": partial(our_command, setup),
    }
    if setup.precision == "bf16":
        commands["ours in pure bf16"] = partial(our_command, setup, pure_bf16=True)
    runs: dict[str, list[Figures]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name, command in commands.items():
            place = folder / name / f"run {turn}"
            runs[name].append(watched(name, command(folder / name / "cache", place), setup, place))
            print(name, runs[name][-1], flush=True)
    result: dict[str, object] = {name: _summary(figures) for name, figures in runs.items()}
    for name in runs.keys() - {"example"}:
        result[name] |= _compared(runs[name], runs["example"])
    return result


def _summary(runs: Sequence[Figures]) -> dict[str, object]:
    starts = [run.seconds_to_first_step for run in runs]
    training = [run.peak_gb_of_training for run in runs if run.peak_gb_of_training is not None]
    return {
        "samples_a_second": _median(run.samples_a_second for run in runs),
        "peak_gb": _median(run.peak_gb for run in runs),
        **({"peak_gb_of_training": _median(training)} if training else {}),
        "seconds_to_first_step": _rounded(starts[0]),
        **({"seconds_to_first_step_later": _median(starts[1:])} if starts[1:] else {}),
    }


def _compared(ours: Sequence[Figures], example: Sequence[Figures]) -> dict[str, object]:
    """Each round of ours beside the example's."""
    pairs = list(zip(ours, example))
    speed = _median(mine.samples_a_second / other.samples_a_second for mine, other in pairs)
    memory = _median(mine.peak_gb / other.peak_gb for mine, other in pairs)
    return {"times_its_speed": speed, "times_its_peak": memory, "reaches_target": speed >= TARGET and memory < 1}


def _median(values: Iterable[float]) -> float:
    return _rounded(statistics.median(values))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


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
        vae=AutoencoderKL(**VAE),
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


def describe_example(script: Path) -> dict[str, str]:
    """Which file it was, and the versions of what it needs besides this project's packages."""
    installed = [name for name in NEEDS if find_spec(name)]
    versions = {name: version(name) for name in installed}
    return {"script": script.name, "sha256": hashlib.sha256(script.read_bytes()).hexdigest(), **versions}


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    options = _options(arguments)
    if missing := missing_needs(options.script):
        raise SystemExit(f"{options.script.name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="floydtuner-benchmark-", dir=options.folder) as name:
        folder = Path(name)
        setup = _setup(options, folder)
        make_pipeline(setup.pipeline, options.full_size)
        resolution = setup.resolution
        write_images(setup.images, setup.batch * setup.steps, Size(resolution * 2, resolution * 3 // 2))
        figures = measure(options.script, setup, options.rounds, folder)
    facts = {"resolution": setup.resolution, "batch": setup.batch, "rank": setup.rank, "precision": setup.precision}
    facts |= {"gradient_checkpointing": setup.checkpointing, "full_size": options.full_size}
    facts |= {"steps": setup.steps, "rounds": options.rounds, "target": TARGET}
    return write_result(options.output, {**facts, **figures, "example_was": describe_example(options.script)})


def _setup(options: argparse.Namespace, folder: Path) -> Setup:
    return Setup(
        pipeline=folder / "pipeline",
        images=folder / "images",
        resolution=options.resolution or (512 if options.full_size else 128),
        batch=options.batch,
        rank=options.rank,
        steps=options.steps,
        precision="bf16" if torch.cuda.is_available() else "no",
        checkpointing=options.gradient_checkpointing,
        workers=options.workers,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--resolution", type=int, help="default: 512, or 128 of the tiny pipeline")
    parser.add_argument("--steps", type=int, default=100, help="of each run; 3 at the least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both")
    workers = min(4, (os.cpu_count() or 1) - 1)
    parser.add_argument("--workers", type=int, default=workers, help="processes that load the example's images")
    full_size = argparse.BooleanOptionalAction
    parser.add_argument("--full_size", action=full_size, default=torch.cuda.is_available(), help="or --no-full_size")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder: 5 GB at full size")
    output = ROOT / "benchmarks" / "results" / "versus_diffusers_sd.json"
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps: found {options.steps}, type 3 or more")
    if not options.script.is_file():
        parser.error(f"{options.script}: no such file; see the examples of https://github.com/huggingface/diffusers")
    options.script = options.script.resolve()
    return options


if __name__ == "__main__":
    main()
