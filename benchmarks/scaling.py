"""How start, step and memory grow with the dataset, and checkpoints with the rank. Prints and saves a JSON.

    python -m benchmarks.scaling [--images 1000 3000 10000 30000 100000] [--ranks 4 8 16 32 64 128] [--steps 40]

datasets: the demo's stage I is trained by `train_sd2x.py` on so many small images of 40 px, twice: the first run looks
at all files, decodes and caches them; the second one finds all of it. Of each: seconds to the end of the first step,
seconds a step after the first ones, and the peak of the process's memory in 1e9 bytes. `bytes_an_image` is by how much
the second run's peak grows from the smallest dataset to the largest, for each image more.

checkpoints: of a LoRA of each rank on IF-I-M's architecture, with random weights and adamw_bf16: their bytes, and the
seconds that one takes to be written and flushed.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.machine import ROOT, write_result
from benchmarks.side_by_side import Figures, Setup, watched
from benchmarks.step_overhead import our_loop
from benchmarks.synthetic import create_run, random_batch, random_parts
from helpers.config.families import DEEPFLOYD_I
from helpers.models.facts import origin_of
from helpers.models.families import SPECS
from helpers.models.lora import LoRA
from helpers.models.parts import LossSettings
from helpers.models.published import architecture
from helpers.training import checkpoints

DEMO = ROOT / "examples" / "demo" / "model"
EDGE, BATCH = 40, 4


def write_images(folder: Path, count: int) -> None:
    """Small JPEGs in folders of a thousand, each with bytes and pixels of its own."""
    for first in range(0, count, 1000):
        place = folder / f"{first // 1000:04}"
        place.mkdir(parents=True)
        colours = np.random.default_rng(first).integers(0, 256, (min(1000, count - first), 2, 2, 3), dtype=np.uint8)
        for number, colour in enumerate(colours):
            picture = Image.fromarray(colour).resize((EDGE, EDGE), Image.Resampling.BILINEAR)
            file = io.BytesIO()
            picture.save(file, "JPEG", comment=f"{first + number}")
            (place / f"{number:03}.jpg").write_bytes(file.getvalue())


def command(folder: Path, setup: Setup, name: str) -> list[str]:
    """Our own trainer's, on the images of the setup."""
    dataset = {
        "id": "small",
        "instance_data_dir": str(setup.images),
        "caption_strategy": "instanceprompt",
        "instance_prompt": "a photo of a red circle",
        "resolution": EDGE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.json"
    data.write_text(json.dumps([dataset]), "utf-8")
    return [
        str(ROOT / "train_sd2x.py"),
        "--model_type=deepfloyd-lora",
        f"--pretrained_model_name_or_path={setup.pipeline}",
        f"--data_backend_config={data}",
        f"--cache_dir={folder / 'cache'}",
        f"--output_dir={folder / name}",
        "--resume_from_checkpoint=none",
        f"--resolution={EDGE}",
        f"--validation_resolution={EDGE}",
        f"--train_batch_size={setup.batch}",
        f"--max_train_steps={setup.steps}",
        "--checkpointing_steps=0",
        "--mixed_precision=no",
    ]


def measure_datasets(sizes: Sequence[int], steps: int, folder: Path) -> dict[str, object]:
    """Each size's first and second run, and what an image takes of the memory."""
    rows = []
    for count in sorted(sizes):
        images = folder / f"images-{count}"
        write_images(images, count)
        setup = Setup(DEMO, images, EDGE, BATCH, 32, steps, "no", checkpointing=False, workers=0)
        row: dict[str, object] = {"images": count}
        for name in ("first", "second"):
            place = folder / f"run-{count}"
            made = watched(f"{count} images", command(place, setup, name), setup, place / f"log-{name}")
            row[name] = _figures(made, setup.batch)
        print(row, flush=True)
        rows.append(row)
    small, large = rows[0], rows[-1]
    more = large["images"] - small["images"]
    growth = (large["second"]["peak_gb"] - small["second"]["peak_gb"]) * 1e9
    return {"datasets": rows, **({"bytes_an_image": _rounded(growth / more)} if more else {})}


def _figures(made: Figures, batch: int) -> dict[str, float]:
    return {
        "seconds_to_first_step": _rounded(made.seconds_to_first_step),
        "seconds_a_step": _rounded(batch / made.samples_a_second),
        "peak_gb": _rounded(made.peak_gb),
    }


def measure_checkpoints(ranks: Sequence[int], config: dict[str, object], folder: Path) -> dict[str, object]:
    """Bytes and seconds of a checkpoint of each rank."""
    accelerator, rows = Accelerator(), []
    origin = origin_of(str(DEMO), DEEPFLOYD_I.key, SPECS[DEEPFLOYD_I.key], DEMO, LossSettings())
    for rank in sorted(ranks):
        parts = random_parts(DEEPFLOYD_I.key, config, torch.bfloat16, accelerator.device)
        adapter = LoRA(rank, rank, dropout=0.0, targets="attention", origin=origin)
        run = create_run(parts, adapter, torch.bfloat16, "adamw_bf16", accelerator)
        our_loop(run, random_batch(parts, 1, accelerator.device), 1)  # so that the optimizer has its state
        seconds = []
        for step in range(1, 4):
            start = time.perf_counter()
            saved = checkpoints.save(folder, step, adapter, run.parts.denoiser, {"run": run.state()}, keep=1)
            seconds.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in saved.rglob("*"))
        rows.append({"rank": rank, "bytes": size, "seconds": _rounded(statistics.median(seconds))})
        print(rows[-1], flush=True)
        for path in saved.iterdir():
            path.unlink()
        saved.rmdir()
    return {"checkpoints": rows}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[1_000, 3_000, 10_000, 30_000, 100_000])
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=40)
    published = architecture(DEEPFLOYD_I.flavours["i-medium-400m"])
    parser.add_argument("--architecture", type=Path, default=published, help="of the UNet whose LoRAs are saved")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder: 2 GB")
    output = ROOT / "benchmarks" / "results" / "scaling.json"
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args(arguments)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="floydtuner-benchmark-", dir=options.folder) as name:
        if options.images:
            figures |= measure_datasets(options.images, options.steps, Path(name))
        if options.ranks:
            config = dict(UNet2DConditionModel.load_config(options.architecture))
            figures |= measure_checkpoints(options.ranks, config, Path(name) / "checkpoints")
    return write_result(options.output, figures)


if __name__ == "__main__":
    main()
