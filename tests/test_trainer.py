"""Whole runs on the tiny cascade: what comes out, what is the same after a restart, what is refused."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.models import loading
from helpers.models.bitfit import BIASES_FILE
from helpers.models.facts import read_adapter_facts
from helpers.models.lora import LoRA
from helpers.models.text import TextEncoder
from helpers.training import checkpoints, loop
from helpers.training.loop import Run
from helpers.training.requests import COMMAND_MARK, STOP_FILE
from helpers.training.step import StepLoss
from helpers.validation.prompts import PromptPictures
from helpers.validation.render import Rendered, Sampling, Validation

ROOT = Path(__file__).parent.parent
ADAPTER = "pytorch_lora_weights.safetensors"
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--quiet"]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def state_of(output: Path, step: int) -> tuple[dict, dict]:
    folder = output / f"checkpoint-{step}"
    return load_file(folder / ADAPTER), checkpoints.load_state(folder)["run"]


def assert_equal(left: object, right: object) -> None:
    """Bit for bit, through nested states."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right):
            assert_equal(*pair)
    else:
        assert left == right


def test_a_lora_comes_out_that_diffusers_loads_completely(trainer, tmp_path, tiny_model):
    assert trainer(learning_rate=1e-2, lora_alpha=8, validation_prompt="a red circle") == 0
    output = tmp_path / "output"
    trained = load_file(output / ADAPTER)
    assert any("add_k_proj" in name for name in trained)
    assert all(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    pipeline = IFPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    pipeline.load_lora_weights(output)
    loaded = {name: p for name, p in pipeline.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(trained)
    config = next(iter(pipeline.unet.peft_config.values()))
    assert (config.r, config.lora_alpha) == (4, 8)
    assert json.loads((output / "run.json").read_text())["options"]["lora_alpha"] == 8


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_dropout": 0.3, "gradient_accumulation_steps": 2, "lora_targets": "attention+conv", "use_ema": True},
        {"mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adamw_bf16", "lr_warmup_steps": 1},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_grad_norm": 0, "text_embeds_storage": "int8"},
    ],
    ids=["fp32", "pure bf16", "mixed bf16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trainer, tmp_path, flags):
    common = {"learning_rate": 1e-3, "checkpointing_steps": 5, "caption_dropout_probability": 0.3, **flags}
    # 14 images in batches of 2: ten steps go over the end of an epoch.
    assert trainer(output_dir=tmp_path / "whole", max_train_steps=10, **common) == 0
    assert trainer(output_dir=tmp_path / "parts", max_train_steps=10, **common) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoint-10")
    assert trainer(output_dir=tmp_path / "parts", max_train_steps=10, **common) == 0
    assert_equal(state_of(tmp_path / "whole", 10), state_of(tmp_path / "parts", 10))
    assert_equal(load_file(tmp_path / "whole" / ADAPTER), load_file(tmp_path / "parts" / ADAPTER))


def test_validation_does_not_touch_the_training(trainer, tmp_path):
    assert trainer(output_dir=tmp_path / "with", validation_steps=1, validation_prompt="a cat", lora_dropout=0.2) == 0
    assert trainer(output_dir=tmp_path / "without", validation_prompt=None, lora_dropout=0.2) == 0
    assert_equal(state_of(tmp_path / "with", 2), state_of(tmp_path / "without", 2))


def test_validation_gives_each_prompt_at_each_size_its_own_file_at_start_middle_and_end(trainer, tmp_path):
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"Dog!": "a photo of a dog"}))
    sizes = "64,96,64x96,96x64"
    flags = {"validation_prompt": "a red circle", "validation_prompt_library": library, "max_train_steps": 2}
    assert trainer(**flags, validation_resolution=sizes, validation_steps=1) == 0
    images = tmp_path / "output" / "validation_images"
    expected = {f"{name}_{size}" for name in ("a_red_circle", "dog") for size in ("64x64", "96x96", "64x96", "96x64")}
    for step in (0, 1, 2):
        found = {path.stem: Image.open(path).size for path in (images / f"step_{step}").glob("*_*.png")}
        assert found.keys() == expected
        assert all(name.endswith(f"_{width}x{height}") for name, (width, height) in found.items())
        assert (images / f"step_{step}" / "sheet.png").exists()
    assert (images / "before_and_after.png").exists()


