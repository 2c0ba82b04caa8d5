"""The benchmark of BASE_MODEL_PRECISION runs at tiny sizes, and its figures reach the page."""

from __future__ import annotations

import json

import pytest

from benchmarks import quantized_base, report

OPTIONS = ["--no-full_size", "--steps=1", "--timed_steps=1", "--batch=1", "--sampling_steps=1", "--models", "I-XL"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Measured in two runs, of which the second keeps what the first one measured."""
    output = tmp_path_factory.mktemp("result") / "quantized_base.json"
    quantized_base.main([*OPTIONS, f"--output={output}", "--only", "memory"])
    result = quantized_base.main([*OPTIONS, f"--output={output}", "--only", "drift", "learning"])
    assert json.loads(output.read_text()) == result
    return result


def test_fewer_bits_take_less_and_differ_more(result):
    assert result.keys() == {"memory", "drift", "learning", "machine"}
    precisions = result["memory"]["counted"]["precisions"]
    assert precisions["no_change"]["weights_gb"] > precisions["int8"]["weights_gb"] > precisions["nf4"]["weights_gb"]
    assert precisions["no_change"]["activations_gb"] > precisions["int8"]["activations_gb"] > 0
    for figures in result["drift"].values():
        assert 0 < figures["int8"]["relative_change"] < 0.05 < 2 * figures["nf4"]["relative_change"] < 1
        assert figures["int8"]["psnr_of_pictures"] > figures["nf4"]["psnr_of_pictures"]
    learned = result["learning"]
    assert learned["no_change"]["distance"] == 0 < learned["int8"]["distance"]


def test_the_page_tells_them(result):
    said = report.quantized(result)
    assert all(f"| {name} |" in said for name in ("I-XL", "int8", "nf4", "Stable Diffusion", "bfloat16"))
