import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from helpers.config.load import as_json, load
from helpers.data.sampler import Dealt
from helpers.models.families import SPECS
from helpers.training import assembly
from helpers.training.assembly import IDENTITY, Since, ending, precision_of, since, with_usable_attention
from tests.models.test_gradient_checkpointing import kept_for_backward


def options(**values: object):
    values = {"model_type": "deepfloyd-lora", **values}
    return load([f"--{name}={value}" for name, value in values.items()]).config


@pytest.mark.parametrize(
    "values, frozen, trained, autocast",
    [
        ({"mixed_precision": "no"}, torch.float32, torch.float32, "no"),
        ({"mixed_precision": "bf16"}, torch.bfloat16, torch.float32, "bf16"),
        ({"mixed_precision": "bf16", "pure_bf16": True}, torch.bfloat16, torch.bfloat16, "no"),
        ({"model_type": "lora", "mixed_precision": "fp16"}, torch.float16, torch.float32, "fp16"),
    ],
)
def test_precision_says_what_is_kept_in_which_dtype(values, frozen, trained, autocast):
    precision = precision_of(options(**values).training)
    assert (precision.frozen, precision.trained, precision.autocast) == (frozen, trained, autocast)


@pytest.mark.parametrize(
    "values, steps, by",
    [
        ({"max_train_steps": 100}, 100, ["max_train_steps"]),
        ({"num_train_epochs": 3}, 21, ["num_train_epochs"]),
        ({"max_train_steps": 100, "num_train_epochs": 3}, 21, ["num_train_epochs"]),
        ({"max_train_steps": 10, "num_train_epochs": 3}, 10, ["max_train_steps"]),
        ({"max_train_steps": 21, "num_train_epochs": 3}, 21, ["max_train_steps", "num_train_epochs"]),
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 4}, 6, ["num_train_epochs"]),
    ],
)
def test_a_run_ends_by_steps_or_epochs_whichever_comes_first(values, steps, by):
    assert ending(options(**values).training, lambda epoch: 7) == (steps, tuple(by))


@pytest.mark.parametrize("ops, reason", [
    (None, "ModuleNotFoundError: "),
    ("def memory_efficient_attention(q, k, v):\n    raise RuntimeError('no kernel image is available\\nfor you')",
     "RuntimeError: no kernel image is available)"),
], ids=["not installed", "built for another GPU"])
def test_xformers_that_does_not_work_is_said_in_a_line_and_sdpa_used(tmp_path, monkeypatch, capsys, ops, reason):
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    if ops:
        (tmp_path / "xformers").mkdir()
        (tmp_path / "xformers" / "__init__.py").touch()
        (tmp_path / "xformers" / "ops.py").write_text(ops)
        monkeypatch.syspath_prepend(tmp_path)
        del sys.modules["xformers"], sys.modules["xformers.ops"]
    asked = options(attention_mechanism="xformers")
    assert with_usable_attention(asked).training.attention_mechanism == "sdpa"
    [line] = capsys.readouterr().out.splitlines()
    for name in ("--attention_mechanism", "USE_XFORMERS", f"({reason}", "SDPA"):
        assert name in line


