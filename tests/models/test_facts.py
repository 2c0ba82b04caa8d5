import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.models.facts import AdapterFacts, Origin, metadata, origin_of, read_adapter_facts
from helpers.models.families import SPECS
from helpers.models.parts import LossSettings

ORIGIN = Origin(
    base_model="DeepFloyd/IF-I-M-v1.0",
    family="deepfloyd-i",
    pipeline="IFPipeline",
    prediction_type="epsilon",
    variance_type="fixed_small",
    caption_cleaning="deepfloyd-if, twice",
    token_length=77,
)


def written(path, stored):
    save_file({"x": torch.zeros(1)}, path / "x.safetensors", stored)
    return path / "x.safetensors"


@pytest.mark.parametrize("own", [
    {"kind": "lora", "rank": 32, "alpha": 16, "targets": "attention"},
    {"kind": "dora", "rank": 8, "alpha": 0.5, "targets": "attention+conv", "rslora": True},
    {"kind": "bitfit"},
])
def test_facts_come_back_as_they_were(tmp_path, own):
    facts = read_adapter_facts(written(tmp_path, metadata(ORIGIN, **own)))
    assert facts == AdapterFacts(**vars(ORIGIN), **own)


def test_facts_are_plain_words_under_our_own_prefix():
    stored = metadata(ORIGIN, kind="lora", rank=4, alpha=2.5, targets="attention")
    assert stored["floydtuner.base_model"] == "DeepFloyd/IF-I-M-v1.0"
    assert (stored["floydtuner.rank"], stored["floydtuner.alpha"], stored["floydtuner.rslora"]) == ("4", "2.5", "false")
    assert {name for name in stored if not name.startswith("floydtuner.")} == {"format"}


@pytest.mark.parametrize("stored", [None, {"format": "pt", "lora_adapter_metadata": "{}"}])
def test_another_trainers_file_has_no_facts(tmp_path, stored):
    assert read_adapter_facts(written(tmp_path, stored)) is None


def test_facts_that_are_not_whole_are_refused(tmp_path):
    stored = metadata(ORIGIN, kind="bitfit")
    del stored["floydtuner.token_length"]
    with pytest.raises(ValueError, match="token_length"):
        read_adapter_facts(written(tmp_path, stored))


@pytest.mark.parametrize("family, pipeline", [
    ("deepfloyd-i", "IFPipeline"), ("deepfloyd-ii", "IFSuperResolutionPipeline"),
])
def test_the_origin_is_read_from_the_weights_and_names_a_folder_without_its_path(
    tiny_model, tmp_path, family, pipeline
):
    folder = shutil.copytree(tiny_model, tmp_path / "my-if")
    origin = origin_of(str(folder), family, SPECS[family], folder, LossSettings())
    assert origin == Origin(**{
        **vars(ORIGIN), "base_model": "my-if", "family": family, "pipeline": pipeline, "variance_type": "learned_range",
    })
    assert origin_of("some/if", family, SPECS[family], folder, LossSettings()).base_model == "some/if"


@pytest.mark.parametrize("channels, base, trained, variance", [
    (6, "learned_range", True, "learned_range"), (6, "learned_range", False, "fixed_small"),
    (6, "fixed_small", True, "learned_range"), (6, "fixed_large", False, "fixed_small"),
    (3, "learned_range", True, "fixed_small"), (3, "fixed_large", True, "fixed_large"),
])
def test_a_predicted_variance_is_sampled_with_only_where_it_was_trained(
    tiny_model, tmp_path, channels, base, trained, variance
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    unet, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    for path, values in ((unet, {"out_channels": channels}), (scheduler, {"variance_type": base})):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert origin_of("some/if", "deepfloyd-i", SPECS["deepfloyd-i"], folder, LossSettings(trained)).variance_type == variance
