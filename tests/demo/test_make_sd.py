"""The tiny Stable Diffusion is one that diffusers and transformers load and run like a real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from examples.demo.make_sd import make
from examples.demo.vocabulary import words


def load(folder) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_sd) -> StableDiffusionPipeline:
    return load(tiny_sd)


@pytest.mark.parametrize("version, prediction_type", [(1, "epsilon"), (2, "v_prediction")])
def test_each_version_draws_from_its_folder_and_has_the_prediction_type_asked_for(tmp_path, version, prediction_type):
    make(tmp_path, prediction_type=prediction_type, version=version)
    pipeline = load(tmp_path)
    assert pipeline.scheduler.config.prediction_type == prediction_type
    assert pipeline.unet.config.use_linear_projection == (version == 2)
    picture = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (128, 128, 3) and np.isfinite(picture).all()


def test_it_is_noised_as_stable_diffusion_1_5_is(pipeline):
    """Its first and last signal-to-noise ratios, as published code and papers give them."""
    kept = pipeline.scheduler.alphas_cumprod
    assert kept[0].item() == pytest.approx(0.99915) and kept[-1].item() == pytest.approx(0.00466, abs=1e-5)
    pipeline.scheduler.set_timesteps(50)
    assert pipeline.scheduler.timesteps[-1] == 1 and not pipeline.scheduler.config.clip_sample


def test_the_seed_gives_the_weights(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, seed)
        weights.append(load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"))
    a, b, c = weights
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_the_vae_shrinks_by_8_at_any_multiple_of_8(pipeline):
    with torch.no_grad():
        latents = pipeline.vae.encode(torch.zeros(1, 3, 72, 40)).latent_dist.mode()
        assert latents.shape == (1, 4, 9, 5) and pipeline.vae_scale_factor == 8
        assert pipeline.vae.decode(latents).sample.shape == (1, 3, 72, 40)


def test_words_of_captions_are_one_token_each_and_unknown_ones_fall_apart(pipeline):
    tokenizer = pipeline.tokenizer
    assert all(len(tokenizer(word).input_ids) == 3 for word in words())
    caption = "a photo of a Purple heart, sks"
    assert tokenizer.tokenize(caption) == [
        f"{word}</w>" for word in ("a", "photo", "of", "a", "purple", "heart", ",", "sks")
    ]
    assert "".join(tokenizer.tokenize("żubr zebra 64")) == "Å¼ubr</w>zebra</w>6</w>4</w>"
    assert tokenizer.decode(tokenizer("xylophone").input_ids, skip_special_tokens=True) == "xylophone"


@pytest.mark.parametrize("version, padding", [(1, "<|endoftext|>"), (2, "!")])
def test_a_caption_is_padded_and_cut_to_77_tokens(tmp_path, version, padding):
    make(tmp_path, version=version)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    short, long = tokenizer(["red circle", "red " * 90], padding="max_length", truncation=True).input_ids
    start, end, fill = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>", padding])
    assert len(short) == len(long) == 77
    assert (short[0], short[3], set(short[4:])) == (start, end, {fill})
    assert (long[0], long[-1]) == (start, end)


def test_its_vocabulary_and_merges_are_all_that_the_tokenizer_needs(tiny_sd, pipeline, tmp_path):
    """As in the folders that Stable Diffusion was published in."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_sd / "tokenizer" / name).read_bytes())
    captions = ["a photo of a purple heart", "zebras, 64!"]
    assert CLIPTokenizer.from_pretrained(tmp_path)(captions) == pipeline.tokenizer(captions)


def test_a_word_changes_the_embedding_where_it_stands(pipeline):
    """As much as words do that have nothing in common: the UNet must be able to tell them apart."""
    captions = ["a red circle", "a blue circle"]
    ids = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = pipeline.text_encoder(ids)[0]
    differs = (embeds[0] - embeds[1]).square().mean(-1).sqrt()
    assert differs[2] > 1 and differs[:2].max() == 0 and differs[3:].max() < 0.5