@pytest.mark.parametrize("precision, reason", [("bf16", "RuntimeError: no bf16"), ("fp16", "needs an NVIDIA GPU")])
def test_xformers_needs_only_the_dtypes_that_are_computed_in(tmp_path, monkeypatch, capsys, precision, reason):
    body = "    if 'bfloat' in str(q.dtype):\n        raise RuntimeError('no bf16')\n    return q + k + v\n"
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").touch()
    (tmp_path / "xformers" / "ops.py").write_text(f"def memory_efficient_attention(q, k, v):\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with_usable_attention(options(model_type="lora", mixed_precision=precision, attention_mechanism="xformers"))
    assert reason in capsys.readouterr().out


def test_without_a_wish_for_xformers_nothing_is_said(capsys):
    assert with_usable_attention(options()) == options()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("flag, same", [("--revision=v2", False), ("--variant=fp16", False), ("--dry_run", True),
                                       ("--base_model_precision=int8", False)])
def test_a_checkpoint_belongs_to_the_weights_that_it_began_with(flag, same):
    plain, other = (as_json(load(["--model_type=deepfloyd-lora", *words]))["options"] for words in ([], [flag]))
    assert all(plain[name] == other[name] for name in IDENTITY) == same


def saved(batch_size: int, accumulation: int, step: int, position: tuple[int, int], since: Since = Since()) -> dict:
    was = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return {"options": was, "processes": 1, "since": since.state(), "run": {"step": step, "position": position}}


def test_a_run_that_keeps_its_batches_keeps_its_count_of_them():
    before = Since(30, 2, 1, (Dealt(4, 7),))
    same = options(train_batch_size=3, gradient_accumulation_steps=2).training
    assert since(saved(3, 2, 50, (4, 1)), same) == Since()
    assert since(saved(3, 2, 50, (4, 1), before), same) == before


def test_another_batch_size_deals_what_is_left_of_the_epoch():
    training = options(train_batch_size=5).training
    assert since(saved(3, 1, 50, (4, 1)), training) == Since(50, 4, 0, (Dealt(3, 1),))
    assert since(saved(3, 1, 50, (4, 0)), training) == Since(50, 4, 0)
    again = since(saved(3, 1, 50, (4, 6), Since(44, 4, 0, (Dealt(2, 9),))), training)
    assert again == Since(50, 4, 0, (Dealt(2, 9), Dealt(3, 6)))
    assert since(saved(3, 1, 50, (5, 6), Since(44, 4, 0, (Dealt(2, 9),))), training) == Since(50, 5, 0, (Dealt(3, 6),))


def test_another_accumulation_goes_on_at_the_same_batch():
    before = Since(44, 4, 0, (Dealt(2, 9),))
    training = options(train_batch_size=3, gradient_accumulation_steps=4).training
    assert since(saved(3, 1, 50, (4, 6), before), training) == Since(50, 4, 6, before.dealt)


@pytest.mark.parametrize("begun, accumulation, steps", [
    (Since(), 1, 30),
    (Since(10, 1, 0), 1, 30),  # one of three epochs of 10 is done
    (Since(10, 1, 0), 2, 20),
    (Since(14, 1, 4), 4, 18),  # 16 batches are left
    (Since(14, 1, 0, (Dealt(8, 4),)), 1, 14 + 6 + 10),  # 6 batches are left of the second epoch
    (Since(70, 6, 0), 1, 70),
])
def test_as_many_epochs_as_asked_for_whatever_the_batches_were_before(begun, accumulation, steps):
    training = options(num_train_epochs=3, gradient_accumulation_steps=accumulation).training
    batches = {begun.epoch: 6} if begun.dealt else {}
    assert ending(training, lambda epoch: batches.get(epoch, 10), begun) == (steps, ("num_train_epochs",))


def test_gradient_checkpointing_is_for_a_controlnet_too(tiny_sd):
    spec, kept = SPECS["sd"].with_controlnet, []
    for checkpointing in (False, True):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        flags = ["--model_type=full", "--controlnet", "--mixed_precision=no", "--report_to=none"]
        config = load([*flags, f"--gradient_checkpointing={checkpointing}"]).config
        accelerator = assembly.create_accelerator(config)
        run = assembly.create_run(config, spec, tiny_sd, assembly.adapter_of(config), accelerator, 1)
        text = torch.zeros(1, 77, run.parts.unet.config.cross_attention_dim)
        inputs = torch.zeros(1, 4, 16, 16), torch.tensor([5]), text, torch.zeros(1, 3, 128, 128)
        kept.append(kept_for_backward(run.parts.denoiser.controlnet.train(), *inputs))
    assert kept[1] < 0.4 * kept[0]
