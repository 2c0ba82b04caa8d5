"""The benchmarks run, on a CPU and at tiny sizes, and say what they measured on."""

import json

import pytest
import torch

from benchmarks import gpu_train, step_overhead


def test_step_overhead_compares_both_loops(tmp_path):
    output = tmp_path / "result.json"
    result = step_overhead.main(["--batch=2", "--steps=2", "--rounds=2", f"--output={output}"])
    assert json.loads(output.read_text()) == result
    assert result["bare_seconds_a_step"] > 0 and result["our_seconds_a_step"] > 0
    assert -0.9 < result["overhead"] < 2
    assert result["machine"].keys() >= {"device", "torch", "commit"}


def test_gpu_train_reports_memory_and_speed_of_each_case(tmp_path):
    output = tmp_path / "result.json"
    options = ["--no-full_size", "--steps=1", f"--output={output}"]
    gpu_train.main([*options, "--only", "I-M lora b4"])
    result = gpu_train.main([*options, "--only", "II-M full b4 checkpointed"])
    assert json.loads(output.read_text()) == result
    assert result["cases"].keys() == {"I-M lora b4", "II-M full b4 checkpointed"}, "what was measured before is kept"
    for row in result["cases"].values():
        assert 0 < row["estimated_gb"] < 1 and row["samples_a_second"] > 0
        told = torch.cuda.is_available()
        assert ("peak_gb" in row) == told, "of a CPU it would be the most that any case before took"
        assert row["batch"] == 4 and row["shrunk"]
    lora, full = result["cases"].values()
    assert lora["trained_parameters"] < lora["parameters"] and full["trained_parameters"] == full["parameters"]


def test_gpu_train_measures_compiled_cases(tmp_path):
    """With the whole UNet as one graph, which torch.compile refuses where it cannot follow; the graph as it is."""
    options = ["--no-full_size", "--steps=1", "--batch=1", "--backend=eager", f"--output={tmp_path / 'result.json'}"]
    result = gpu_train.main([*options, "--only", "I-M lora b4 compiled"])
    assert result["cases"]["I-M lora b4 compiled"]["seconds_a_step"] > 0


def test_gpu_train_goes_on_after_a_case_that_does_not_fit(tmp_path, monkeypatch):
    def does_not_fit(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_train, "random_parts", does_not_fit)
    result = gpu_train.main(["--no-full_size", f"--output={tmp_path / 'result.json'}", "--only", "I-M lora b4"])
    row = result["cases"]["I-M lora b4"]
    assert row["out_of_memory"] and row["estimated_gb"] > 0


def test_gpu_train_has_the_cases_that_users_ask_about():
    names = [case.name for case in gpu_train.CASES]
    assert len(names) == len(set(names))
    for name in ("I-M lora b4", "I-M full b4", "I-XL lora b4", "II-M lora b4 checkpointed", "I-M lora b64 compiled"):
        assert name in names
    with pytest.raises(SystemExit):
        gpu_train.main(["--only", "I-S*"])
