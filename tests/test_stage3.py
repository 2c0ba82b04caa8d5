"""Stage III end to end: latents and their low-resolution images cached together, trained, judged, loaded by diffusers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, StableDiffusionUpscalePipeline
from PIL import Image
from safetensors.torch import load_file

from helpers.models.facts import read_adapter_facts
from helpers.models.results import load_adapter
from helpers.training import loop
from helpers.training.step import training_loss
from helpers.validation import render
from helpers.validation.eval_images import low_resolution, psnr
from helpers.validation.render import SHEET

ADAPTER = "pytorch_lora_weights.safetensors"
NO_PICTURES = {"num_eval_images": 0}
FULL = {"model_type": "deepfloyd-stage3", "lora_rank": None}


@pytest.fixture
def stage3(trainer, tiny_stage3, tmp_path, photos):
    """The trainer on the tiny stage III, with images of 64 px from 16 px."""
    data = tmp_path / "data.json"

    def run(**flags: object) -> int:
        flags = {
            "model_type": "deepfloyd-stage3-lora",
            "pretrained_model_name_or_path": tiny_stage3,
            "num_eval_images": 2,
            "data_backend_config": data,
            **flags,
        }
        code = trainer(**flags)
        drawn = Path(flags.get("output_dir", tmp_path / "output")) / "validation_images"
        assert all((step / SHEET).exists() for step in drawn.glob("step_*")), "a validation failed"
        return code

    def dataset(**keys: object) -> None:
        entry = {"id": "photos", "instance_data_dir": str(photos), "crop": True, "caption_strategy": "textfile", **keys}
        data.write_text(json.dumps([entry]), "utf-8")

    run.dataset = dataset
    dataset()
    return run


@pytest.mark.parametrize("precision", [{"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "pure_bf16": True}])
def test_validation_samples_in_float32_whatever_the_unet_computes_in(stage3, monkeypatch, precision):
    """bfloat16 knows no noise of a level below 16, and the UNet would be told of it."""
    noised: list[tuple[torch.dtype, float]] = []
    stepped: list[torch.dtype] = []
    add_noise, step = DDPMScheduler.add_noise, DDIMScheduler.step

    def seen_noise(self, original, noise, t):
        made = add_noise(self, original, noise, t)
        noised.append((made.dtype, (made - original).std().item()))
        return made

    def seen_step(self, output, *arguments, **others):
        stepped.append(output.dtype)
        return step(self, output, *arguments, **others)

    monkeypatch.setattr(DDPMScheduler, "add_noise", seen_noise)
    monkeypatch.setattr(DDIMScheduler, "step", seen_step)
    optimizer = {"optimizer": "adamw_bf16"} if "pure_bf16" in precision else {}
    assert stage3(max_train_steps=1, validation_noise_level=10, **precision, **optimizer) == 0
    assert {dtype for dtype, _ in noised} == set(stepped) == {torch.float32}
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - torch.cumprod(1 - betas, 0)[10]).sqrt().item()
    assert all(abs(spread - expected) < 0.1 * expected for _, spread in noised)


def test_large_pictures_are_decoded_in_tiles(stage3, monkeypatch):
    tiled: list[tuple[int, ...]] = []
    decode = AutoencoderKL.tiled_decode

    def seen(self, latents, *arguments, **others):
        tiled.append(tuple(latents.shape[-2:]))
        return decode(self, latents, *arguments, **others)

    monkeypatch.setattr(AutoencoderKL, "tiled_decode", seen)
    flags = {"max_train_steps": 1, "validation_resolution": "64,128"}
    monkeypatch.setattr(render, "LARGEST_WHOLE", 64 * 64)
    assert stage3(**flags) == 0
    assert set(tiled) == {(32, 32)}


def pipeline_of(folder: Path) -> StableDiffusionUpscalePipeline:
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline: StableDiffusionUpscalePipeline) -> torch.Tensor:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    generator = torch.Generator().manual_seed(0)
    drawn = {"num_inference_steps": 2, "guidance_scale": 2, "generator": generator, "output_type": "latent"}
    return pipeline("a red circle", image=small, **drawn).images


@pytest.mark.parametrize("flags", [{}, {"use_dora": True, "lora_targets": "attention+conv"}], ids=["lora", "dora"])
def test_an_adapter_loads_in_diffusers_as_it_was_trained(stage3, tmp_path, tiny_stage3, monkeypatch, flags):
    seen = {}

    def remember(parts, *rest):
        seen["unet"] = parts.unet
        return training_loss(parts, *rest)

    monkeypatch.setattr(loop, "training_loss", remember)
    assert stage3(learning_rate=1e-2, **NO_PICTURES, **flags) == 0
    facts = read_adapter_facts(tmp_path / "output" / ADAPTER)
    assert (facts.family, facts.pipeline) == ("deepfloyd-iii", "StableDiffusionUpscalePipeline")
    assert (facts.prediction_type, facts.variance_type, facts.caption_cleaning) == ("v_prediction", None, "none")
    trained, loaded, base = (pipeline_of(tiny_stage3) for _ in range(3))
    trained.unet = seen["unet"].eval()
    load_adapter(loaded, tmp_path / "output")
    torch.testing.assert_close(latents_of(loaded), latents_of(trained), rtol=1e-4, atol=1e-4)
    assert (latents_of(loaded) - latents_of(base)).abs().max() > 1e-2


@pytest.mark.parametrize("flags", [{}, {"use_bitfit": True}], ids=["full", "bitfit"])
def test_full_tuning_writes_a_pipeline_that_differs_in_the_unet_only(stage3, tmp_path, tiny_stage3, flags):
    assert stage3(**FULL, **NO_PICTURES, learning_rate=1e-3, **flags) == 0
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "output" / "pipeline")
    base = pipeline_of(tiny_stage3)
    assert type(tuned) is StableDiffusionUpscalePipeline
    assert tuned.config.max_noise_level == 350 and tuned.vae.config.scaling_factor == 0.08333
    assert tuned.low_res_scheduler.config == base.low_res_scheduler.config
    moved = {name: (tensor != base.unet.state_dict()[name]).any() for name, tensor in tuned.unet.state_dict().items()}
    assert all(moved[name] for name in moved if name.endswith(".bias"))
    assert ("use_bitfit" in flags) == any(not moved[name] for name in moved)
    for part in ("vae", "text_encoder"):
        one, two = getattr(tuned, part).state_dict(), getattr(base, part).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert latents_of(tuned).isfinite().all()


@pytest.mark.parametrize("flags", [{}, {**FULL, "snr_gamma": 5, "use_ema": True}], ids=["lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage3, tmp_path, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"learning_rate": 1e-3, "checkpointing_steps": 2, "max_train_steps": 4, **NO_PICTURES, **flags}
    assert stage3(output_dir=whole, **common) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    assert stage3(output_dir=parts, **common) == 0
    files = [path.relative_to(whole) for path in (whole / "checkpoint-4").rglob("*.safetensors")]
    assert len(files) == 2, "the state, and the weights"
    for file in files:
        one, two = load_file(whole / file), load_file(parts / file)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), file


def test_it_trains_in_pure_bf16_with_checkpointing_and_is_judged_on_images_of_several_aspects(
    stage3, tmp_path, capfd
):
    stage3.dataset(crop_aspect="preserve", resolution=0.02, resolution_type="area")
    flags = {"mixed_precision": "bf16", "pure_bf16": True, "gradient_checkpointing": True, "optimizer": "adamw_bf16"}
    assert stage3(**flags, validation_resolution="64,128x64", max_train_steps=2) == 0
    assert "buckets: " in capfd.readouterr().out
    step = tmp_path / "output" / "validation_images" / "step_2"
    assert {Image.open(path).size for path in step.glob("photos_*.png")} == {(64, 64), (128, 64)}
    scores = json.loads((step / "psnr.json").read_text())
    assert len(scores) == 4 and all(score["output"] < score["bicubic"] < 60 for score in scores.values())


def test_an_eval_image_is_upscaled_as_diffusers_own_pipeline_does_it(stage3, tmp_path, tiny_stage3, photos):
    image = next(path for path in sorted(photos.glob("*.jpg")) if min(Image.open(path).size) >= 64)
    alone = tmp_path / "alone"
    alone.mkdir()
    Image.open(image).crop((0, 0, 64, 64)).save(alone / "it.png")
    (alone / "it.txt").write_text("a red circle")
    stage3.dataset(instance_data_dir=str(alone))
    flags = {"validation_noise_level": 70, "validation_guidance": 3, "validation_seed": 5, "max_train_steps": 1}
    assert stage3(train_batch_size=1, num_eval_images=1, **flags) == 0
    [ours] = (tmp_path / "output" / "validation_images" / "step_0").glob("photos_*.png")
    original = Image.open(alone / "it.png")
    theirs = pipeline_of(tiny_stage3)(
        "a red circle", image=low_resolution(original, 4), noise_level=70, guidance_scale=3, negative_prompt="",
        num_inference_steps=2, generator=torch.Generator().manual_seed(5),
    ).images[0]
    difference = np.abs(np.asarray(Image.open(ours), int) - np.asarray(theirs, int))
    assert difference.max() <= 8, "bfloat16 embeddings move a value by a few levels at the most"
    assert difference.mean() < 1
    scored = json.loads((ours.parent / "psnr.json").read_text())[ours.stem]
    assert scored["output"] == pytest.approx(psnr(Image.open(ours), original))


@pytest.mark.parametrize("scheduler, precision", [("ddpm", "no"), ("euler", "fp16")])
def test_eval_images_are_upscaled_with_other_schedulers_and_in_float16(stage3, tmp_path, scheduler, precision):
    flags = {"validation_noise_scheduler": scheduler, "mixed_precision": precision, "validation_num_inference_steps": 3}
    assert stage3(max_train_steps=1, **flags) == 0
    scores = json.loads((tmp_path / "output" / "validation_images" / "step_1" / "psnr.json").read_text())
    assert all(score["output"] > 3 for score in scores.values())


def test_a_dry_run_tells_what_the_caches_will_take_and_the_memory(stage3, tmp_path, capfd):
    stage3.dataset(maximum_image_size=128, target_downsample_size=96)
    assert stage3(dry_run=True) == 0
    said = capfd.readouterr().out
    assert "activations" in said and "their VAE: a published one takes" in said and "one takes 1.4 GB" in said
    [told] = re.findall(r"([\d.]+) MB  latents of 14 images", said)
    assert stage3(**NO_PICTURES, max_train_steps=1) == 0
    taken = sum(path.stat().st_size for path in (tmp_path / "cache" / "latents").rglob("*.safetensors"))
    assert float(told) == round(taken / 1e6, 1) and taken == pytest.approx(14 * 11 * 16 * 16 * 2, rel=0.03)


def test_a_pipeline_that_takes_less_noise_is_neither_trained_nor_judged_with_more(stage3, tiny_stage3, tmp_path, capfd):
    model = shutil.copytree(tiny_stage3, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    for level, words in ((10, "10 noise levels"), (1001, "max_noise_level 1001, which is no number"), ("a", "'a'")):
        (model / "model_index.json").write_text(json.dumps(index | {"max_noise_level": level}))
        assert stage3(pretrained_model_name_or_path=model) == 2
        assert words in capfd.readouterr().err


@pytest.mark.parametrize("flags, words", [
    ({"resolution": 96}, "needs a multiple of 64 pixels: type 64 or 128"),
    ({"validation_resolution": "96"}, "instead of 96 type 64 or 128"),
    ({"pretrained_model_name_or_path": None, "resolution": 256},
     "makes images of 512 pixels and more out of a quarter of that: type 512"),
    ({"validation_noise_level": 351}, "knows noise levels up to 350: type 20"),
    ({"train_text_encoder": True}, "is told what to draw by the low-resolution image, and little by its captions"),
    ({"export": "kohya"}, "ComfyUI and A1111 have no DeepFloyd IF stage III"),
    ({**FULL, "controlnet": True}, "no ControlNet can be made for DeepFloyd IF stage III: the low-res"),
    ({"pretrained_model_name_or_path": "x4-upscaler-ema.safetensors"}, "a single file, but a pipeline of DeepFloyd IF"),
    ({"train_variance": False}, "predicts no variance"),
    ({"prediction_type": "epsilon"}, "predicts v_prediction: remove it"),
    ({"lora_rank_pattern": "add_k_proj=8"}, "found the layer 'add_k_proj'"),
])
def test_what_it_cannot_do_is_refused_in_words(stage3, capsys, flags, words):
    assert stage3(**flags) == 2
    assert words in capsys.readouterr().err


def test_weights_of_other_models_are_called_what_they_are(stage3, tiny_stage2, tiny_sd, tiny_stage3, capsys):
    for model, name in ((tiny_stage2, "DeepFloyd IF stage II"), (tiny_sd, "Stable Diffusion 1.x/2.x")):
        assert stage3(pretrained_model_name_or_path=model) == 2
        assert f"they are {name}: set MODEL_TYPE" in capsys.readouterr().err
    for model_type in ("lora", "deepfloyd-stage2-lora"):
        assert stage3(model_type=model_type, num_eval_images=None, resolution=512, validation_resolution=512) == 2
        said = capsys.readouterr().err
        assert "they are DeepFloyd IF stage III: set MODEL_TYPE (--model_type) to deepfloyd-stage3" in said


def test_images_below_the_trained_size_are_left_out(stage3, tmp_path, capfd):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, edge in (("small", 48), ("large", 80)):
        Image.new("RGB", (edge, edge), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a red square")
    stage3.dataset(instance_data_dir=str(folder))
    assert stage3(dry_run=True) == 0
    assert "48x48 is smaller than its training size 64x64" in capfd.readouterr().out
