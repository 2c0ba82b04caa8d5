"""What is measured of two trainers; how fast they are is not judged here."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import versus_diffusers_sd
from benchmarks.versus_diffusers_sd import (
    Figures,
    Setup,
    _compared,
    example_command,
    missing_needs,
    our_command,
    watched,
    write_images,
)
from helpers.config.load import load_all
from helpers.sizes import Size

STEPPING = """
import sys, time, torch
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
steps, first, later = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
for step in range(steps):
    weight.grad = torch.ones(1)
    time.sleep(later if step else first)
    optimizer.step()
"""

# With the flags of diffusers' example, and its way to use them, but for the text, the VAE and LoRA.
STAND_IN = """
import argparse, json, os, sys
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "train_data_dir", "cache_dir", "output_dir", "lr_scheduler",
             "mixed_precision"):
    parser.add_argument(f"--{name}", required=True)
for name in ("resolution", "train_batch_size", "max_train_steps", "checkpointing_steps", "lr_warmup_steps", "rank",
             "dataloader_num_workers", "seed"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--learning_rate", type=float, required=True)
for name in ("center_crop", "gradient_checkpointing"):
    parser.add_argument(f"--{name}", action="store_true")
options = parser.parse_args()
folder = Path(options.train_data_dir)
rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
assert len(rows) == options.train_batch_size * options.max_train_steps and all(row["text"] for row in rows)
unet = UNet2DConditionModel.from_pretrained(options.pretrained_model_name_or_path, subfolder="unet")
optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate)
for step in range(options.max_train_steps):
    for row in rows[step :: options.max_train_steps]:
        Image.open(folder / row["file_name"]).resize((options.resolution,) * 2)
    edge = options.resolution // 8
    latents = torch.randn(options.train_batch_size, 4, edge, edge)
    text = torch.randn(options.train_batch_size, 77, unet.config.cross_attention_dim)
    unet(latents, 500, text).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(
        pipeline=tmp_path / "pipeline",
        images=tmp_path / "images",
        resolution=64,
        batch=2,
        rank=4,
        steps=4,
        precision="no",
        checkpointing=False,
        workers=0,
    )


def script_of(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text, "utf-8")
    return path


def test_both_trainers_are_measured_side_by_side(tmp_path):
    output, script = tmp_path / "result.json", script_of(tmp_path, STAND_IN)
    options = ["--batch=2", "--rank=4", "--steps=3", "--rounds=2", "--resolution=64", "--no-full_size"]
    result = versus_diffusers_sd.main([str(script), *options, f"--folder={tmp_path}", f"--output={output}"])
    assert json.loads(output.read_text()) == result
    for name in ("example", "ours"):
        assert result[name].keys() >= {"samples_a_second", "peak_gb", "seconds_to_first_step"}
        assert all(value > 0 for value in result[name].values() if not isinstance(value, bool))
    assert result["ours"]["times_its_speed"] > 0 and result["ours"]["times_its_peak"] > 0
    assert result["machine"].keys() >= {"device", "torch", "diffusers", "commit"}
    assert result["example_was"]["script"] == "script.py" and not result["full_size"]
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "script.py"}, "the rest is tidied away"


def test_the_start_does_not_count_as_speed(tmp_path, setup):
    """Batches of 2: with the start it would be below 4 samples a second, and a step sleeps for 0.05 s at least."""
    script = script_of(tmp_path, STEPPING)
    figures = watched("it", [str(script), "4", "2", "0.05"], setup, tmp_path / "run")
    assert figures.seconds_to_first_step > 2
    assert 4 < figures.samples_a_second < 2 / 0.05


def test_memory_is_that_of_each_run(tmp_path, setup):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = f"import torch\nx = torch.ones(75_000_000, device={device!r})\ndel x\n"
    peaks = []
    for name, beginning in (("large", large), ("small", "")):
        script = script_of(tmp_path, beginning + STEPPING)
        peaks.append(watched(name, [str(script), "4", "0", "0"], setup, tmp_path / name).peak_gb)
    assert 0.15 < peaks[0] - peaks[1] < 0.4, "of 0.3; what importing torch takes for a moment counts too"


def test_a_trainer_that_fails_is_quoted(tmp_path, setup):
    script = script_of(tmp_path, STEPPING + "sys.exit('the disk is made of cheese')")
    with pytest.raises(SystemExit, match=r"it made 4 of 4 steps, and ended with exit code 1:\n.*cheese"):
        watched("it", [str(script), "4", "0", "0"], setup, tmp_path / "run")


def test_a_run_of_other_steps_than_asked_for_is_not_measured(tmp_path, setup):
    with pytest.raises(SystemExit, match="it made 3 of 4 steps"):
        watched("it", [str(script_of(tmp_path, STEPPING)), "3", "0", "0"], setup, tmp_path / "run")


def test_what_the_example_needs_is_told_before_anything_is_made(tmp_path):
    script = script_of(tmp_path, "import json\nimport not_installed.parts as n\nfrom also_missing import this\n")
    assert missing_needs(script) == ["not_installed", "also_missing"]
    with pytest.raises(SystemExit, match="script.py needs not_installed, also_missing: pip install"):
        versus_diffusers_sd.main([str(script), f"--folder={tmp_path}", f"--output={tmp_path / 'result.json'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_both_are_told_the_same(tmp_path, setup):
    """Read by our own front door, and from the example's words."""
    write_images(setup.images, 2, Size(80, 64))
    resolved, backends = load_all(our_command(setup, tmp_path / "cache", tmp_path / "ours")[1:], {})
    flags = example_command(Path("it"), setup, tmp_path / "cache", tmp_path / "example")
    theirs = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    config = resolved.config
    [images] = backends.images
    assert images.instance_data_dir == setup.images == Path(theirs["train_data_dir"])
    assert images.crop and images.crop_aspect == "square" and images.crop_style == "center" and "center_crop" in theirs
    assert images.resolution == int(theirs["resolution"])
    assert config.training.train_batch_size == int(theirs["train_batch_size"])
    assert config.training.max_train_steps == int(theirs["max_train_steps"])
    assert config.training.mixed_precision == theirs["mixed_precision"]
    assert config.lora.lora_rank == int(theirs["rank"])
    assert config.optimizer.learning_rate == float(theirs["learning_rate"])
    assert config.optimizer.lr_scheduler == theirs["lr_scheduler"] and config.optimizer.lr_warmup_steps == 0
    assert config.data.caption_dropout_probability == 0 and config.validation.validation_prompt is None


def test_the_target_needs_both_speed_and_memory():
    def run(speed: float, peak: float) -> Figures:
        return Figures(speed, 1.0, peak, None)

    figures = _compared([run(14, 3), run(20, 3), run(10, 3)], [run(10, 6), run(10, 6), run(10, 6)])
    assert figures == {"times_its_speed": 1.4, "times_its_peak": 0.5, "reaches_target": True}
    assert not _compared([run(12, 5)], [run(10, 6)])["reaches_target"]
    assert not _compared([run(14, 6)], [run(10, 6)])["reaches_target"]