def test_validation_is_the_same_picture_for_the_same_weights_and_another_for_another_seed(trainer, tmp_path):
    name = "validation_images/step_0/a_cat_64x64.png"
    pictures = []
    for folder, seed in (("one", 1), ("two", 1), ("three", 2)):
        trainer(output_dir=tmp_path / folder, validation_prompt="a cat", validation_seed=seed, max_train_steps=1)
        pictures.append(Image.open(tmp_path / folder / name).tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_full_tuning_writes_a_pipeline_that_diffusers_loads(trainer, tmp_path, tiny_model):
    assert trainer(model_type="deepfloyd-full", learning_rate=1e-3, lora_rank=None) == 0
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "output" / "pipeline")
    base = DiffusionPipeline.from_pretrained(tiny_model)
    assert type(tuned) is IFPipeline
    assert tuned.scheduler.config.variance_type == "learned_range"
    moved = [not torch.equal(a, b) for a, b in zip(tuned.unet.parameters(), base.unet.parameters())]
    assert sum(moved) > 0.95 * len(moved)
    assert_equal(tuned.text_encoder.state_dict(), base.text_encoder.state_dict())
    assert tuned.tokenizer("a red circle").input_ids == base.tokenizer("a red circle").input_ids


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("base_variance, trained", [("learned_range", False), ("fixed_small", True)])
def test_the_variance_is_validated_exported_and_told_as_it_is_trained(
    trainer, tmp_path, tiny_model, monkeypatch, capsys, kind, base_variance, trained
):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    scheduler = base / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "variance_type": base_variance}))
    sampled, pipeline = set(), Sampling.pipeline

    def remember(self: Sampling, run: Run) -> DiffusionPipeline:
        made = pipeline(self, run)
        sampled.add(made.scheduler.config.variance_type)
        return made

    monkeypatch.setattr(Sampling, "pipeline", remember)
    flags = {"model_type": "deepfloyd-full", "lora_rank": None} if kind == "full" else {}
    flags |= {"adam_weight_decay": 0, "learning_rate": 1e-3, "validation_prompt": "a cat", "max_train_steps": 1}
    assert trainer(**flags, pretrained_model_name_or_path=base, train_variance=trained) == 0
    variance = "learned_range" if trained else "fixed_small"
    assert sampled == {variance}
    told = f'variance_type="{variance}", not the base\'s {base_variance}' in capsys.readouterr().out
    assert told == (kind == "lora" and variance != base_variance)
    if kind == "lora":
        assert read_adapter_facts(tmp_path / "output" / ADAPTER).variance_type == variance
        return
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "output" / "pipeline")
    assert tuned.scheduler.config.variance_type == variance
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
    assert (tuned.unet.conv_out.weight[3:] != before[3:]).any() == trained


@pytest.mark.parametrize(
    "flags",
    [{"optimizer": "adamw8bit"}, {"optimizer_release_gradients": True, "max_grad_norm": 0}],
    ids=["8 bits", "released gradients"],
)
def test_full_tuning_resumes_bit_for_bit(trainer, tmp_path, flags):
    common = {"model_type": "deepfloyd-full", "lora_rank": None, "checkpointing_steps": 2, "learning_rate": 1e-3}
    common |= {"mixed_precision": "bf16", "pure_bf16": True, "use_ema": True, **flags}
    assert trainer(output_dir=tmp_path / "whole", max_train_steps=4, **common) == 0
    assert trainer(output_dir=tmp_path / "parts", max_train_steps=4, **common) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    assert trainer(output_dir=tmp_path / "parts", max_train_steps=4, **common) == 0
    for weights in ("checkpoint-4/unet", "pipeline/unet"):
        weights += "/diffusion_pytorch_model.safetensors"
        assert_equal(load_file(tmp_path / "whole" / weights), load_file(tmp_path / "parts" / weights))
    states = [checkpoints.load_state(tmp_path / folder / "checkpoint-4")["run"] for folder in ("whole", "parts")]
    assert_equal(*states)


def test_averaged_weights_are_validated_and_exported_and_a_checkpoint_has_both(trainer, tmp_path, monkeypatch, capsys):
    seen = {}

    def remember(self: PromptPictures, run: Run, folder: Path) -> None:
        seen[run.step] = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(run.parts.unet).items()}
        raise RuntimeError("no pictures needed")

    monkeypatch.setattr(PromptPictures, "render", remember)
    assert trainer(use_ema=True, learning_rate=1e-2, max_train_steps=4, validation_prompt="a cat") == 0
    assert "of averaged weights" in capsys.readouterr().out
    exported = load_file(tmp_path / "output" / ADAPTER)
    own, state = state_of(tmp_path / "output", 4)
    assert_equal(exported, {f"unet.{name}": tensor for name, tensor in seen[4].items()})
    assert any((exported[name] != own[name]).any() for name in own)
    averages = {tensor.numpy().tobytes() for tensor in state["ema"]["weights"]}
    assert averages == {tensor.numpy().tobytes() for tensor in exported.values()}


