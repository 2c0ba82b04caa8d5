"""Whole runs on the tiny cascade: what comes out, what is the same after a restart, what is refused."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from helpers.models import loading
from helpers.models.bitfit import BIASES_FILE
from helpers.models.facts import read_adapter_facts
from helpers.models.text import T5Encoder
from helpers.trainer import COMMAND_MARK
from helpers.training import checkpoints
from helpers.training.loop import Run
from helpers.validation.prompts import PromptPictures
from helpers.validation.render import Sampling

ROOT = Path(__file__).parent.parent
ADAPTER = "pytorch_lora_weights.safetensors"


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
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_grad_norm": 0},
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
        pictures.append((tmp_path / folder / name).read_bytes())
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


def test_full_tuning_resumes_bit_for_bit(trainer, tmp_path):
    common = {"model_type": "deepfloyd-full", "lora_rank": None, "checkpointing_steps": 2, "learning_rate": 1e-3}
    common |= {"mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adamw8bit", "use_ema": True}
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
    assert not (tmp_path / "output").exists()


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


def test_an_error_in_validation_is_reported_and_training_goes_on(trainer, tmp_path, monkeypatch, capfd):
    def fail(*_: object) -> None:
        raise RuntimeError("no pictures today")

    monkeypatch.setattr(PromptPictures, "render", fail)
    assert trainer(validation_prompt="a cat", validation_steps=1) == 0
    text = "".join(capfd.readouterr())
    assert "no pictures today" in text and "training goes on" in text
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
        pictures.append((tmp_path / str(number) / "validation_images" / "step_0" / "a_cat_64x64.png").read_bytes())
    assert len(set(pictures)) == 3


def test_the_text_encoder_is_freed_before_the_unet_is_loaded(trainer, monkeypatch):
    encoders, load = [], loading.load

    def remember(self: T5Encoder, *arguments: object) -> None:
        original(self, *arguments)
        encoders.append(weakref.ref(self.model))

    def check(*arguments: object) -> object:
        assert encoders and all(encoder() is None for encoder in encoders)
        return load(*arguments)

    original = T5Encoder.__init__
    monkeypatch.setattr(T5Encoder, "__init__", remember)
    monkeypatch.setattr(loading, "load", check)
    assert trainer() == 0
    assert len(encoders) == 1


def test_a_loss_that_is_not_finite_ends_the_run_with_its_own_code_and_saves_nothing(trainer, tmp_path, capfd):
    # A decay that throws the weights out of float32's range.
    flags = {"model_type": "deepfloyd-full", "lora_rank": None, "adam_weight_decay": 1e30, "max_grad_norm": 0}
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


@pytest.mark.parametrize("number, code, resumed", [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)])
def test_an_interrupted_run_saves_says_how_to_go_on_and_has_its_own_exit_code(
    tmp_path, tiny_model, dataloader, number, code, resumed
):
    to_go_on = f" --output_dir={tmp_path / 'output'} --resume_from_checkpoint=latest"
    typed = {COMMAND_MARK: f"./train.sh{to_go_on}"} if resumed else {}
    command = [sys.executable, "train_sd2x.py", "--model_type=deepfloyd-lora", "--max_train_steps=100000"]
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
    [checkpoint] = checkpoints.found(tmp_path / "output")
    text = errors.read_text()
    assert f"Saved at step {checkpoint.name.removeprefix('checkpoint-')}" in text
    assert text.count(to_go_on) == 1


def test_accelerate_launch_is_a_door_too(tmp_path, tiny_model, dataloader):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--quiet", "train_sd2x.py"]
    flags = ["--model_type", "deepfloyd-lora", "--pretrained_model_name_or_path", str(tiny_model), "--lora_rank", "2"]
    flags += ["--data_backend_config", str(dataloader), "--cache_dir", str(tmp_path / "cache"), "--max_train_steps", "1"]
    flags += ["--output_dir", str(tmp_path / "output"), "--mixed_precision", "no"]
    result = subprocess.run([*launch, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "output" / ADAPTER).exists()
