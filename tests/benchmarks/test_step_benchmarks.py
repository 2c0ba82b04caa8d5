"""The benchmarks run, on a CPU and at tiny sizes, and say what they measured on."""

import json

import pytest

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
    gpu_train.main(["--steps=1", f"--output={output}", "--only", "I-M lora b4"])
    result = gpu_train.main(["--steps=1", f"--output={output}", "--only", "II-M full b4 checkpointed"])
    assert json.loads(output.read_text()) == result
    assert result["cases"].keys() == {"I-M lora b4", "II-M full b4 checkpointed"}, "what was measured before is kept"
    for row in result["cases"].values():
        assert 0 < row["estimated_gb"] < row["peak_gb"] < 100 and row["samples_a_second"] > 0
        assert row["batch"] == 4 and row["shrunk"]
    lora, full = result["cases"].values()
    assert lora["trained_parameters"] < lora["parameters"] and full["trained_parameters"] == full["parameters"]


def test_gpu_train_has_the_cases_that_users_ask_about():
    names = [case.name for case in gpu_train.CASES]
    assert len(names) == len(set(names))
    for name in ("I-M lora b4", "I-M full b4", "I-XL lora b4", "II-M lora b4 checkpointed", "I-M lora b64 compiled"):
        assert name in names
    with pytest.raises(SystemExit):
        gpu_train.main(["--only", "I-S*"])
