"""A ControlNet end to end: trained on images and their edges, and loaded by diffusers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from helpers.config.paths import ROOT
from helpers.images import loading
from helpers.images.geometry import covering, crop_box
from helpers.sizes import Size
from helpers.training import checkpoints

SIZE = Size(64, 64)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLAGS = {
    "model_type": "full",
    "controlnet": True,
    "lora_rank": None,
    "resolution": 64,
    "validation_resolution": "64",
    "num_eval_images": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture
def edges(tmp_path, photos) -> Path:
    """The edges of the photos, under their names."""
    folder = tmp_path / "edges"
    folder.mkdir()
    for path in photos.iterdir():
        if path.suffix != ".txt":
            with Image.open(path) as image:
                image.convert("L").filter(ImageFilter.FIND_EDGES).save(folder / f"{path.stem}.png")
    return folder


@pytest.fixture
def controlled(trainer, tiny_sd, photos, edges, tmp_path):
    """The trainer on a ControlNet of the tiny Stable Diffusion."""
    data = tmp_path / "controlled.json"
    data.write_text(json.dumps([
        {"id": "photos", "instance_data_dir": str(photos), "caption_strategy": "textfile"},
        {"id": "edges", "dataset_type": "conditioning", "instance_data_dir": str(edges)},
    ]), "utf-8")

    def run(**flags: object) -> int:
        return trainer(**{"pretrained_model_name_or_path": tiny_sd, "data_backend_config": data, **FLAGS, **flags})

    return run


def pictures_of(output: Path, step: int) -> dict[str, np.ndarray]:
    paths = (output / "validation_images" / f"step_{step}").glob("*_64x64.png")
    return {path.stem: np.asarray(Image.open(path)) for path in paths}


def test_what_comes_out_draws_in_diffusers_what_validation_showed(controlled, tmp_path, tiny_sd, photos, edges, capsys):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    del scheduler["clip_sample"]  # as of most schedulers, and diffusers' DDIM clips where it is not told
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    flags = {"learning_rate": 1e-2, "validation_steps": 2, "validation_prompt": "a cat"}
    assert controlled(pretrained_model_name_or_path=model, max_train_steps=4, **flags) == 0
    output = tmp_path / "output"
    said = capsys.readouterr().out
    assert "output/controlnet    the result, for diffusers" in said and "validation prompts are not drawn" in said
    shown = pictures_of(output, 4)
    assert len(shown) == 2 and shown.keys() == pictures_of(output, 0).keys()
    sheet = Image.open(output / "validation_images" / "step_4" / "sheet.png")
    assert sheet.width > 3 * 192, "conditioning, picture, original"
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        tiny_sd,
        controlnet=ControlNetModel.from_pretrained(output / "controlnet"),
        scheduler=DDIMScheduler.from_pretrained(tiny_sd / "scheduler"),
        safety_checker=None,
    )
    names = json.loads((output / "eval_images.json").read_text())["photos"]
    for name in (name.removeprefix("/") for name in names):
        [drawn] = [picture for title, picture in shown.items() if title.startswith(f"photos_{Path(name).stem}_")]
        caption = (photos / name).with_suffix(".txt").read_text("utf-8").strip()
        source = covering(loading.inspect(photos / name).size, SIZE)
        pixels = loading.load(edges / f"{Path(name).stem}.png", source)
        control = Image.fromarray(pixels).crop(crop_box(source, SIZE, "center"))
        asked = {"num_inference_steps": 2, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(42)}
        embeds = {f"{kind}prompt_embeds": embedded(pipeline, text) for kind, text in (("", caption), ("negative_", ""))}
        [picture] = pipeline(image=control, height=64, width=64, **embeds, **asked).images
        assert np.abs(np.asarray(picture).astype(int) - drawn).max() <= 1
        black = Image.new("RGB", SIZE)
        asked["generator"] = torch.Generator().manual_seed(42)
        [other] = pipeline(image=black, height=64, width=64, **embeds, **asked).images
        assert (np.asarray(other) != drawn).any(), "the conditioning image has its part in it"


def embedded(pipeline: StableDiffusionControlNetPipeline, text: str) -> torch.Tensor:
    """As it is cached: in bfloat16."""
    tokens = pipeline.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return pipeline.text_encoder(tokens.input_ids)[0].bfloat16().float()


@pytest.mark.parametrize("flags", [
    {"mixed_precision": "no", "use_ema": True, "gradient_accumulation_steps": 2},
    {"mixed_precision": "bf16", "gradient_checkpointing": True, "caption_dropout_probability": 0.3},
    {"mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adamw8bit"},
], ids=["fp32", "mixed bf16", "pure bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(controlled, tmp_path, flags):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "num_eval_images": 0, **flags}
    assert controlled(output_dir=tmp_path / "whole", **flags) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    shutil.rmtree(tmp_path / "parts" / "controlnet")
    assert controlled(output_dir=tmp_path / "parts", **flags) == 0
    for place in ("checkpoint-4/controlnet", "controlnet"):
        whole, parts = (load_file(tmp_path / run / place / WEIGHTS) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    whole, parts = (checkpoints.load_state(tmp_path / run / "checkpoint-4")["run"] for run in ("whole", "parts"))
    assert torch.equal(whole["generator"], parts["generator"])


def test_a_conditioning_image_that_changed_since_the_checkpoint_is_noticed(controlled, edges, capsys):
    flags = {"num_eval_images": 0}
    assert controlled(**flags, max_train_steps=1) == 0
    Image.effect_noise(Image.open(edges / "0000.png").size, 50).save(edges / "0000.png")
    assert controlled(**flags, max_train_steps=2) != 0
    assert "dataset 'photos'" in capsys.readouterr().err


def test_zero_terminal_snr_is_drawn_without_the_guidance_rescale_that_its_pipeline_lacks(controlled, tmp_path, capfd):
    from examples.demo.make_sd import make

    make(tmp_path / "v", prediction_type="v_prediction")
    flags = {"rescale_betas_zero_snr": True, "max_train_steps": 1}
    assert controlled(pretrained_model_name_or_path=tmp_path / "v", **flags) == 0
    assert "failed" not in "".join(capfd.readouterr()) and len(pictures_of(tmp_path / "output", 1)) == 2


def test_images_without_an_edge_map_are_listed_and_the_check_says_the_same(controlled, edges, tmp_path, capsys):
    (edges / "0001.png").unlink()
    (edges / "0002.png").write_bytes((edges / "0002.png").read_bytes()[:-60])
    assert controlled(check="json") == 0
    checked = json.loads(capsys.readouterr().out)
    assert controlled(max_train_steps=1, num_eval_images=0) == 0
    [listed] = json.loads((tmp_path / "output" / "left_out.json").read_text()).values()
    assert sorted(Path(entry["path"]).stem for entry in listed) == ["0001", "0002"]
    found = [finding for finding in checked["findings"] if finding["kind"] == "no conditioning image"]
    assert {finding["file"] for finding in found} == {entry["path"] for entry in listed}
    assert checked["datasets"][0]["left_out"] == 2
    said = capsys.readouterr().out
    assert "there is none of its name" in said


def test_a_dry_run_tells_what_it_takes(controlled, capsys):
    assert controlled(dry_run=True, max_train_steps=2) == 0
    said = capsys.readouterr().out
    assert "pixels of 14 conditioning images of 'photos'" in said and "Memory needed" in said


def test_two_processes_train_what_one_does(tmp_path, controlled, tiny_sd):
    """By the same global batches; `controlled` has written the dataloader JSON."""
    runs, flags = [], {"mixed_precision": "no", "report_to": "none", "num_eval_images": 0, "adam_epsilon": 1e-5}
    for count in (1, 2):
        values = FLAGS | flags | {
            "pretrained_model_name_or_path": tiny_sd, "data_backend_config": tmp_path / "controlled.json",
            "train_batch_size": 4 // count, "max_train_steps": 3, "output_dir": tmp_path / f"by-{count}",
            "cache_dir": tmp_path / f"cache-{count}",
        }
        words = [f"--{name}={value}" for name, value in values.items() if value is not None]
        folder = str(tmp_path / f"run-{count}")
        runs.append({"folder": folder, "count": count, "flags": words, "spoil": None, "asked": {}})
    command = [sys.executable, "-m", "tests.several", json.dumps(runs)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (load_file(tmp_path / f"by-{count}" / "controlnet" / WEIGHTS) for count in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
    assert one["controlnet_down_blocks.0.weight"].abs().max() > 1e-3, "and that is more than nothing"


def test_a_run_does_not_become_a_full_training_on_its_way(controlled, dataloader, capsys):
    assert controlled(max_train_steps=1, num_eval_images=0) == 0
    assert controlled(max_train_steps=2, num_eval_images=0, controlnet=False, data_backend_config=dataloader) != 0
    assert "--controlnet" in capsys.readouterr().err
