import sys

import pytest
import torch

from helpers.config.load import as_json, load
from helpers.training.assembly import ending, identity_of, precision_of, with_usable_attention


def options(**values: object):
    return load(["--model_type=deepfloyd-lora", *(f"--{name}={value}" for name, value in values.items())]).config


@pytest.mark.parametrize(
    "values, frozen, trained, autocast",
    [
        ({"mixed_precision": "no"}, torch.float32, torch.float32, "no"),
        ({"mixed_precision": "bf16"}, torch.bfloat16, torch.float32, "bf16"),
        ({"mixed_precision": "bf16", "pure_bf16": True}, torch.bfloat16, torch.bfloat16, "no"),
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
    assert ending(options(**values).training, batches_in_epoch=7) == (steps, tuple(by))


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


def test_without_a_wish_for_xformers_nothing_is_said(capsys):
    assert with_usable_attention(options()) == options()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("flag, same", [("--revision=v2", False), ("--variant=fp16", False), ("--dry_run", True)])
def test_a_checkpoint_belongs_to_the_weights_that_it_began_with(flag, same):
    plain, other = (
        identity_of(as_json(load(["--model_type=deepfloyd-lora", *words]))["options"]) for words in ([], [flag])
    )
    assert (plain == other) == same