@pytest.mark.parametrize(
    "flags, weights",
    [
        ({"use_dora": True}, ADAPTER),
        ({"model_type": "deepfloyd-full", "lora_rank": None, "use_bitfit": True}, BIASES_FILE),
        ({"model_type": "deepfloyd-full", "lora_rank": None}, "unet/diffusion_pytorch_model.safetensors"),
    ],
    ids=["DoRA", "BitFit", "full"],
)
def test_the_average_is_exported_of_whatever_is_trained(trainer, tmp_path, flags, weights):
    output = tmp_path / "output"
    assert trainer(use_ema=True, learning_rate=1e-2, max_train_steps=3, **flags) == 0
    exported = load_file(output / "pipeline" / weights if weights.startswith("unet") else output / weights)
    own = load_file(output / "checkpoint-3" / weights)
    averages = checkpoints.load_state(tmp_path / "output" / "checkpoint-3")["run"]["ema"]["weights"]
    assert {tensor.numpy().tobytes() for tensor in averages} == {
        tensor.numpy().tobytes() for tensor in exported.values()
    }
    assert any(not torch.equal(exported[name], own[name]) for name in own)
    if weights == BIASES_FILE:
        tuned = load_file(tmp_path / "output" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tuned[name], exported[name]) for name in exported)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_train_epochs": 1, "lr_warmup_steps": 1000}, ["LR_WARMUP_STEPS", "found 1000", "7 steps", "NUM_EPOCHS"]),
        ({"num_train_epochs": 1, "lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 7}, ["needs 14", "are 7"]),
        ({"num_train_epochs": 1, "lr_scheduler": "sine", "lr_warmup_steps": 5}, ["LR_NUM_CYCLES", "there are 2"]),
        ({"num_train_epochs": 1, "lr_warmup_steps": 9, "max_train_steps": 10}, ["found 9", "7 steps", "NUM_EPOCHS"]),
    ],
    ids=["warm-up", "restarts", "sine", "epochs before steps"],
)
def test_a_schedule_that_the_epochs_cut_short_is_refused_before_training(trainer, tmp_path, capsys, flags, words):
    """14 images in batches of 2 are 7 steps, which is known once the images are."""
    assert trainer(**{"max_train_steps": 0, **flags}, dry_run=True) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"max_train_steps": 2}, "raise MAX_NUM_STEPS (--max_train_steps)."),
        ({"max_train_steps": 9, "num_train_epochs": 1, "train_batch_size": 7}, "raise NUM_EPOCHS (--num_"),
    ],
    ids=["steps", "epochs"],
)
def test_a_finished_run_says_which_option_ended_it(trainer, capsys, flags, said):
    assert trainer(**flags) == 0
    assert trainer(**flags) == 0
    assert f"checkpoint-2 is the last of its 2 steps: to train on, {said}" in capsys.readouterr().out


def test_the_second_run_encodes_and_decodes_nothing(trainer, tmp_path, capfd):
    trainer(output_dir=tmp_path / "one")
    first = capfd.readouterr()
    assert "captions to encode" in first.err + first.out and "decoding images" in first.err
    trainer(output_dir=tmp_path / "two")
    second = capfd.readouterr()
    assert "captions to encode" not in second.err + second.out and "decoding images" not in second.err


def test_training_learns(trainer, tmp_path, capfd):
    """On a handful of images the loss at the end is well below the loss at the start."""
    flags = {"model_type": "deepfloyd-full", "lora_rank": None, "learning_rate": 2e-3, "max_train_steps": 60}
    assert trainer(**flags, train_batch_size=8, report_to="tensorboard") == 0
    losses = scalars(tmp_path / "output" / "logs", "train/loss")
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = [path for path in folder.rglob("events.out*") if path.parent.name == "floydtuner"]
    accumulator = EventAccumulator(str(events)).Reload()
    return [scalar.value for scalar in accumulator.Scalars(tag)]


def test_dry_run_plans_and_writes_nothing_but_the_index_of_the_images(trainer, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    assert trainer(dry_run=True) == 0
    files = [path.name for path in set(tmp_path.rglob("*")) - before if path.is_file()]
    assert len(files) == 1 and files[0].startswith("scan-")
    text = capsys.readouterr().out
    assert "14 images used" in text and "7 batches an epoch; 2 steps" in text
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"pretrained_model_name_or_path": "/nowhere/model"}, ["MODEL_NAME", "/nowhere/model"]),
        ({"pretrained_model_name_or_path": "someone/model"}, ["MODEL_NAME", "hf auth login", "export MODEL_NAME="]),
        ({"output_dir": "/proc/output"}, ["OUTPUT_DIR", "/proc/output"]),
        ({"resume_from_checkpoint": "checkpoint-7"}, ["RESUME_CHECKPOINT", "checkpoint-7"]),
        ({"resolution": 60}, ["RESOLUTION", "56 or 64"]),
        ({"validation_resolution": "100"}, ["VALIDATION_RESOLUTION", "96 or 104"]),
        ({"validation_resolution": "1024"}, ["VALIDATION_RESOLUTION", "256"]),
        ({"optimizer": "adamw", "mixed_precision": "bf16", "pure_bf16": True}, ["OPTIMIZER", "adamw_bf16"]),
        ({"report_to": "wandb"}, ["REPORT_TO", "pip install wandb"]),
        ({"validation_guidance_rescale": 0.5}, ["VALIDATION_GUIDANCE_RESCALE", "0.0"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_words_before_anything_is_written(trainer, tmp_path, capsys, flags, words):
    before = set(tmp_path.rglob("*"))
    assert trainer(**flags) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    written = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
    # What a resumed run fits is known only once the images are scanned.
    assert all("resume_from_checkpoint" in flags and path.name.startswith("scan-") for path in written)


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, ["no images"]),
        ({"notes.pdf": b"%PDF"}, ["no images"]),
        ({"a.jpg": b"<html>", "b.png": b""}, ["none of the 2 images", "a.jpg"]),
        ({"a.png": PNG}, ["none of its 1 images has a caption", "caption_strategy", "a.txt", "instanceprompt"]),
        ({"a.png": PNG, "a.txt": b"  \n", "a.caption": b"a cat"}, ["a.txt is empty", ".caption", "rename"]),
    ],
    ids=["empty folder", "no images", "no readable image", "no captions", "captions of another name"],
)
def test_a_dataset_that_cannot_be_used_is_refused_in_words(trainer, tmp_path, capsys, files, words):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    dataloader = tmp_path / "broken.json"
    entry = {"id": "broken", "instance_data_dir": str(folder), "caption_strategy": "textfile"}
    dataloader.write_text(json.dumps([entry]), "utf-8")
    assert trainer(data_backend_config=dataloader) == 2
    message = capsys.readouterr().err
    for word in ["'broken'", *words]:
        assert word in message
    assert not (tmp_path / "output").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_another_runs_checkpoint_is_refused_by_the_options_that_differ(trainer, tmp_path, capsys):
    assert trainer() == 0
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("*"))
    assert trainer(lora_rank=8, max_train_steps=4) == 2
    assert 'key "lora_rank") was 4 and is now 8' in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("*")) == before


