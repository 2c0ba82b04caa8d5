"""Both ways to name a model end in the same one; contradictions are refused in words."""

from __future__ import annotations

import pytest

from helpers.config.families import DEEPFLOYD_I, MODEL_TYPES, Contradiction, resolve
from helpers.config.load import load


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


@pytest.mark.parametrize("flavour, hub_id", list(DEEPFLOYD_I.flavours.items()))
def test_a_flavour_and_its_hub_id_mean_the_same(flavour, hub_id):
    by_flavour = resolve("deepfloyd-full", None, flavour, None)
    assert by_flavour == resolve("deepfloyd-full", None, None, hub_id)
    assert (by_flavour.name, by_flavour.flavour, by_flavour.model_type) == (hub_id, flavour, "deepfloyd-full")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_family_and_kind_join_to_a_model_type(kind):
    assert resolve(kind, "deepfloyd", None, None).model_type == f"deepfloyd-{kind}"


def test_a_local_folder_has_no_flavour_and_an_absolute_path(tmp_path):
    model = resolve("deepfloyd-lora", None, None, str(tmp_path))
    assert (model.name, model.flavour) == (str(tmp_path), None)


def test_another_hub_id_is_left_as_it_is():
    assert resolve("deepfloyd-lora", None, None, "someone/their-if").name == "someone/their-if"


@pytest.mark.parametrize("said, option, words", [
    ((None, None, None, None), "model_type", "is not set, needs one of"),
    (("lora", None, None, None), "model_type", "without a model_family"),
    (("deepfloyd-lra", None, None, None), "model_type", "did you mean 'deepfloyd-lora'?"),
    (("deepfloyd-lora", "sdxl", None, None), "model_family", "remove one of the two"),
    (("lora", "sdxl", None, None), "model_family", "needs deepfloyd"),
    (("lora", "deepfloyd", "i-medium", None), "model_flavour", "did you mean 'i-medium-400m'?"),
    (("deepfloyd-lora", None, "xi-medium", None), "model_flavour", "DeepFloyd IF stage I needs one of"),
    (("deepfloyd-lora", None, "i-large-900m", "DeepFloyd/IF-I-M-v1.0"), "model_flavour", "which is 'i-medium-400m'"),
    (("deepfloyd-lora", None, None, "DeepFloyd/IF-II-M-v1.0"), "pretrained_model_name_or_path",
     "not a DeepFloyd IF stage I model"),
])
def test_contradictions_name_the_option(said, option, words):
    with pytest.raises(Contradiction) as caught:
        resolve(*said)
    assert caught.value.option == option and words in str(caught.value)


@pytest.mark.parametrize("said, model", [
    (("deepfloyd-stage2", None, None, None), "DeepFloyd IF stage II"),
    (("deepfloyd-stage2-lora", None, None, None), "DeepFloyd IF stage II"),
    (("deepfloyd-stage3-lora", "deepfloyd", None, None), "DeepFloyd IF stage III"),
    (("lora", None, None, None), "Stable Diffusion"),
    (("full", None, None, None), "Stable Diffusion"),
    (("lora", "deepfloyd", "ii-medium-450m", None), "DeepFloyd IF stage II"),
    (("deepfloyd-full", None, "ii-large-1.2b", None), "DeepFloyd IF stage II"),
])
def test_a_model_that_is_not_trained_yet_is_called_so_and_none_is_guessed(said, model):
    with pytest.raises(Contradiction) as caught:
        resolve(*said)
    words = str(caught.value)
    assert f"{model}" in words and "this version does not train it yet; type one of" in words
    existing = DEEPFLOYD_I.flavours if caught.value.option == "model_flavour" else MODEL_TYPES
    assert all(name in words for name in existing) and "did you mean" not in words


def test_an_unknown_type_lists_those_that_exist():
    with pytest.raises(Contradiction) as caught:
        resolve("sdxl", None, None, None)
    assert all(name in str(caught.value) for name in MODEL_TYPES)
