"""What 8 bits lose is measured, is as little as the arithmetic says, and is told."""

from __future__ import annotations

import json

import pytest

from benchmarks import embeds_drift, report


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("drift") / "embeds_drift.json"
    found = embeds_drift.main(["--pictures=2", "--levels=3", f"--output={output}"])
    assert json.loads(output.read_text()) == found and "| int8 |" in report.page(output.parent)
    return found


def test_normal_numbers_lose_what_steps_of_a_127th_of_the_largest_of_64_lose(result):
    """The largest of 64 is 2.4 on average: steps of 0.019, an error of 0.019 / sqrt(12) = 0.0055; bf16 adds to it."""
    plain, spiked = result["embeds"].values()
    assert 0.005 < plain["int8"] < 0.007 and 0.0015 < plain["bf16"] < 0.0018
    assert plain["int8"] < spiked["int8, the other channels"] < spiked["int8, those beside a larger one"] < 0.3


def test_a_model_predicts_nearly_the_same(result):
    changes = result["demo"]["changes"]
    assert changes["int8"]["prediction"] < 0.1 * changes["no caption"]["prediction"]
    assert changes["int8"]["embeds"] > changes["float32 rounded to bf16"]["embeds"] > 0
    assert abs(changes["int8"]["mean_loss"]) < 0.01