def test_base_weights_that_were_changed_in_their_place_are_refused_on_resume(trainer, tmp_path, tiny_model, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    assert trainer(pretrained_model_name_or_path=base) == 0
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert trainer(pretrained_model_name_or_path=base, max_train_steps=4) == 2
    assert "the weights' files there have changed since checkpoint-2" in capsys.readouterr().err


@pytest.fixture
def seen(monkeypatch) -> list[list[str]]:
    """The names of the images of each batch that is trained."""
    batches, loss = [], loop.training_loss

    def remember(parts, unet, batch, generator):
        batches.append([use.record.path.name for use in batch.uses])
        return loss(parts, unet, batch, generator)

    monkeypatch.setattr(loop, "training_loss", remember)
    return batches


def test_what_may_change_on_resume_is_applied_and_told_and_no_image_comes_twice(trainer, tmp_path, capsys, seen):
    output, epoch = tmp_path / "output", {"max_train_steps": 0, "num_train_epochs": 1}
    assert trainer(max_train_steps=2, train_batch_size=3, learning_rate=1e-4) == 0
    changed = {"learning_rate": 5e-5, "adam_weight_decay": 0.5, "train_batch_size": 2, "checkpointing_steps": 1}
    capsys.readouterr()
    assert trainer(**epoch, **changed) == 0
    told = capsys.readouterr().out
    for words in ("learning_rate: 0.0001 -> 5e-05", "train_batch_size: 3 -> 2", "adam_weight_decay: 0.01 -> 0.5"):
        assert f"Changed since checkpoint-2: {words}" in told
    assert [len(batch) for batch in seen] == [3, 3, 2, 2, 2, 2]
    assert len({name for batch in seen for name in batch}) == 14
    state = state_of(output, 6)
    [group] = state[1]["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5

    for step in (5, 6):
        shutil.rmtree(output / f"checkpoint-{step}")
    assert trainer(**epoch, **changed) == 0
    assert_equal(state_of(output, 6), state)
    assert seen[6:] == seen[4:6]


@pytest.mark.parametrize(
    "flags", [{"lora_rank": 64}, {"model_type": "deepfloyd-full", "lora_rank": None, "use_ema": True}],
    ids=["lora", "full"],
)
def test_a_dry_run_tells_the_disk_space_that_the_run_then_takes(trainer, tmp_path, tiny_model, capsys, flags):
    flags |= {"max_train_steps": 1, "checkpoints_total_limit": 1, "mixed_precision": "bf16"}
    assert trainer(**flags, dry_run=True) == 0
    [told] = re.findall(r"Disk space needed.*?in all", capsys.readouterr().out, re.DOTALL)
    kinds = {"checkpoints": "checkpoints of", "result": "result", "caches": r"(?:pixels of 14 im|text embeds of 14 cap)"}
    says = {kind: sum(1e6 * float(size) for size in re.findall(rf"([\d.]+) MB  {words}", told))
            for kind, words in kinds.items()}
    assert trainer(**flags) == 0
    output = tmp_path / "output"
    takes = {
        "checkpoints": 2 * size_of(output / "checkpoint-1"),
        "result": size_of(output / "pipeline") if "model_type" in flags else (output / ADAPTER).stat().st_size,
        "caches": sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors")),
    }
    for kind, taken in takes.items():
        assert says[kind] == pytest.approx(taken, rel=0.2, abs=1e5), kind
    capsys.readouterr()
    assert trainer(**flags, dry_run=True) == 0
    assert not re.search("pixels of|text embeds of", capsys.readouterr().out), "they are there now"


def test_a_run_goes_on_with_embeds_in_8_bits_that_are_made_of_its_exact_ones(trainer, tmp_path, capsys, monkeypatch):
    seen: list[torch.Tensor] = []
    training_loss = loop.training_loss

    def seeing(parts, denoiser, batch, generator):
        seen.append(batch.prompt_embeds.clone())
        return training_loss(parts, denoiser, batch, generator)

    monkeypatch.setattr(loop, "training_loss", seeing)
    flags = {"validation_prompt": "a red circle", "caption_dropout_probability": 0.5, "checkpointing_steps": 2}
    assert trainer(**flags, max_train_steps=4, output_dir=tmp_path / "exact") == 0
    exact = seen.copy()
    assert trainer(**flags, max_train_steps=2) == 0
    capsys.readouterr()

    def encoding(own, texts):
        raise AssertionError("the exact ones are there")

    monkeypatch.setattr(TextEncoder, "__call__", encoding)
    flags |= {"max_train_steps": 4, "text_embeds_storage": "int8"}
    assert trainer(**flags, dry_run=True) == 0
    assert "text embeds of 14 captions" in capsys.readouterr().out
    seen.clear()
    assert trainer(**flags) == 0
    said = capsys.readouterr().out
    assert "captions are stored as int8" in said
    assert "Changed since checkpoint-2: text_embeds_storage: bf16 -> int8" in said
    assert len(seen) == 2
    for found, expected in zip(seen, exact[2:]):
        assert found.dtype == torch.bfloat16 and not torch.equal(found, expected)
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert 0.001 < error < 0.02
    assert trainer(**flags, dry_run=True) == 0
    assert "text embeds of" not in capsys.readouterr().out


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_too_little_room_for_one_checkpoint_is_refused_before_anything_is_made(trainer, small_disk, capsys):
    flags = {"model_type": "deepfloyd-full", "lora_rank": None, "output_dir": small_disk / "output"}
    fill(small_disk, leaving=1_000_000)
    assert trainer(**flags) == 4
    told = capsys.readouterr()
    assert "for one more checkpoint of" in told.err and "are missing" in told.err
    assert "decode" not in told.out and not (small_disk / "output").exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leaving: int) -> Path:
    path = folder / "others"
    path.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - leaving)))
    return path


