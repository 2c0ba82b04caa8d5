"""The benchmark of sampling: what it estimates, and that it measures what inference.py does, here on a CPU."""

import json

import pytest
import torch

from benchmarks import gpu_inference
from benchmarks.gpu_inference import VRAM, Component, estimates, measure, table, write_folders
from benchmarks.gpu_train import shrunk
from helpers.inference.placement import GB, Place
from helpers.models.footprint import Footprint
from helpers.sizes import Size

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def estimated():
    return estimates()


@pytest.mark.parametrize("cascade", ["M/M/x4", "XL/L/x4"])
@pytest.mark.parametrize("vram, most", [("6", 6), ("auto on 12 GB", 12), ("16", 16), ("24", 24)])
def test_each_class_is_kept_to_by_every_component_to_1024_px(estimated, cascade, vram, most):
    rows = estimated[f"{cascade} --vram {vram}"]
    assert list(rows) == ["text", "stage1", "stage2", "upscaler", "VAE"]
    assert max(row["estimated_gb"] for row in rows.values()) <= (most * GB - 0.7e9) / 1e9
    assert rows["text"]["by_groups"] == (most == 6)
    assert rows["stage1"]["by_groups"] == (most == 6 and cascade == "XL/L/x4")


def test_published_weights_have_the_size_that_they_are_known_to_have(estimated):
    known = {"M/M/x4": (9.52, 0.74, 0.92, 0.95, 0.22), "XL/L/x4": (9.52, 8.61, 2.49, 0.95, 0.22)}
    for cascade, weights in known.items():
        rows = estimated[f"{cascade} --vram max"].values()
        assert [row["weights_gb"] for row in rows] == pytest.approx(weights, rel=0.01)


def test_the_table_has_every_case_with_its_peak(estimated):
    lines = table(estimated).splitlines()
    assert len(lines) == 2 + 2 * len(VRAM) and lines[0].endswith("| VAE | peak |")
    row = {"estimated_gb": 2.0, "peak_gb": 2.46, "by_groups": True, "tiled": False, "batch": 4}
    assert table({"a": {"text": row}}).splitlines()[-1] == "| a | 2.0 (2.5 measured), in groups, 4 at a time | 2.5 |"


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_inference.main([f"--output={tmp_path / 'result.json'}"])
    assert "sees no GPU" in capsys.readouterr().err and not (tmp_path / "result.json").exists()
    with pytest.raises(SystemExit):
        gpu_inference.main(["--estimate", "--only", "S/S"])


def small(path):
    """The same architectures, but narrow and with few layers."""
    config = json.loads(path.read_text())
    if "t5" in path.name:
        return config | {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 1}
    if "vae" in path.name:
        return config | {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    return shrunk({"sample_size": 64} | config)


def test_each_component_is_measured_as_inference_py_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_inference, "_config", small)
    for _ in range(2):  # the second time nothing is written
        folders = write_folders("M/M/x4", tmp_path, CPU)
        sizes = [Size(16, 16), Size(64, 64), Size(256, 256)]
    assert not (folders["stage2"] / "text_encoder").exists()
    for name in ("text", "stage1", "stage2", "upscaler", "VAE"):
        component = Component(name, Footprint(0, 0, 0), Place(by_groups=False, batch=2, tiled=name == "VAE", bytes=0))
        told = measure(component, folders, sizes, CPU, steps=1)
        assert told.keys() == {"seconds"} and told["seconds"] > 0, "of a CPU no peak is known"
