"""What is measured of two trainers; how fast they are is not judged here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import versus_diffusers, versus_diffusers_sd
from benchmarks.side_by_side import Contest, Figures, Setup, Target, compared, missing_needs, our_command, watched
from benchmarks.versus_diffusers_sd import write_images
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

# With the flags of diffusers' examples, and their way to use them, but for the text, the VAE and LoRA.
STAND_IN = """
import argparse, json, os, sys
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "output_dir", "lr_scheduler", "mixed_precision"):
    parser.add_argument(f"--{name}", required=True)
for name in ("resolution", "train_batch_size", "max_train_steps", "checkpointing_steps", "lr_warmup_steps", "rank",
             "dataloader_num_workers", "seed"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--learning_rate", type=float, required=True)
for name in ("center_crop", "gradient_checkpointing"):
    parser.add_argument(f"--{name}", action="store_true")
"""
STABLE_DIFFUSION = STAND_IN + """
for name in ("train_data_dir", "cache_dir"):
    parser.add_argument(f"--{name}", required=True)
options = parser.parse_args()
folder = Path(options.train_data_dir)
rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
assert all(row["text"] for row in rows)
files = [folder / row["file_name"] for row in rows]
channels, edge = 4, options.resolution // 8
"""
DREAMBOOTH = STAND_IN + """
for name in ("instance_data_dir", "instance_prompt"):
    parser.add_argument(f"--{name}", required=True)
for name in ("pre_compute_text_embeddings", "text_encoder_use_attention_mask"):
    parser.add_argument(f"--{name}", action="store_true", required=True)
parser.add_argument("--tokenizer_max_length", type=int, required=True)
options = parser.parse_args()
files = list(Path(options.instance_data_dir).iterdir())
channels, edge = 3, options.resolution
"""
STEPS = """
assert len(files) == options.train_batch_size * options.max_train_steps
unet = UNet2DConditionModel.from_pretrained(options.pretrained_model_name_or_path, subfolder="unet")
optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate)
for step in range(options.max_train_steps):
    for file in files[step :: options.max_train_steps]:
        Image.open(file).resize((options.resolution,) * 2)
    x = torch.randn(options.train_batch_size, channels, edge, edge)
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    text = torch.randn(options.train_batch_size, 77, width)
    unet(x, 500, text).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
CONTESTS = {
    "SD": (versus_diffusers_sd, STABLE_DIFFUSION + STEPS),
    "IF": (versus_diffusers, DREAMBOOTH + STEPS),
}


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


@pytest.mark.parametrize("benchmark, stand_in", CONTESTS.values(), ids=CONTESTS)
def test_both_trainers_are_measured_side_by_side(tmp_path, benchmark, stand_in):
    output, script = tmp_path / "result.json", script_of(tmp_path, stand_in)
    options = ["--batch=2", "--rank=4", "--steps=3", "--rounds=2", "--resolution=64", "--no-full_size"]
    result = benchmark.main([str(script), *options, f"--folder={tmp_path}", f"--output={output}"])
    assert json.loads(output.read_text()) == result
    for name in ("example", "ours"):
        assert result[name].keys() >= {"samples_a_second", "peak_gb", "seconds_to_first_step"}
        assert all(value > 0 for value in result[name].values() if not isinstance(value, bool))
    ours = result["ours"]
    assert ours["times_its_speed"] > 0 and ours["times_its_peak"] > 0 and ours["times_its_start_later"] > 0
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


@pytest.mark.parametrize("benchmark", [versus_diffusers_sd, versus_diffusers], ids=CONTESTS)
def test_both_are_told_the_same(tmp_path, setup, benchmark):
    """Read by our own front door, and from the example's words."""
    contest: Contest = benchmark.contest_with(Path("it"))
    write_images(setup.images, 2, Size(80, 64))
    resolved, backends = load_all(our_command(contest, setup, tmp_path / "cache", tmp_path / "ours")[1:], {})
    flags = contest.example(setup, tmp_path / "cache", tmp_path / "example")
    theirs = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    config = resolved.config
    [images] = backends.images
    folder = theirs.get("train_data_dir") or theirs.get("instance_data_dir")
    assert images.instance_data_dir == setup.images == Path(folder)
    assert images.instance_prompt == theirs.get("instance_prompt")
    assert images.crop and images.crop_aspect == "square" and images.crop_style == "center" and "center_crop" in theirs
    assert images.resolution == int(theirs["resolution"])
    assert config.training.train_batch_size == int(theirs["train_batch_size"])
    assert config.training.max_train_steps == int(theirs["max_train_steps"])
    assert config.training.mixed_precision == theirs["mixed_precision"]
    assert config.lora.lora_rank == int(theirs["rank"])
    assert config.optimizer.learning_rate == float(theirs["learning_rate"])
    assert config.optimizer.lr_scheduler == theirs["lr_scheduler"] and config.optimizer.lr_warmup_steps == 0
    assert config.data.caption_dropout_probability == 0 and config.validation.validation_prompt is None


def test_a_target_needs_all_that_it_names():
    def run(speed: float, peak: float, start: float = 1.0) -> Figures:
        return Figures(speed, start, peak, None)

    both = Target(speed=1.3, peak=1.0)
    figures = compared([run(14, 3), run(20, 3), run(10, 3)], [run(10, 6), run(10, 6), run(10, 6)], both)
    named = {"times_its_speed": 1.4, "times_its_peak": 0.5, "times_its_start_later": 1.0}
    assert figures == {**named, "reaches_target": True}
    assert not compared([run(12, 5)], [run(10, 6)], both)["reaches_target"]
    assert not compared([run(14, 7)], [run(10, 6)], both)["reaches_target"]
    with_start = Target(speed=1.0, start=0.7)
    slow_at_first = [run(10, 9, 30), run(10, 9, 6), run(10, 9, 7)]
    assert compared(slow_at_first, [run(10, 6, 10)] * 3, with_start)["reaches_target"]
    assert not compared(slow_at_first, [run(10, 6, 9)] * 3, with_start)["reaches_target"]


@pytest.mark.parametrize("batch, on_gpu, target", [
    (4, False, Target(speed=1.0, start=0.7)), (4, True, Target(speed=2.5, peak=0.5)), (64, True, Target(speed=1.5)),
])  # fmt: skip
def test_the_target_is_that_of_the_machine_and_the_batch(setup, batch, on_gpu, target):
    assert versus_diffusers.target(replace(setup, batch=batch), on_gpu) == target