def test_a_disk_that_fills_up_ends_the_run_with_its_own_code_and_the_run_goes_on(
    trainer, small_disk, monkeypatch, capfd
):
    output = small_disk / "output"
    flags = {"output_dir": output, "max_train_steps": 4, "checkpointing_steps": 1, "lora_rank": 1}

    def fill_then_save(*arguments):
        if arguments[1] == 3:
            fill(small_disk, leaving=20_000)
        return save(*arguments)

    save = checkpoints.save
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", fill_then_save)
        assert trainer(**flags) == 4
    told = capfd.readouterr().err
    assert re.search(r"No space left on device for checkpoint-3 of [\d,]+ bytes in .*: [\d,]+ are missing", told)
    assert f"--output_dir={output} --resume_from_checkpoint=latest" in told and "Traceback" not in told
    assert [path.name for path in checkpoints.found(output)] == ["checkpoint-1", "checkpoint-2"]
    (small_disk / "others").unlink()
    assert trainer(**flags) == 0
    assert "Resumed from checkpoint-2" in capfd.readouterr().out


@pytest.mark.parametrize("what", ["cache", "output"])
def test_a_disk_that_is_full_before_training_is_told_in_words(trainer, small_disk, capfd, what):
    fill(small_disk, leaving=0)
    flags = {"cache_dir": small_disk} if what == "cache" else {"output_dir": small_disk}
    assert trainer(**flags) == 4
    told = capfd.readouterr().err
    assert "No space left on device for " in told and str(small_disk) in told and "Traceback" not in told


def test_pictures_that_find_no_room_do_not_end_the_training(trainer, small_disk, monkeypatch, capfd):
    save, render = checkpoints.save, PromptPictures.render

    def fill_and_render(pictures: PromptPictures, run: Run, folder: Path) -> Rendered:
        if run.step == 2:
            fill(small_disk, leaving=0)
        return render(pictures, run, folder)

    def make_room_and_save(*arguments: object) -> Path:
        (small_disk / "others").unlink()
        return save(*arguments)

    monkeypatch.setattr(PromptPictures, "render", fill_and_render)
    monkeypatch.setattr(checkpoints, "save", make_room_and_save)
    flags = {"validation_prompt": "a cat", "validation_steps": 1, "lora_rank": 1}
    assert trainer(output_dir=small_disk / "output", max_train_steps=3, **flags) == 0
    told = "".join(capfd.readouterr())
    assert re.search("Validation at step 2 failed, training goes on: .*No space left on device for a_cat_64x64", told)
    assert told.count("failed, training goes on") == 1 and "Traceback" not in told
    assert (small_disk / "output" / ADAPTER).exists()


def test_curves_that_find_no_room_do_not_end_the_training(trainer, small_disk, monkeypatch, capfd):
    others, save = fill(small_disk, leaving=250_000), checkpoints.save

    def make_room_and_save(*arguments: object) -> Path:
        others.unlink()
        return save(*arguments)

    monkeypatch.setattr(checkpoints, "save", make_room_and_save)
    flags = {"validation_prompt": "a cat", "validation_steps": 1, "report_to": "tensorboard", "lora_rank": 1}
    assert trainer(output_dir=small_disk / "output", max_train_steps=3, **flags) == 0
    told = "".join(capfd.readouterr())
    assert "No space is left for curves" in told and "Traceback" not in told
    assert (small_disk / "output" / ADAPTER).exists()


def test_a_dataset_of_damaged_images_is_refused_before_the_text_encoder_loads(trainer, tmp_path, photos, capfd):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in photos.glob("*.jpg"):
        (folder / path.name).write_bytes(path.read_bytes()[:2000])
    dataloader = tmp_path / "damaged.json"
    dataloader.write_text(json.dumps([{"id": "damaged", "instance_data_dir": str(folder)}]), "utf-8")
    assert trainer(data_backend_config=dataloader) == 2
    text = "".join(capfd.readouterr())
    assert "'damaged'" in text and "is damaged" in text and "captions to encode" not in text
    left_out = json.loads((tmp_path / "output" / "left_out.json").read_text())["damaged"]
    assert {Path(entry["path"]).name for entry in left_out} == {path.name for path in folder.iterdir()}
    assert all("damaged" in entry["reason"] for entry in left_out) and len(list((tmp_path / "output").iterdir())) == 1


