"""The files of the user documents, unmodified: what they say is what the run gets."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.config.backends import load_backends
from helpers.config.load import ENV_FILE_MARK, load
from helpers.sizes import Size

DOCUMENTED = Path(__file__).parent / "fixtures" / "documented"


@pytest.fixture
def backends(tmp_path) -> str:
    """The documented dataloader JSON with the folder of images replaced by one that exists."""
    entries = json.loads((DOCUMENTED / "multidatabackend_deepfloyd.json").read_text(encoding="utf-8"))
    entries[0]["instance_data_dir"] = str(tmp_path)
    path = tmp_path / "backends.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return str(path)


def from_env_file(*flags: str):
    """The options that the documented env file gives, sourced by a real bash."""
    script = 'set -a; . "$0" && exec "$PYTHON" -m helpers.config.env "$@"'
    environ = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-c", script, str(DOCUMENTED / "sd2x-env.sh"), *flags], env=environ, text=True, capture_output=True,
        cwd=Path(__file__).parents[1], timeout=60, check=False,
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    return load(words[words.index("train_sd2x.py") + 1:], {ENV_FILE_MARK: "sd2x-env.sh"})


def test_the_env_file_means_what_it_says(backends):
    config = from_env_file(f"--data_backend_config={backends}").config
    assert config.training_kind == "lora" and config.family.name == "DeepFloyd IF stage I"
    assert config.model.pretrained_model_name_or_path == "DeepFloyd/IF-I-M-v1.0"
    assert (config.optimizer.learning_rate, config.optimizer.lr_end) == (4e-5, 4e-6)
    assert config.run.output_dir == Path("/training/models/deepfloyd")
    assert (config.training.max_train_steps, config.training.num_train_epochs) == (50000, 0)
    assert (config.training.train_batch_size, config.training.gradient_accumulation_steps) == (1, 1)
    assert (config.data.resolution_type, config.data.resolution) == ("pixel", 64)
    assert (config.training.mixed_precision, config.training.pure_bf16) == ("bf16", True)
    assert (config.optimizer.optimizer, config.training.attention_mechanism) == ("adamw_bf16", "xformers")


def test_the_env_files_validation_means_what_it_says(backends):
    validation = from_env_file(f"--data_backend_config={backends}").config.validation
    assert validation.validation_prompt == "an ethnographic photograph of a teddy bear at a picnic"
    assert validation.validation_negative_prompt == "blurry, ugly, cropped, amputated"
    assert validation.validation_resolution == (Size(96, 64),)
    assert (validation.validation_steps, validation.validation_num_inference_steps) == (250, 25)
    assert (validation.validation_guidance, validation.validation_guidance_rescale) == (7.5, 0.0)
    assert validation.validation_seed == 42


def test_the_rate_that_the_documents_end_at_is_reached_by_default(backends):
    assert not from_env_file(f"--data_backend_config={backends}").config.optimizer.lr_scheduler.startswith("constant")


@pytest.mark.parametrize("value, sizes", [
    ("64", [(64, 64)]),
    ("96x64", [(96, 64)]),
    ("64,96,64x96,96x64", [(64, 64), (96, 96), (64, 96), (96, 64)]),
])
def test_the_documented_validation_sizes(backends, value, sizes):
    config = from_env_file(f"--data_backend_config={backends}", f"--validation_resolution={value}").config
    assert list(config.validation.validation_resolution) == sizes


def test_the_config_json_means_what_it_says():
    config = load([f"--config={DOCUMENTED / 'config.json'}"]).config
    assert config.model.model_type == "deepfloyd-lora"
    assert config.model.pretrained_model_name_or_path == "DeepFloyd/IF-I-M-v1.0"
    assert (config.optimizer.learning_rate, config.optimizer.lr_end) == (4e-5, 4e-6)
    assert (config.data.resolution, config.data.resolution_type) == (64, "pixel")


def test_both_front_doors_end_in_the_same_config(backends, tmp_path):
    exports = from_env_file(f"--data_backend_config={backends}")
    door = json.loads("\n".join(
        line for line in (DOCUMENTED / "config.json").read_text(encoding="utf-8").splitlines() if line[:1] != "#"
    ))
    door |= {
        "data_backend_config": backends, "output_dir": "/training/models/deepfloyd", "max_train_steps": 50000,
        "num_train_epochs": 0, "train_batch_size": 1, "resolution": 64, "resolution_type": "pixel",
        "validation_resolution": "96x64", "validation_negative_prompt": "blurry, ugly, cropped, amputated",
        "validation_prompt": "an ethnographic photograph of a teddy bear at a picnic", "mixed_precision": "bf16",
        "pure_bf16": True, "optimizer": "adamw_bf16", "attention_mechanism": "xformers",
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(door), encoding="utf-8")
    assert load([f"--config={path}"]).config == exports.config


def test_the_dataloader_json_means_what_it_says(backends, tmp_path):
    config = load(["--model_type=deepfloyd-lora"]).config
    loaded = load_backends(Path(backends), config)
    (image,), (text,) = loaded.images, loaded.text_embeds
    assert (image.id, image.instance_data_dir, image.repeats) == ("primary-dataset", tmp_path, 1)
    assert (image.crop, image.crop_aspect, image.crop_style) == (True, "square", "random")
    assert (image.resolution, image.resolution_type) == (64, "pixel")
    assert (image.minimum_image_size, image.maximum_image_size, image.target_downsample_size) == (64, 256, 128)
    assert (image.caption_strategy, image.prepend_instance_prompt) == ("instanceprompt", False)
    assert image.instance_prompt == "Your Subject Trigger Phrase or Word"
    assert text.cache_dir == Path("/training/cache/deepfloyd/text/dreambooth")
    assert image.text_embeds == text.id


@pytest.fixture
def dataloader_for_training(tmp_path, photos) -> Path:
    """The documented dataloader JSON with only its folders replaced."""
    entries = json.loads((DOCUMENTED / "multidatabackend_deepfloyd.json").read_text(encoding="utf-8"))
    entries[0]["instance_data_dir"] = str(photos)
    entries[1]["cache_dir"] = str(tmp_path / "text")
    path = tmp_path / "multidatabackend_deepfloyd.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def run_train_sh(env_file: Path, *flags: str) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI")}
    return subprocess.run(
        ["./train.sh", *flags], cwd=Path(__file__).parents[1], env={**environ, "ENV_FILE": str(env_file)}, text=True,
        capture_output=True, timeout=300, check=False,
    )


def test_the_documented_env_file_trains(tmp_path, tiny_model, dataloader_for_training):
    """The env file as it stands, with only the model, the folders and the number of steps replaced after it."""
    env_file = tmp_path / "sd2x-env.sh"
    env_file.write_text(
        f'. "{DOCUMENTED / "sd2x-env.sh"}"\n'
        f'export MODEL_NAME="{tiny_model}" OUTPUT_DIR="{tmp_path}/out" CACHE_DIR="{tmp_path}/cache"\n'
        f'export DATALOADER_CONFIG="{dataloader_for_training}" MAX_NUM_STEPS=2\n',
        encoding="utf-8",
    )
    result = run_train_sh(env_file)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    for step in (0, 2):
        images = [path.name for path in (tmp_path / "out" / "validation_images" / f"step_{step}").glob("*_*.png")]
        assert images == ["an_ethnographic_photograph_of_a_teddy_bear_at_a_picnic_96x64.png"]
    assert "SDPA" in result.stdout, "USE_XFORMERS=true is answered where xformers is not usable"


def test_the_documented_config_json_trains(tmp_path, tiny_model, dataloader_for_training):
    result = run_train_sh(
        Path("/dev/null"), "--config", str(DOCUMENTED / "config.json"), f"--pretrained_model_name_or_path={tiny_model}",
        f"--data_backend_config={dataloader_for_training}", f"--output_dir={tmp_path}/out",
        f"--cache_dir={tmp_path}/cache", "--max_train_steps=2",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
