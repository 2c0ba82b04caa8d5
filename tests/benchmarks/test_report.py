"""docs/performance.md says what the results say, and names what is not measured."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import report, scaling, scan
from benchmarks.machine import ROOT


def test_the_page_is_that_of_the_results():
    assert report.PAGE.read_text("utf-8") == report.page(), "python -m benchmarks.report writes it anew"


def test_every_result_has_its_section_and_every_picture_is_there():
    names = {name for _, name, _ in report.SECTIONS}
    assert {path.stem for path in report.RESULTS.glob("*.json")} <= names
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", report.page()):
        assert (report.PAGE.parent / picture).is_file()


def test_what_is_not_measured_is_named(tmp_path):
    said = report.page(tmp_path)
    assert said.count("python -m benchmarks.") == len(report.SECTIONS) + 1 and "## Not measured yet" in said


@pytest.mark.parametrize("value, said", [
    (0.99213, "0.992"), (3.0, "3"), (27.05, "27.1"), (147.8, "148"), (12030, "12,000"), (None, "-"), (0.0, "0"),
])  # fmt: skip
def test_figures_are_rounded_to_what_matters(value, said):
    assert report.number(value) == said


def test_scaling_is_measured_and_told(tmp_path):
    output = tmp_path / "scaling.json"
    options = ["--images", "30", "--steps=4", "--ranks", "2", "4", f"--folder={tmp_path}", f"--output={output}"]
    demo = ROOT / "examples" / "demo" / "model" / "unet" / "config.json"
    result = scaling.main([*options, f"--architecture={demo}"])
    assert json.loads(output.read_text()) == result and [path.name for path in tmp_path.iterdir()] == [output.name]
    [row] = result["datasets"]
    for run in (row["first"], row["second"]):
        assert run["seconds_to_first_step"] > 0 and run["seconds_a_step"] > 0 and 0.1 < run["peak_gb"] < 5
    low, high = result["checkpoints"]
    assert high["bytes"] > low["bytes"] > 10_000 and high["seconds"] > 0
    said = report.page(tmp_path)
    assert "| 30 |" in said and "| rank of a LoRA" in said


def test_scanning_is_measured_and_told(tmp_path):
    output = tmp_path / "scan.json"
    result = scan.main(["--images", "400", "600", "--workers=2", f"--folder={tmp_path}", f"--output={output}"])
    assert json.loads(output.read_text()) == result and [path.name for path in tmp_path.iterdir()] == [output.name]
    small, large = result["datasets"]
    assert small["opened_after_cut"] == {"before": 256, "after": 144}
    assert large["opened_after_cut"] == {"before": 512, "after": 88}
    assert large["second_start_seconds"]["all"] > large["second_start_seconds"]["scan"] > 0
    assert 0 < large["bytes_an_image"]["scan"] < large["bytes_an_image"]["scan with captions"]
    said = report.page(tmp_path)
    assert "| 400 |" in said and "a million images" in said


def test_images_of_a_dataset_differ(tmp_path):
    scaling.write_images(tmp_path, 1500)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 1500 and len({path.read_bytes() for path in files}) == 1500
