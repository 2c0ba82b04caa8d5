"""Pipelines written beside a tuned UNet: complete, with a scheduler that fits, and loaded by diffusers as they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

from examples.demo.make_model import SCHEDULER
from helpers.models.facts import origin_of
from helpers.models.families import SPECS
from helpers.models.parts import LossSettings
from helpers.models.pipelines import write_pipeline


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.fixture
def second_stage(tiny_stage2, tmp_path) -> Path:
    """An untrained stage II pipeline with a noising schedule that no default has."""
    folder = Path(shutil.copytree(tiny_stage2, tmp_path / "stage2"))
    path = folder / "image_noising_scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 999}))
    return folder


def test_an_index_has_nothing_that_its_pipeline_does_not_take(tiny_stage3, tmp_path, caplog):
    """diffusers warns of it whenever the result is loaded."""
    base = Path(shutil.copytree(tiny_stage3, tmp_path / "base"))
    change_index(base, requires_safety_checker=False)
    origin = origin_of(str(base), "deepfloyd-iii", SPECS["deepfloyd-iii"], base, LossSettings())
    written = write_pipeline(UNet2DConditionModel.from_pretrained(base / "unet"), base, tmp_path / "out", None, origin)
    index = json.loads((written / "model_index.json").read_text())
    assert "requires_safety_checker" not in index and index["max_noise_level"] == 350


def change_index(base: Path, **values: object) -> None:
    path = base / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_second_stage_comes_out_complete(second_stage, moved, output_of, tmp_path):
    spec = SPECS["deepfloyd-ii"]
    origin = origin_of(str(second_stage), "deepfloyd-ii", spec, second_stage, LossSettings())
    unet = moved(UNet2DConditionModel.from_pretrained(second_stage / "unet"))
    tuned = DiffusionPipeline.from_pretrained(write_pipeline(unet, second_stage, tmp_path / "output", None, origin))
    assert type(tuned) is IFSuperResolutionPipeline
    assert tuned.image_noising_scheduler.config.num_train_timesteps == 999
    assert tuned.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(output_of(tuned.unet), output_of(unet))
    image = tuned(
        prompt="a red circle", image=torch.rand(1, 3, 16, 16), height=64, width=64, num_inference_steps=1,
        output_type="np",
    ).images
    assert image.shape == (1, 64, 64, 3)


def test_a_missing_part_that_the_pipeline_needs_is_named(second_stage, tmp_path):
    spec = SPECS["deepfloyd-ii"]
    origin = origin_of(str(second_stage), "deepfloyd-ii", spec, second_stage, LossSettings())
    shutil.rmtree(second_stage / "image_noising_scheduler")
    unet = UNet2DConditionModel.from_pretrained(second_stage / "unet")
    with pytest.raises(FileNotFoundError, match="image_noising_scheduler"):
        write_pipeline(unet, second_stage, tmp_path / "output", None, origin)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
@pytest.mark.parametrize("before", ["learned_range", "fixed_small"])
def test_the_scheduler_samples_with_the_variance_that_was_trained(unet_in, base, origin, tmp_path, before, variance):
    DDPMScheduler(**{**SCHEDULER, "variance_type": before}).save_pretrained(base / "scheduler")
    written = write_pipeline(unet_in(), base, tmp_path / "output", None, replace(origin, variance_type=variance))
    config = DDPMScheduler.from_pretrained(written / "scheduler").config
    assert config.variance_type == variance
    assert all(config[name] == value for name, value in SCHEDULER.items() if name != "variance_type")


def test_one_written_from_a_variant_loads_as_the_plain_one(unet_in, base, origin, output_of, tmp_path):
    for stem in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        (base / f"{stem}.safetensors").rename(base / f"{stem}.fp16.safetensors")
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickled")
    unet = unet_in()
    written = write_pipeline(unet, base, tmp_path / "output", "fp16", origin)
    tuned = IFPipeline.from_pretrained(written)
    torch.testing.assert_close(output_of(tuned.unet), output_of(unet))
    assert not list(written.rglob("*.bin"))
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["pipeline"]


def test_a_part_without_the_variant_is_copied_plain(unet_in, base, origin, tmp_path):
    written = write_pipeline(unet_in(), base, tmp_path / "output", "fp16", origin)
    assert (written / "text_encoder" / "model.safetensors").exists()
    DiffusionPipeline.from_pretrained(written)


@pytest.mark.parametrize("files", [[], ["config.json", "pytorch_model.bin"]], ids=["not fetched", "pickled only"])
def test_an_optional_part_that_is_not_usable_is_left_out(unet_in, base, origin, tmp_path, files):
    change_index(base, safety_checker=["deepfloyd_if", "IFSafetyChecker"])
    for name in files:
        (base / "safety_checker").mkdir(exist_ok=True)
        (base / "safety_checker" / name).write_text("{}")
    written = write_pipeline(unet_in(), base, tmp_path / "output", None, origin)
    assert not (written / "safety_checker").exists()
    assert DiffusionPipeline.from_pretrained(written).safety_checker is None


def test_the_family_says_which_pipeline_it_is(unet_in, base, origin, tmp_path):
    change_index(base, _class_name="IFImg2ImgPipeline")
    written = write_pipeline(unet_in(), base, tmp_path / "output", None, origin)
    assert type(DiffusionPipeline.from_pretrained(written)) is IFPipeline


def test_an_optional_part_that_is_there_is_copied(unet_in, base, origin, tmp_path):
    change_index(base, feature_extractor=["transformers", "CLIPImageProcessor"])
    (base / "feature_extractor").mkdir()
    config = '{"image_processor_type": "CLIPImageProcessor"}'
    (base / "feature_extractor" / "preprocessor_config.json").write_text(config)
    written = write_pipeline(unet_in(), base, tmp_path / "output", None, origin)
    assert (written / "feature_extractor" / "preprocessor_config.json").read_text() == config
