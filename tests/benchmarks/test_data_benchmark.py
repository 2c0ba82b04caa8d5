"""The data benchmark runs, and tells what it promises to tell; its speed is not judged here."""

import json
import os

import pytest

from benchmarks import data


@pytest.fixture
def same_cores_afterwards():
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    if cores:
        os.sched_setaffinity(0, cores)


def test_the_benchmark_runs_and_saves_its_figures(tmp_path, same_cores_afterwards):
    out = tmp_path / "data.json"
    data.main(["--photos", "1", "--photo_size", "400x300", "--samples", "32", "--width", "8", "--seconds", "0.01",
               "--folder", str(tmp_path), "--output", str(out)])
    result = json.loads(out.read_text())
    for name in data.PREPARATIONS:
        assert result["photos"][0][name]["ratio"] > 0
    assert result["all_cores"]["ratio"] > 0
    cached = result["cached"]
    for figures in (cached, cached["int8"], cached["copying_embeds_alone"]):
        assert figures["samples_per_second"] > 0
    assert cached["mb_a_caption"] > 0 and cached["int8"]["mb_a_caption"] > 0 and result["embeds"]["ratio"] > 0
    assert result["machine"].keys() >= {"processor", "threads", "python", "torch", "pillow", "commit"}
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
