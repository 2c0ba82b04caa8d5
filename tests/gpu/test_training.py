"""Training on a GPU. The other tests run on the CPU everywhere, since only there the same run gives the same bits.

    FLOYDTUNER_TEST_GPU=1 ./tests/run.sh tests/gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.config.paths import ROOT
from helpers.models.text import T5
from helpers.training import checkpoints, loop
from helpers.validation.prompts import PromptPictures
from tests.test_trainer import ADAPTER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, or FLOYDTUNER_TEST_GPU is not set")

PURE = {"mixed_precision": "bf16", "pure_bf16": True}
KINDS = {
    "lora": {},
    "lora, mixed bf16": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "lora, pure bf16": {**PURE, "use_ema": True, "lora_dropout": 0.1},
    "dora": {**PURE, "use_dora": True},
    "full": {**PURE, "model_type": "deepfloyd-full", "lora_rank": None, "gradient_checkpointing": True},
    "biases": {"model_type": "deepfloyd-full", "lora_rank": None, "use_bitfit": True, "mixed_precision": "bf16"},
}
OPTIMIZERS = ("adamw", "adamw_bf16", "adamw8bit", "ao_adamw8bit", "adafactor", "lion", "prodigy")


@pytest.fixture
def losses(monkeypatch) -> list[float]:
    """The loss of each step."""
    seen, end_step = [], loop.Progress.end_step

    def remember(progress: loop.Progress, rate: float, losses: torch.Tensor, passes: object) -> None:
        assert losses.is_cuda
        seen.append(losses.mean().item())
        end_step(progress, rate, losses, passes)

    monkeypatch.setattr(loop.Progress, "end_step", remember)
    return seen


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_every_kind_trains_draws_saves_and_goes_on(trainer, tmp_path, losses, flags):
    flags = {"validation_prompt": "a cat", "validation_resolution": 64, "checkpointing_steps": 2, **flags}
    assert trainer(**flags) == 0 and trainer(**flags, max_train_steps=4) == 0
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    assert [path.name for path in checkpoints.found(tmp_path / "output")] == ["checkpoint-2", "checkpoint-4"]
    assert len(list((tmp_path / "output" / "validation_images").glob("step_*/sheet.png"))) == 3


@pytest.mark.parametrize("training", ["lora", "full"])
def test_stage_2_trains(trainer, losses, tiny_stage2, training):
    flags = {"model_type": f"deepfloyd-stage2{'-lora' if training == 'lora' else ''}", "resolution": 64, **PURE}
    flags |= {"pretrained_model_name_or_path": tiny_stage2, "lora_rank": 4 if training == "lora" else None}
    assert trainer(**flags, max_train_steps=3) == 0
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("precision", ["no", "pure bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_moves_what_is_trained(trainer, tmp_path, losses, optimizer, precision):
    if optimizer == "ao_adamw8bit":
        pytest.importorskip("torchao")
    if precision != "no" and optimizer in ("adamw", "prodigy"):
        pytest.skip("refused")
    flags = {"optimizer": optimizer, "checkpointing_steps": 1, "lr_scheduler": "constant"}
    flags["learning_rate"] = 1 if optimizer == "prodigy" else 1e-3
    assert trainer(**flags, **(PURE if precision != "no" else {}), max_train_steps=3) == 0
    first, *_, last = [load_file(folder / ADAPTER) for folder in checkpoints.found(tmp_path / "output")]
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert len(moved) > len(first) / 3 and all(tensor.isfinite().all() for tensor in last.values())


def test_a_resumed_run_equals_an_uninterrupted_one_but_for_the_gpus_own_rounding(trainer, tmp_path):
    flags = {"lora_dropout": 0.3, "lr_scheduler": "constant", "learning_rate": 1e-3, "checkpointing_steps": 2}
    assert trainer(**flags, max_train_steps=4, output_dir=tmp_path / "whole") == 0
    assert trainer(**flags) == 0 and trainer(**flags, max_train_steps=4) == 0
    whole, resumed, before = (
        load_file(folder / ADAPTER)
        for folder in (tmp_path / "whole", tmp_path / "output", tmp_path / "output" / "checkpoint-2")
    )
    distance = sum((whole[name] - resumed[name]).square().sum() for name in whole).sqrt()
    moved = sum((whole[name] - before[name]).square().sum() for name in whole).sqrt()
    assert distance < 0.05 * moved, "dropout or noise of its own would change most of the way"


def test_text_is_encoded_as_on_a_cpu(tiny_model):
    texts = ["a red circle", "", "a photo of a heart"]
    on_cpu, on_gpu = (T5().load(tiny_model, torch.device(kind))(texts).float().cpu() for kind in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0.05, atol=0.05)


def test_a_validation_that_runs_out_of_memory_gives_it_back_and_training_goes_on(trainer, monkeypatch, capfd, losses):
    left = []

    def take_too_much(*_: object) -> None:
        left.append(torch.cuda.memory_allocated())
        held = [torch.empty(1 << 30, device="cuda")]
        while True:
            held.append(torch.empty_like(held[0]))

    monkeypatch.setattr(PromptPictures, "render", take_too_much)
    flags = {"validation_prompt": "a cat", "validation_resolution": 64, "validation_steps": 1}
    assert trainer(**flags, max_train_steps=4) == 0 and len(losses) == 4
    assert "training goes on: OutOfMemoryError" in capfd.readouterr().out
    assert len(left) == 5 and left[-1] <= left[1] * 1.01, "nothing of it stays behind"


def test_more_processes_than_gpus_are_refused_in_words(tmp_path, tiny_model, dataloader):
    count = torch.cuda.device_count() + 1
    command = [sys.executable, "-m", "helpers.launch", str(count), "train_sd2x.py", "--model_type=deepfloyd-lora"]
    command += [f"--pretrained_model_name_or_path={tiny_model}", f"--data_backend_config={dataloader}"]
    command += [f"--output_dir={tmp_path / 'output'}", f"--cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and f"found {count}, but this machine has" in done.stderr
    assert not Path(tmp_path / "output").exists()