def test_left_out_images_are_listed_and_the_dataset_is_only_read(trainer, tmp_path, photos):
    folder = shutil.copytree(photos, tmp_path / "mixed")
    [first, second, *_] = sorted(folder.glob("*.jpg"))
    first.write_bytes(first.read_bytes()[:2000])
    (folder / "page.jpg").write_bytes(b"<html>")
    second.with_suffix(".txt").unlink()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")}
    dataloader = tmp_path / "mixed.json"
    entry = {"id": "mixed", "instance_data_dir": str(folder), "caption_strategy": "textfile"}
    dataloader.write_text(json.dumps([entry]), "utf-8")
    assert trainer(data_backend_config=dataloader) == 0
    report = json.loads((tmp_path / "output" / "left_out.json").read_text())["mixed"]
    reasons = {Path(item["path"]).name: item["reason"] for item in report}
    assert reasons.keys() == {first.name, second.name, "page.jpg"}
    assert "damaged" in reasons[first.name] and "no caption" in reasons[second.name]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")} == before


def test_a_cache_that_cannot_be_written_is_refused_in_words(trainer, capsys):
    assert trainer(cache_dir="/proc/cache") == 2
    assert "CACHE_DIR" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{}, {"use_ema": True}], ids=["", "average"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("Tried to allocate 9 GiB"), MemoryError("no more"), KeyError("a bug"), OSError(5, "bad disk")],
    ids=lambda error: type(error).__name__,
)
def test_validation_that_fails_is_reported_gives_its_memory_back_and_leaves_training_as_it_was(
    trainer, tmp_path, monkeypatch, capfd, error, flags
):
    made, seen = [], []
    common = {"learning_rate": 1e-2, "lora_dropout": 0.2, "max_train_steps": 3, **flags}

    def fail(self: PromptPictures, run: Run, folder: Path) -> None:
        pictures = torch.rand(100, 100)  # draws a number that training would have got
        made.append(weakref.ref(pictures))
        held = type(error)(*error.args)  # a cycle through the traceback, which only the collector takes apart
        raise held

    def look(self: Validation, run: Run) -> None:
        validate(self, run)
        seen.append((run.denoiser.training, [reference() for reference in made]))

    validate = Validation.__call__
    monkeypatch.setattr(PromptPictures, "render", fail)
    monkeypatch.setattr(Validation, "__call__", look)
    assert trainer(output_dir=tmp_path / "with", validation_prompt="a cat", validation_steps=1, **common) == 0
    text = "".join(capfd.readouterr())
    for step in range(4):
        assert f"Validation at step {step} failed, training goes on: {type(error).__name__}: " in text
    assert str(error) in text
    assert all(mode == (step > 0) for step, (mode, _) in enumerate(seen))
    assert all(reference is None for _, references in seen for reference in references)
    monkeypatch.undo()
    assert trainer(output_dir=tmp_path / "without", validation_prompt=None, **common) == 0
    assert_equal(state_of(tmp_path / "with", 3), state_of(tmp_path / "without", 3))
    assert_equal(load_file(tmp_path / "with" / ADAPTER), load_file(tmp_path / "without" / ADAPTER))


def test_pictures_that_cannot_be_set_side_by_side_do_not_end_a_run_that_is_done(trainer, tmp_path, monkeypatch, capfd):
    def spoil(run: Run, *arguments: object) -> None:
        for picture in (tmp_path / "output" / "validation_images").rglob("a_cat*.png"):
            picture.write_bytes(b"damaged")

    monkeypatch.setattr(loop.Progress, "__exit__", spoil)
    assert trainer(validation_prompt="a cat") == 0
    assert "cannot be set side by side" in "".join(capfd.readouterr())
    assert (tmp_path / "output" / ADAPTER).exists()


