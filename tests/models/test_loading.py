import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from helpers.config.families import DEEPFLOYD_I
from helpers.models import loading
from helpers.models.families import SPECS
from helpers.models.loading import WeightsError

SPEC = SPECS[DEEPFLOYD_I.key]


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_fitting_weights_pass(model):
    loading.check(DEEPFLOYD_I, SPEC, model)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"in_channels": 6, "class_embed_type": "timestep"}, "they are IF stage II"),
        ({"in_channels": 4}, "Stable Diffusion"),
        ({"in_channels": 1}, "takes 1 channels instead of 3"),
        ({"encoder_hid_dim_type": None}, "no projection of T5 embeddings"),
        ({"encoder_hid_dim": 4096}, "text encoder gives 64 values a token, the UNet takes 4096"),
    ],
)
def test_weights_of_another_kind_are_refused_in_words(model, values, words):
    change(model / "unet" / "config.json", **values)
    with pytest.raises(WeightsError, match=words) as error:
        loading.check(DEEPFLOYD_I, SPEC, model)
    assert "MODEL_NAME" in str(error.value)


def test_another_prediction_than_epsilon_is_refused(model):
    change(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(WeightsError, match="v_prediction"):
        loading.check(DEEPFLOYD_I, SPEC, model)


@pytest.mark.parametrize("component", loading.COMPONENTS)
def test_an_incomplete_folder_is_named_with_what_it_lacks(model, component):
    shutil.rmtree(model / component)
    with pytest.raises(WeightsError, match=f"has no {component} folder"):
        loading.check(DEEPFLOYD_I, SPEC, model)


def test_a_damaged_config_is_named(model):
    (model / "unet" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json cannot be read"):
        loading.check(DEEPFLOYD_I, SPEC, model)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(WeightsError, match="there is no folder"):
        loading.fetch_configs(name, None)


def test_an_unreachable_hub_id_is_answered_with_licence_login_and_local_path():
    with pytest.raises(WeightsError) as error:
        loading.fetch_configs("DeepFloyd/IF-I-M-v1.0", None)
    for words in ("https://huggingface.co/DeepFloyd/IF-I-M-v1.0", "hf auth login", "export MODEL_NAME="):
        assert words in str(error.value)


PUBLISHED = [
    "model_index.json", "README.md", "scheduler/scheduler_config.json", "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json", "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.fp16.json", "text_encoder/pytorch_model-00001-of-00002.bin",
    "safety_checker/config.json", "safety_checker/model.safetensors", "watermarker/config.json",
]  # fmt: skip


@pytest.mark.parametrize("variant, weights", [
    (None, {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00002.safetensors"}),
    ("fp16", {
        "unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors",
    }),
])  # fmt: skip
def test_of_a_hub_repository_only_what_is_used_is_taken_in_one_variant(variant, weights):
    allow, ignore = loading.file_patterns(variant)
    taken = set(filter_repo_objects(PUBLISHED, allow_patterns=allow, ignore_patterns=ignore))
    assert {name for name in taken if name.endswith((".safetensors", ".bin"))} == weights
    assert {"model_index.json", "unet/config.json", "tokenizer/spiece.model"} <= taken
    assert not any(name.startswith(("safety_checker", "watermarker")) for name in taken)


@pytest.mark.parametrize("channels, learned", [(6, True), (3, False)])
def test_the_variance_is_trained_where_the_weights_have_one(model, channels, learned):
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(model / "unet")
    UNet2DConditionModel.from_config({**config, "out_channels": channels}).save_pretrained(model / "unet")
    parts = loading.load(SPEC, model, torch.float32, None)
    assert parts.objective.learns_variance is learned
    assert parts.schedule.timesteps == 1000
