"""The generated files are those of the tables; the examples use only what the tables state."""

from __future__ import annotations

import json

import pytest

from helpers.config.backends import load_backends
from helpers.config.docs import backends_schema, config_schema, files
from helpers.config.load import load
from helpers.config.options import LAUNCH_ROWS, ROWS
from helpers.config.paths import ROOT


@pytest.mark.parametrize("path", list(files()), ids=lambda path: path.name)
def test_generated_files_are_current(path):
    assert path.read_text(encoding="utf-8") == files()[path], "run: python -m helpers.config.docs"


def test_the_options_page_names_every_flag_and_export():
    page = (ROOT / "OPTIONS.md").read_text(encoding="utf-8")
    assert all(f"`--{name}`" in page for name in ROWS)
    assert all(f"`{export}`" in page for row in (*ROWS.values(), *LAUNCH_ROWS.values()) for export in row.all_exports)


def test_the_options_page_says_what_each_key_of_a_dataset_takes():
    page = (ROOT / "OPTIONS.md").read_text(encoding="utf-8")
    assert "| `crop_aspect_buckets` | a list | not set |" in page


def test_the_schemas_know_what_the_parsers_know():
    assert set(ROWS) - {"config"} <= set(config_schema()["properties"])
    image = backends_schema()["items"]["else"]["else"]
    assert image["required"] == ["id", "instance_data_dir"] and not image["additionalProperties"]
    assert {"cache_dir_vae", "disable", "crop_aspect_buckets"} <= set(image["properties"])


@pytest.mark.parametrize("example, flags", [
    ("multidatabackend_deepfloyd.json.example", [f"--config={ROOT / 'config.json.example'}"]),
    ("multidatabackend_sd2x.json.example", ["--model_type=lora"]),
    ("multidatabackend_sd2x.json.example", ["--model_type=lora", "--model_flavour=1.5"]),
])
def test_the_example_configs_load(tmp_path, example, flags):
    config = load(flags).config
    entries = json.loads((ROOT / example).read_text(encoding="utf-8"))
    entries[0]["instance_data_dir"] = str(tmp_path)
    path = tmp_path / "backends.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert len(load_backends(path, config).images) == 1
