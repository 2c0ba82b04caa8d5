"""What was trained, loaded back: it samples as it did while it was trained."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from helpers.models.bitfit import BIASES_FILE, BitFit
from helpers.models.denoiser import Denoiser
from helpers.models.lora import LORA_FILE, LoRA
from helpers.models.results import load_adapter

ADAPTERS = {
    "lora": (LoRA(rank=4, alpha=2, dropout=0.0, targets="attention"), LORA_FILE),
    "dora": (LoRA(rank=4, alpha=4, dropout=0.0, targets="attention", dora=True), LORA_FILE),
    "bitfit": (BitFit(), BIASES_FILE),
}


@pytest.mark.parametrize("of_the_folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_loaded_with_the_scheduler_that_it_needs(
    unet_in, pipeline, origin, moved, output_of, tmp_path, kind, of_the_folder
):
    adapter, file = ADAPTERS[kind]
    adapter = replace(adapter, origin=replace(origin, variance_type="fixed_small"))
    unet = unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(moved(unet)), tmp_path)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    facts = load_adapter(pipeline, tmp_path if of_the_folder else tmp_path / file)
    assert (facts.kind, facts.variance_type) == (kind, "fixed_small")
    assert pipeline.scheduler.config.variance_type == "fixed_small"
    assert pipeline.scheduler.config.sample_max_value == 1.5
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet))


def test_a_variance_that_was_trained_is_sampled_with_whatever_the_base_does(unet_in, pipeline, origin, tmp_path):
    adapter = replace(ADAPTERS["lora"][0], origin=origin)
    unet = unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, variance_type=None)
    load_adapter(pipeline, tmp_path, "subject")
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.get_active_adapters() == ["subject"]


def test_another_trainers_adapter_leaves_the_scheduler_as_it_is(unet_in, pipeline, origin, tmp_path):
    adapter = replace(ADAPTERS["lora"][0], origin=origin)
    unet = unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path)
    save_file(load_file(tmp_path / LORA_FILE), tmp_path / "other.safetensors", {"format": "pt"})
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="fixed_large")
    assert load_adapter(pipeline, tmp_path / "other.safetensors") is None
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    assert pipeline.get_active_adapters()


def test_biases_beside_an_adapter_that_renamed_the_layers_are_refused(unet_in, pipeline, origin, tmp_path):
    adapter, unet = replace(BitFit(), origin=origin), unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path)
    ADAPTERS["lora"][0].attach(Denoiser(pipeline.unet), torch.float32)
    with pytest.raises(ValueError, match="before any LoRA"):
        load_adapter(pipeline, tmp_path)


def test_a_folder_without_an_adapter_is_named(pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no adapter in {tmp_path}"):
        load_adapter(pipeline, tmp_path)
