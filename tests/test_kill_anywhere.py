"""A run that is killed at 100 moments, and started again each time, comes out as one that nobody touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.training import checkpoints
from tests.killing import BETWEEN, PARTS
from tests.test_trainer import ADAPTER, assert_equal

ROOT = Path(__file__).parent.parent
STEPS = 4
FLAGS = {
    "model_type": "deepfloyd-lora",
    "lora_rank": 2,
    "learning_rate": 1e-3,
    "mixed_precision": "no",
    "train_batch_size": 2,
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "resolution": 32,
    "caption_dropout_probability": 0.3,
    "validation_prompt": "a cat",
    "validation_resolution": 32,
    "validation_steps": 2,
    "validation_num_inference_steps": 1,
    "validation_guidance": 1,
    "report_to": "none",
}
# What is trained, in how many datasets, and how often it is killed.
KINDS: dict[str, tuple[dict[str, object], int, int]] = {
    "plain": ({}, 1, 30),
    "accumulation, average, dropout": (
        {"gradient_accumulation_steps": 2, "train_batch_size": 1, "use_ema": True, "lora_dropout": 0.2}, 1, 25
    ),
    "several datasets with repeats": ({"checkpointing_steps": 2}, 2, 25),
    "latents": ({"model_type": "lora", "resolution": 64, "validation_resolution": 64, "vae_batch_size": 2}, 1, 20),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, smaller_model, tiny_sd, photos) -> Path:
    """The folder with all that the runs of each kind left; they go side by side."""
    folder = tmp_path_factory.mktemp("killed")
    kinds = {}
    for seed, (kind, (flags, datasets, kills)) in enumerate(KINDS.items()):
        (folder / f"data-{seed}").mkdir()
        model = tiny_sd if flags.get("model_type") == "lora" else smaller_model
        values = {**FLAGS, **flags, "pretrained_model_name_or_path": model,
                  "data_backend_config": dataloader(folder / f"data-{seed}", photos, datasets)}
        kinds[kind] = {"flags": [f"--{name}={value}" for name, value in values.items()], "kills": kills, "seed": seed}
    words = json.dumps({"kinds": kinds, "folder": str(folder / "runs")})
    command = [sys.executable, "-m", "tests.killing", words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder / "runs"


def dataloader(folder: Path, photos: Path, datasets: int) -> Path:
    """`datasets` parts of the photos, each with a file of captions beside each image; the first one is repeated."""
    images = sorted(path for path in photos.iterdir() if path.suffix != ".txt")[:6]
    entries = []
    for number in range(datasets):
        own = folder / f"images-{number}"
        own.mkdir()
        for image in images[number::datasets]:
            for path in (image, image.with_suffix(".txt")):
                (own / path.name).write_bytes(path.read_bytes())
        entries.append({
            "id": f"photos-{number}", "instance_data_dir": str(own), "crop": True, "crop_aspect": "square",
            "caption_strategy": "textfile", "repeats": 1 if datasets > 1 and number == 0 else 0,
            "probability": 1 + number,
        })
    path = folder / "data.json"
    path.write_text(json.dumps(entries), "utf-8")
    return path


def test_a_hundred_kills_met_every_part_of_a_run(killed):
    kills = sum((Counter(json.loads((killed / kind / "kills.json").read_text())) for kind in KINDS), Counter())
    assert kills.total() == 100
    assert kills.keys() == {*PARTS, BETWEEN}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_and_started_again_it_ends_with_the_same_bits(killed, kind):
    whole = killed / kind / "whole" / "output"
    outputs = [path / "output" for path in (killed / kind).glob("killed-*")]
    assert outputs
    for other in outputs:
        assert_equal(load_file(whole / ADAPTER), load_file(other / ADAPTER))
        last = [path / f"checkpoint-{STEPS}" for path in (whole, other)]
        assert_equal(*(load_file(path / ADAPTER) for path in last))
        assert_equal(*(checkpoints.load_state(path)["run"] for path in last))
        pictures = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*.png")}
        assert pictures and all((other / name).read_bytes() == content for name, content in pictures.items())
        assert not list(other.glob(".checkpoint-*")), "nothing half-written stays"
