"""The benchmarks run, on a CPU and at tiny sizes, and say what they measured on."""

import json

from benchmarks import gpu_train, step_overhead


def test_step_overhead_compares_both_loops(tmp_path):
    output = tmp_path / "result.json"
    result = step_overhead.main(["--batch=2", "--steps=2", "--rounds=2", f"--output={output}"])
    assert json.loads(output.read_text()) == result
    assert result["bare_seconds_a_step"] > 0 and result["our_seconds_a_step"] > 0
    assert -0.9 < result["overhead"] < 2
    assert result["machine"].keys() >= {"device", "torch", "commit"}


def test_gpu_train_reports_memory_and_speed(tmp_path):
    output = tmp_path / "result.json"
    result = gpu_train.main(["--steps=2", f"--output={output}"])
    assert json.loads(output.read_text()) == result
    assert 0 < result["peak_gb"] < 100 and result["samples_a_second"] > 0
    assert 0 < result["trained_parameters"] < result["parameters"]
