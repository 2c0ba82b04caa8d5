"""Stable Diffusion end to end: latents cached once, every kind of training, results that diffusers loads."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.caching.images import ImageCache
from helpers.models.facts import read_adapter_facts
from helpers.models.results import load_adapter
from helpers.training import loop
from helpers.training.step import training_loss
from helpers.validation.render import SHEET

ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture
def sd(trainer, tiny_sd, tmp_path, photos):
    """The trainer on the tiny Stable Diffusion, with images of 64 px."""
    data = tmp_path / "data.json"

    def run(**flags: object) -> int:
        flags = {
            "model_type": "lora",
            "pretrained_model_name_or_path": tiny_sd,
            "resolution": 64,
            "validation_resolution": "64",
            "data_backend_config": data,
            **flags,
        }
        code = trainer(**flags)
        drawn = Path(flags.get("output_dir", tmp_path / "output")) / "validation_images"
        assert all((step / SHEET).exists() for step in drawn.glob("step_*")), "a validation failed"
        return code

    def dataset(**keys: object) -> None:
        entry = {"id": "photos", "instance_data_dir": str(photos), "caption_strategy": "textfile", **keys}
        data.write_text(json.dumps([entry]), "utf-8")

    run.dataset = dataset
    dataset()
    return run


@pytest.fixture
def predicting_v(tmp_path) -> Path:
    """A model of the architecture of 2.x that predicts v."""
    from examples.demo.make_sd import make

    make(tmp_path / "v", prediction_type="v_prediction", version=2)
    return tmp_path / "v"


def pipeline_of(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def latents_of(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a red circle", height=64, width=64, num_inference_steps=2, generator=generator, output_type="latent")
    return made.images


@pytest.mark.parametrize("flags", [{}, {"use_dora": True}, {"lora_targets": "attention+conv", "use_rslora": True}],
                         ids=["lora", "dora", "conv"])
def test_an_adapter_loads_in_diffusers_as_it_was_trained(sd, tmp_path, tiny_sd, monkeypatch, flags):
    seen = {}

    def remember(parts, denoiser, batch, generator):
        seen["unet"] = parts.unet
        return training_loss(parts, denoiser, batch, generator)

    monkeypatch.setattr(loop, "training_loss", remember)
    assert sd(learning_rate=1e-2, **flags) == 0
    facts = read_adapter_facts(tmp_path / "output" / ADAPTER)
    assert (facts.family, facts.pipeline, facts.prediction_type) == ("sd", "StableDiffusionPipeline", "epsilon")
    assert (facts.variance_type, facts.zero_terminal_snr, facts.caption_cleaning) == (None, False, "none")
    trained, loaded, base = (pipeline_of(tiny_sd) for _ in range(3))
    trained.unet = seen["unet"].eval()
    loaded.load_lora_weights(tmp_path / "output")
    torch.testing.assert_close(latents_of(loaded), latents_of(trained), rtol=1e-4, atol=1e-4)
    assert (latents_of(loaded) - latents_of(base)).abs().max() > 1e-2


@pytest.mark.parametrize("flags", [{}, {"use_bitfit": True}, {"use_ema": True}], ids=["full", "bitfit", "ema"])
def test_full_tuning_writes_a_pipeline_that_differs_in_the_unet_only(sd, tmp_path, tiny_sd, flags):
    assert sd(model_type="full", lora_rank=None, learning_rate=1e-3, **flags) == 0
    tuned, base = pipeline_of(tmp_path / "output" / "pipeline"), pipeline_of(tiny_sd)
    moved = {name: (tensor != base.unet.state_dict()[name]).any() for name, tensor in tuned.unet.state_dict().items()}
    assert all(moved[name] for name in moved if name.endswith(".bias"))
    assert ("use_bitfit" in flags) == any(not moved[name] for name in moved)
    for part in ("vae", "text_encoder"):
        one, two = getattr(tuned, part).state_dict(), getattr(base, part).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert type(tuned.scheduler) is type(base.scheduler) and latents_of(tuned).isfinite().all()


@pytest.mark.parametrize("flags", [
    {},
    {"use_dora": True, "lora_dropout": 0.2, "gradient_accumulation_steps": 2},
    {"model_type": "full", "lora_rank": None, "use_ema": True, "snr_gamma": 5, "noise_offset": 0.05},
    {"model_type": "full", "lora_rank": None, "use_bitfit": True, "timestep_bias_strategy": "later"},
], ids=["lora", "dora", "full", "bitfit"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(sd, tmp_path, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"learning_rate": 1e-3, "checkpointing_steps": 2, "max_train_steps": 4, **flags}
    assert sd(output_dir=whole, **common) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    assert sd(output_dir=parts, **common) == 0
    files = [path.relative_to(whole) for path in (whole / "checkpoint-4").rglob("*.safetensors")]
    assert len(files) == 2, "the state, and the weights"
    for file in files:
        one, two = load_file(whole / file), load_file(parts / file)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), file


def test_images_are_encoded_once_and_the_vae_is_gone_before_training(sd, tmp_path, monkeypatch):
    encode, encoded, alive = AutoencoderKL.encode, [], []

    def counted(self, images, **options):
        encoded.append(tuple(images.shape))
        return encode(self, images, **options)

    def look(*arguments):
        gc.collect()
        alive.append(sum(isinstance(thing, AutoencoderKL) for thing in gc.get_objects()))
        return training_loss(*arguments)

    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    monkeypatch.setattr(loop, "training_loss", look)
    assert sd(vae_batch_size=3) == 0
    assert [shape[0] for shape in encoded] == [3, 3, 3, 3, 2] and alive == [0, 0]
    assert (tmp_path / "cache" / "latents" / "photos").is_dir() and not (tmp_path / "cache" / "pixels").exists()
    assert sd(output_dir=tmp_path / "again", seed=5) == 0
    assert len(encoded) == 5, "another seed draws other noise, not other crops"


def test_a_latent_that_is_not_finite_ends_the_run_with_the_images_name(sd, tiny_sd, tmp_path, capsys):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(model / "vae")
    vae.quant_conv.bias.data[0] = torch.inf
    vae.save_pretrained(model / "vae")
    assert sd(pretrained_model_name_or_path=model) == 2
    said = capsys.readouterr().err
    assert "the VAE returned inf or NaN for" in said and str(tmp_path.parent) in said


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++"])
def test_validation_draws_with_every_scheduler(sd, tmp_path, scheduler):
    flags = {"validation_prompt": "a red circle", "validation_num_inference_steps": 3, "max_train_steps": 1}
    assert sd(validation_noise_scheduler=scheduler, validation_resolution="64,128x64", **flags) == 0
    step = tmp_path / "output" / "validation_images" / "step_1"
    assert {path.name: Image.open(path).size for path in step.glob("a_red*.png")} == {
        "a_red_circle_64x64.png": (64, 64), "a_red_circle_128x64.png": (128, 64),
    }


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_a_model_with_any_scheduler_of_diffusers_trains_and_is_exported_with_it(sd, tmp_path, tiny_sd, kind):
    model, pipeline = tmp_path / "model", pipeline_of(tiny_sd)
    pipeline.scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline.save_pretrained(model)
    flags = {"model_type": "full", "lora_rank": None, "max_train_steps": 1, "validation_prompt": "a red circle"}
    assert sd(pretrained_model_name_or_path=model, **flags) == 0
    assert (tmp_path / "output" / "validation_images" / "step_1" / "sheet.png").exists()
    tuned = pipeline_of(tmp_path / "output" / "pipeline")
    assert type(tuned.scheduler) is kind and latents_of(tuned).isfinite().all()


@pytest.mark.parametrize("flags", [{}, {"train_text_encoder": True}, {"model_type": "full", "lora_rank": None}],
                         ids=["lora", "text encoder", "full"])
def test_validation_draws_in_float16_what_it_draws_in_float32(sd, tmp_path, flags):
    flags = {"validation_prompt": "a red circle", "validation_num_inference_steps": 5, "max_train_steps": 1, **flags}
    pictures = []
    for precision in ("no", "fp16"):
        assert sd(mixed_precision=precision, output_dir=tmp_path / precision, **flags) == 0
        path = tmp_path / precision / "validation_images" / "step_0" / "a_red_circle_64x64.png"
        pictures.append(np.asarray(Image.open(path), int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 2


def test_a_validation_picture_is_that_of_diffusers_own_pipeline(sd, tmp_path, tiny_sd):
    flags = {"validation_prompt": "a red circle", "validation_guidance": 4, "validation_guidance_rescale": 0.5}
    assert sd(max_train_steps=1, validation_noise_scheduler="euler", validation_seed=3, **flags) == 0
    ours = Image.open(tmp_path / "output" / "validation_images" / "step_0" / "a_red_circle_64x64.png")
    pipeline = pipeline_of(tiny_sd)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        "a red circle", negative_prompt="", height=64, width=64, num_inference_steps=2, guidance_scale=4,
        guidance_rescale=0.5, generator=torch.Generator().manual_seed(3),
    ).images[0]
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 8, "bfloat16 embeddings move a value by a few levels at the most"
    assert difference.mean() < 1


@pytest.mark.parametrize("megapixels", [0.02, 0.05])
def test_images_of_many_aspects_go_into_buckets_of_one_area(sd, tmp_path, capfd, megapixels):
    sd.dataset(crop_aspect="preserve", resolution=megapixels, resolution_type="area")
    assert sd(pure_bf16=True, mixed_precision="bf16", optimizer="adamw_bf16", gradient_checkpointing=True) == 0
    [line] = [line for line in capfd.readouterr().out.splitlines() if "buckets:" in line]
    sizes = [tuple(map(int, word.split("x"))) for word in line.split() if "x" in word]
    assert sizes and all(edge % 64 == 0 for size in sizes for edge in size)


def test_zero_terminal_snr_reaches_betas_pictures_and_result(sd, tmp_path, predicting_v, monkeypatch):
    schedules = []

    def remember(parts, *rest):
        schedules.append(parts.schedule)
        return training_loss(parts, *rest)

    monkeypatch.setattr(loop, "training_loss", remember)
    flags = {"pretrained_model_name_or_path": predicting_v, "validation_prompt": "a red circle", "max_train_steps": 1}
    assert sd(rescale_betas_zero_snr=True, **flags) == 0
    assert schedules[0].sqrt_alphas_cumprod[-1] == 0 and schedules[0].sqrt_alphas_cumprod[0] > 0.99
    facts = read_adapter_facts(tmp_path / "output" / ADAPTER)
    assert facts.zero_terminal_snr and facts.prediction_type == "v_prediction"
    sampled = pipeline_of(predicting_v)
    sampled.scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")  # which says nothing of clipping
    load_adapter(sampled, tmp_path / "output")
    assert type(sampled.scheduler) is DDIMScheduler and not sampled.scheduler.config.clip_sample
    saved = json.loads((tmp_path / "output" / "run.json").read_text())["options"]
    assert saved["validation_guidance_rescale"] == 0.7
    assert sd(rescale_betas_zero_snr=True, model_type="full", lora_rank=None, output_dir=tmp_path / "full", **flags) == 0
    tuned = pipeline_of(tmp_path / "full" / "pipeline")
    assert type(tuned.scheduler) is DDIMScheduler
    assert tuned.scheduler.config.rescale_betas_zero_snr and tuned.scheduler.config.timestep_spacing == "trailing"
    assert tuned.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("flags, words", [
    ({"prediction_type": "v_prediction"}, "found 'v_prediction', but the weights in"),
    ({"rescale_betas_zero_snr": True}, "the noise tells nothing of the image"),
    ({"model_type": "deepfloyd-lora"}, "they are Stable Diffusion 1.x/2.x: set MODEL_TYPE (--model_type) to lora or full"),
    ({"resolution": 96}, "needs a multiple of 64 pixels: type 64 or 128"),
    ({"num_eval_images": 2}, "is judged by its validation prompts"),
    ({"lora_rank_pattern": "add_k_proj=8"}, "found the layer 'add_k_proj'"),
])
def test_what_does_not_fit_the_weights_is_refused_before_anything_loads(sd, capsys, flags, words):
    assert sd(**flags) == 2
    assert words in capsys.readouterr().err


def test_a_stage_of_deepfloyd_is_refused(sd, tiny_model, capsys):
    assert sd(pretrained_model_name_or_path=tiny_model) == 2
    said = capsys.readouterr().err
    assert "they are DeepFloyd IF stage I: set MODEL_TYPE (--model_type) to deepfloyd-lora" in said


def test_a_vae_of_another_model_is_refused(sd, tiny_sd, tmp_path, capsys):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    config = json.loads((model / "vae" / "config.json").read_text())
    config["block_out_channels"] = config["block_out_channels"][:3]
    (model / "vae" / "config.json").write_text(json.dumps(config))
    assert sd(pretrained_model_name_or_path=model) == 2
    assert "makes 4 channels, 4 times smaller than the image" in capsys.readouterr().err


@pytest.mark.parametrize("file, lacking, what", [
    ("unet/diffusion_pytorch_model", "conv_out", "the UNet or a scheduler"),
    ("vae/diffusion_pytorch_model", "encoder.conv_in", "the VAE"),
    ("text_encoder/model", "self_attn.q_proj", "the text encoder or its tokenizer"),
])
def test_weights_that_are_in_no_file_are_not_made_up(sd, tiny_sd, tmp_path, capsys, file, lacking, what):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    weights = load_file(model / f"{file}.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lacking not in name}
    save_file(kept, model / f"{file}.safetensors", {"format": "pt"})
    assert sd(pretrained_model_name_or_path=model) == 2
    said = capsys.readouterr().err
    assert f"{what} in {model} cannot be loaded" in said
    assert f"{len(weights) - len(kept)} of its weights are in no file, such as" in said and lacking in said


def test_captions_that_clip_cuts_are_told(sd, tmp_path, capfd):
    sd.dataset(caption_strategy="instanceprompt", instance_prompt="a photo of a red circle " * 20)
    assert sd(max_train_steps=1) == 0
    said = "".join(capfd.readouterr())
    assert "1 captions have more than the 77 tokens that are read" in said


@pytest.mark.parametrize("resolution, told", [(128, False), (64, True)])
def test_another_size_than_the_weights_were_made_for_is_told(sd, capsys, resolution, told):
    assert sd(resolution=resolution, dry_run=True) == 0
    said = "the weights were trained at 128 pixels, and are trained at 64 here" in capsys.readouterr().out
    assert said == told


def test_a_check_tells_what_latents_take(sd, capsys):
    assert sd(check="table") == 0
    said = capsys.readouterr().out
    assert "0.0 MB of latents" in said and "then the VAE encodes the images" in said


def test_a_dry_run_tells_memory_and_space_of_latents(sd, capsys, monkeypatch):
    monkeypatch.setattr(ImageCache, "build", None)
    assert sd(dry_run=True) == 0
    said = capsys.readouterr().out
    assert "latents of 14 images" in said and "Memory needed for a batch of 2 at 64x64" in said