def test_validation_images_reach_tensorboard(trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trainer(validation_prompt="a cat", report_to="tensorboard", tracker_run_name="mine") == 0
    folder = tmp_path / "output" / "logs" / "floydtuner" / "mine"
    [events] = [path for path in folder.rglob("events.out*") if path.parent == folder]
    images = EventAccumulator(str(events)).Reload().Images("validation")
    assert [image.step for image in images] == [0, 2]


def test_negative_prompt_and_guidance_change_the_picture(trainer, tmp_path):
    pictures = []
    for number, flags in enumerate([{}, {"validation_negative_prompt": "blurry"}, {"validation_guidance": 2}]):
        trainer(output_dir=tmp_path / str(number), validation_prompt="a cat", max_train_steps=1, **flags)
        picture = tmp_path / str(number) / "validation_images" / "step_0" / "a_cat_64x64.png"
        pictures.append(Image.open(picture).tobytes())
    assert len(set(pictures)) == 3


def test_the_text_encoder_is_freed_before_the_unet_is_loaded(trainer, monkeypatch):
    encoders, load = [], loading.load

    def remember(self: TextEncoder, *arguments: object, **named: object) -> None:
        original(self, *arguments, **named)
        encoders.append(weakref.ref(self.model))

    def check(*arguments: object, **named: object) -> object:
        assert encoders and all(encoder() is None for encoder in encoders)
        return load(*arguments, **named)

    original = TextEncoder.__init__
    monkeypatch.setattr(TextEncoder, "__init__", remember)
    monkeypatch.setattr(loading, "load", check)
    assert trainer() == 0
    assert len(encoders) == 1


def test_a_loss_that_is_not_finite_ends_the_run_with_its_own_code_and_saves_nothing(trainer, tmp_path, capfd):
    # A decay that throws the weights out of float32's range.
    flags = {"model_type": "deepfloyd-full", "lora_rank": None, "adam_weight_decay": 1e18, "max_grad_norm": 0}
    flags |= {"max_train_steps": 50, "lr_scheduler": "constant", "checkpointing_steps": 1, "report_to": "tensorboard"}
    assert trainer(**flags) == 3
    assert "LEARNING_RATE" in capfd.readouterr().err
    assert len(scalars(tmp_path / "output" / "logs", "train/loss")) >= 1, "the curve up to there is written"
    for folder in checkpoints.found(tmp_path / "output"):
        for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
            assert torch.isfinite(tensor).all(), name


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(trainer, tmp_path):
    assert trainer(max_train_steps=3, checkpointing_steps=1) == 0
    assert trainer(max_train_steps=3, resume_from_checkpoint="checkpoint-1", checkpoints_total_limit=1) == 0
    output = tmp_path / "output"
    assert [path.name for path in checkpoints.found(output)] == ["checkpoint-3"]
    assert {path.name for path in (output / "abandoned").iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_a_changed_dataset_is_refused_on_resume_by_its_name(trainer, tmp_path, photos, capsys):
    folder = shutil.copytree(photos, tmp_path / "changing")
    dataloader = tmp_path / "changing.json"
    entry = {"id": "changing", "instance_data_dir": str(folder), "caption_strategy": "textfile"}
    dataloader.write_text(json.dumps([entry]), "utf-8")
    assert trainer(data_backend_config=dataloader) == 0
    next(folder.glob("*.txt")).write_text("another caption", "utf-8")
    assert trainer(data_backend_config=dataloader, max_train_steps=4) == 2
    assert "dataset 'changing' changed" in capsys.readouterr().err


def sending(number: int, function: Callable, at: int) -> Callable:
    """The function, sending this process a signal as it is called for the `at`-th time."""
    calls = itertools.count(1)

    def call(*arguments: object, **named: object) -> object:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    return call


# What is called then, for the how many-th time, the signal, and the step that is saved.
MOMENTS = {
    "caching texts": (TextEncoder, "__call__", 2, signal.SIGTERM, None),
    "loading": (loading, "load", 1, signal.SIGINT, None),
    "first pictures": (PromptPictures, "render", 1, signal.SIGINT, 0),
    "step": (loop, "training_loss", 2, signal.SIGTERM, 2),
    "pictures": (PromptPictures, "render", 2, signal.SIGTERM, 2),
    "save": (LoRA, "save_weights", 1, signal.SIGINT, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_ends_the_run_in_good_order_and_it_goes_on_as_if_there_had_been_none(
    trainer, tmp_path, monkeypatch, capfd, moment
):
    where, name, at, number, step = MOMENTS[moment]
    flags = {"max_train_steps": 3, "checkpointing_steps": 2, "validation_steps": 2, "validation_prompt": "a cat"}
    flags |= {"text_encoder_batch_size": 4, "validation_num_inference_steps": 1, "validation_guidance": 1}
    with monkeypatch.context() as patched:
        patched.setattr(where, name, sending(number, getattr(where, name), at))
        assert trainer(**flags) == 128 + number
    printed, said = capfd.readouterr()
    assert f" --output_dir={tmp_path / 'output'} --resume_from_checkpoint=latest" in said
    assert "Once more ends it at once" in said
    saved = [path.name for path in checkpoints.found(tmp_path / "output")]
    assert saved == ([] if step is None else [f"checkpoint-{step}"])
    encoded = []
    with monkeypatch.context() as patched:
        encode = TextEncoder.__call__
        patched.setattr(TextEncoder, "__call__", lambda self, texts: (encoded.extend(texts), encode(self, texts))[1])
        assert trainer(**flags) == 0
    captions = int(re.search(r"(\d+) captions to encode", printed)[1])
    assert len(encoded) == (captions - 4 if moment == "caching texts" else 0), "what was encoded before it stays"
    assert trainer(**flags, output_dir=tmp_path / "whole") == 0
    assert_equal(state_of(tmp_path / "whole", 3), state_of(tmp_path / "output", 3))
    pictures = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png")]
    pixels = [[Image.open(tmp_path / run / name).tobytes() for name in pictures] for run in ("whole", "output")]
    assert pictures and pixels[0] == pixels[1]


def test_a_signal_during_the_export_does_not_break_it_off(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(LoRA, "export", sending(signal.SIGTERM, LoRA.export, 1))
    assert trainer() == 0
    assert (tmp_path / "output" / ADAPTER).exists()


def test_a_file_named_stop_does_as_a_signal_and_is_gone_when_the_run_goes_on(trainer, tmp_path, monkeypatch, capfd):
    stop = tmp_path / "output" / STOP_FILE
    with monkeypatch.context() as patched:
        loss = loop.training_loss
        patched.setattr(loop, "training_loss", lambda *arguments: (stop.touch(), loss(*arguments))[1])
        assert trainer(max_train_steps=3) == 143
    assert "Saved at step 1" in capfd.readouterr().err and not stop.exists()
    assert [path.name for path in checkpoints.found(tmp_path / "output")] == ["checkpoint-1"]
    assert trainer(max_train_steps=3) == 0


def test_sigusr1_saves_and_goes_on(trainer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loop, "training_loss", sending(signal.SIGUSR1, loop.training_loss, 2))
    assert trainer(max_train_steps=3, checkpointing_steps=0) == 0
    assert [path.name for path in checkpoints.found(tmp_path / "output")] == ["checkpoint-2", "checkpoint-3"]
    assert "Saved at step 2, as SIGUSR1 asked" in capfd.readouterr().err


def test_an_embedding_that_is_not_finite_ends_the_run_in_words_before_training(trainer, tmp_path, monkeypatch, capfd):
    encode = TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, texts: encode(self, texts) * torch.inf)
    assert trainer() == 2
    said = capfd.readouterr().err
    assert "the text encoder returned inf or NaN for the caption '" in said and "Traceback" not in said


def test_while_steps_are_skipped_no_older_checkpoint_is_deleted(trainer, tmp_path, monkeypatch):
    calls, loss = itertools.count(1), loop.training_loss

    def spoil(*arguments: object) -> StepLoss:
        made = loss(*arguments)
        return made._replace(loss=made.loss * torch.nan) if next(calls) > 2 else made

    monkeypatch.setattr(loop, "training_loss", spoil)
    flags = {"max_train_steps": 9, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_nonfinite_steps": 3}
    assert trainer(**flags) == 3
    assert [path.name for path in checkpoints.found(tmp_path / "output")] == [f"checkpoint-{n}" for n in (2, 3, 4, 5)]


@pytest.mark.parametrize(
    "number, code, resumed, launcher",
    [(signal.SIGINT, 130, False, []), (signal.SIGTERM, 143, True, []), (signal.SIGTERM, -15, False, ACCELERATE)],
    ids=["SIGINT", "SIGTERM, resumed before", "accelerate launch"],
)
def test_an_interrupted_run_saves_says_how_to_go_on_and_has_its_own_exit_code(
    tmp_path, tiny_model, dataloader, number, code, resumed, launcher
):
    to_go_on = f" --output_dir={tmp_path / 'output'} --resume_from_checkpoint=latest"
    typed = {COMMAND_MARK: f"./train.sh{to_go_on}"} if resumed else {}
    command = [sys.executable, *launcher, "train_sd2x.py", "--model_type=deepfloyd-lora", "--max_train_steps=100000"]
    command += [f"--pretrained_model_name_or_path={tiny_model}", f"--data_backend_config={dataloader}"]
    command += [f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'output'}", "--report_to=none"]
    errors = tmp_path / "errors"
    with errors.open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=sink, env=os.environ | typed)
        while "loss" not in errors.read_text(errors="replace"):
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(60) == code
        # `accelerate launch` does not wait for the process that it started, which sees that it is gone.
        deadline = time.monotonic() + 60
        while "Saved at step" not in errors.read_text(errors="replace") and time.monotonic() < deadline:
            time.sleep(0.2)
    [checkpoint] = checkpoints.found(tmp_path / "output")
    text = errors.read_text()
    assert f"Saved at step {checkpoint.name.removeprefix('checkpoint-')}" in text
    assert text.count(to_go_on) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_whose_listener_goes_is_saved_all_the_same(tmp_path, tiny_model, dataloader, number):
    """Ctrl-C ends all of `./train.sh | tee log`; a connection that is lost takes its terminal with it."""
    command = [sys.executable, "train_sd2x.py", "--model_type=deepfloyd-lora", "--max_train_steps=100000"]
    command += [f"--pretrained_model_name_or_path={tiny_model}", f"--data_backend_config={dataloader}"]
    command += [f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'output'}", "--report_to=none"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    try:
        said = b""
        while b"loss" not in said:
            said += process.stdout.read(4096)
            assert process.poll() is None
        process.stdout.close()
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    assert checkpoints.found(tmp_path / "output")


def test_a_second_run_in_the_same_folder_is_refused_before_it_changes_anything(trainer, tmp_path, monkeypatch, capfd):
    save, codes = checkpoints.save, []

    def meet(*arguments: object) -> Path:
        folder = save(*arguments)
        before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "output").rglob("*"))
        codes.append(trainer(learning_rate=1e-5))
        assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "output").rglob("*")) == before
        return folder

    monkeypatch.setattr(checkpoints, "save", meet)
    assert trainer() == 0 and codes == [2]
    assert "another run is at work in" in capfd.readouterr().err


def test_accelerate_launch_is_a_door_too(tmp_path, tiny_model, dataloader):
    launch = [sys.executable, *ACCELERATE, "train_sd2x.py"]
    flags = ["--model_type", "deepfloyd-lora", "--pretrained_model_name_or_path", str(tiny_model), "--lora_rank", "2"]
    flags += ["--data_backend_config", str(dataloader), "--cache_dir", str(tmp_path / "cache"), "--max_train_steps", "1"]
    flags += ["--output_dir", str(tmp_path / "output"), "--mixed_precision", "no"]
    result = subprocess.run([*launch, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "output" / ADAPTER).exists()
