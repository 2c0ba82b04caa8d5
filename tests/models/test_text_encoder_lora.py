"""Adapters of UNet and text encoder in one file: what diffusers and other tools make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.models import kohya, loading
from helpers.models.adapters import parameter_groups, trainable_parameters
from helpers.models.denoiser import Denoiser
from helpers.models.facts import Origin, origin_of, read_adapter_facts
from helpers.models.families import SPECS
from helpers.models.lora import LORA_FILE, LoRA
from helpers.models.parts import LossSettings
from helpers.models.results import AdapterError, load_adapter

SPEC = SPECS["sd"]
KINDS = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True}, "both": {"dora": True, "rslora": True}}
INPUTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])


@pytest.fixture
def origin(tiny_sd) -> Origin:
    return origin_of(str(tiny_sd), "sd", SPEC, tiny_sd, LossSettings())


@pytest.fixture
def lora(origin) -> Callable[..., LoRA]:
    return lambda **kind: LoRA(4, 6, 0.0, "attention", origin=origin, **{"text_encoder_rank": 2, **kind})


@pytest.fixture
def both(tiny_sd) -> Callable[..., Denoiser]:
    def both(dtype: torch.dtype = torch.float32) -> Denoiser:
        return loading.load(SPEC, tiny_sd, dtype, with_text_encoder=True).denoiser

    return both


@pytest.fixture
def tokens(tiny_sd) -> torch.Tensor:
    return SPEC.text.tokenizer(tiny_sd)(["a red circle", ""]).input_ids


def moved(denoiser: Denoiser) -> Denoiser:
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_parameters(denoiser):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return denoiser.eval()


def pipeline_with(base: Path, file: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return pipeline


@torch.no_grad()
def assert_same(pipeline: StableDiffusionPipeline, denoiser: Denoiser, tokens: torch.Tensor) -> None:
    text = pipeline.text_encoder(tokens).last_hidden_state
    torch.testing.assert_close(text, denoiser.embed(tokens), atol=0, rtol=0)
    torch.testing.assert_close(pipeline.unet(*INPUTS, text).sample, denoiser(*INPUTS, tokens), atol=0, rtol=0)


@pytest.mark.parametrize("kind", [
    *KINDS.values(), {"text_encoder_alpha": 5}, {"ranks": {"to_q": 8}}, {"rslora": True, "text_encoder_rank": 8},
], ids=[*KINDS, "alpha", "ranks", "rslora rank"])
def test_a_saved_adapter_gives_the_same_text_and_the_same_output_in_diffusers(
    both, tiny_sd, lora, tokens, tmp_path, kind
):
    denoiser = both()
    with torch.no_grad():
        plain = denoiser.eval().embed(tokens)
    lora(**kind).attach(denoiser, torch.float32)
    lora(**kind).save_weights(moved(denoiser), tmp_path)
    assert_same(pipeline_with(tiny_sd, tmp_path / LORA_FILE), denoiser, tokens)
    assert (denoiser.embed(tokens) - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", [
    {"dora": True, "rslora": True, "ranks": {"to_q": 8}}, {"text_encoder_alpha": 5},
], ids=["ranks both", "alpha"])
@pytest.mark.parametrize("as_kohya", [False, True], ids=["diffusers", "kohya"])
def test_load_adapter_loads_both_parts_or_refuses(both, tiny_sd, lora, tokens, tmp_path, kind, as_kohya):
    denoiser = both()
    lora(**kind).attach(denoiser, torch.float32)
    lora(**kind).save_weights(moved(denoiser), tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, requires_safety_checker=False)
    file = kohya.export(tmp_path / LORA_FILE, tmp_path / "kohya.safetensors") if as_kohya else tmp_path
    if as_kohya and "dora" in kind:
        with pytest.raises(AdapterError, match="DoRA's magnitudes, which diffusers leaves out"):
            load_adapter(pipeline, file)
        return
    load_adapter(pipeline, file)
    assert_same(pipeline, denoiser, tokens)
    without = StableDiffusionPipeline(**pipeline.components | {"text_encoder": None}, requires_safety_checker=False)
    with pytest.raises(AdapterError, match="text encoder"):
        load_adapter(without, file, "again")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("frozen, trained", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
])
def test_training_starts_at_the_model_itself_and_comes_back_bit_for_bit(
    both, lora, tokens, tmp_path, kind, frozen, trained
):
    denoiser, again = both(frozen), both(frozen)

    def output() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=frozen != trained), torch.no_grad():
            return denoiser.eval()(*INPUTS, tokens)

    plain = output()
    lora(**kind).attach(denoiser, trained)
    assert torch.equal(output(), plain)
    lora(**kind).save_weights(moved(denoiser), tmp_path)
    lora(**kind).attach(again, trained)
    lora(**kind).load_weights(again, tmp_path)
    pairs = list(zip(trainable_parameters(denoiser), trainable_parameters(again), strict=True))
    assert all(one.dtype == trained and torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_exported_for_other_tools_both_parts_stay_what_they_were(both, tiny_sd, lora, tokens, tmp_path, kind):
    denoiser = both()
    lora(**KINDS[kind]).attach(denoiser, torch.float32)
    lora(**KINDS[kind]).save_weights(moved(denoiser), tmp_path)
    exported = kohya.export(tmp_path / LORA_FILE, tmp_path / kohya.KOHYA_FILE)
    names = load_file(exported)
    assert "lora_te_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight" in names
    with torch.no_grad():
        pipeline = pipeline_with(tiny_sd, exported)
        text = pipeline.text_encoder(tokens).last_hidden_state
        torch.testing.assert_close(text, denoiser.embed(tokens), atol=1e-5, rtol=1e-5)
        output = denoiser(*INPUTS, tokens)
        torch.testing.assert_close(pipeline.unet(*INPUTS, text).sample, output, atol=1e-5, rtol=1e-5)


def test_exported_magnitudes_of_both_parts_keep_their_values(both, lora, tmp_path):
    denoiser = both()
    lora(dora=True).attach(denoiser, torch.float32)
    lora(dora=True).save_weights(moved(denoiser), tmp_path)
    exported = load_file(kohya.export(tmp_path / LORA_FILE, tmp_path / kohya.KOHYA_FILE))
    layer = denoiser.text_encoder.encoder.layers[1].self_attn.q_proj
    scale = exported["lora_te_text_model_encoder_layers_1_self_attn_q_proj.dora_scale"]
    assert torch.equal(scale[:, 0], layer.lora_magnitude_vector["default"].weight)


def test_every_attention_of_the_text_encoder_has_an_adapter_and_nothing_else_is_trained(both, lora):
    denoiser = both()
    lora().attach(denoiser, torch.float32)
    layers = [layer for layer in denoiser.text_encoder.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 4 * len(denoiser.text_encoder.encoder.layers)
    assert {layer.r["default"] for layer in layers} == {2}
    unet, texts = parameter_groups(denoiser)
    assert len(texts) == 2 * len(layers)
    assert {id(one) for one in unet + texts} == {id(one) for one in trainable_parameters(denoiser)}
    assert all("lora_" in name for name, one in denoiser.named_parameters() if one.requires_grad)


@pytest.mark.parametrize("kind, scale", [
    ({}, 6 / 4), ({"rslora": True}, 6 / 2**0.5), ({"text_encoder_alpha": 5}, 5 / 2),
    ({"text_encoder_alpha": 5, "rslora": True}, 5 / 2**0.5),
])
def test_without_an_alpha_of_its_own_it_is_scaled_as_the_unets(both, lora, kind, scale):
    denoiser = both()
    lora(**kind).attach(denoiser, torch.float32)
    layer = denoiser.text_encoder.encoder.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scale)


def test_a_file_tells_that_a_text_encoder_is_in_it_and_names_no_path(both, lora, tiny_sd, tmp_path):
    denoiser = both()
    lora().attach(denoiser, torch.float32)
    lora().save_weights(denoiser, tmp_path)
    facts = read_adapter_facts(tmp_path / LORA_FILE)
    assert (facts.rank, facts.alpha, facts.text_encoder_rank, facts.text_encoder_alpha) == (4, 6, 2, 3)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        stored = file.metadata()
    config = json.loads(stored[LORA_ADAPTER_METADATA_KEY])
    assert (config["unet.r"], config["text_encoder.r"], config["text_encoder.lora_alpha"]) == (4, 2, 3)
    assert str(tiny_sd) not in "".join(stored.values())


def test_layers_have_the_names_that_older_transformers_and_other_tools_look_for(both, lora, tmp_path):
    denoiser = both()
    lora().attach(denoiser, torch.float32)
    lora().save_weights(denoiser, tmp_path)
    names = [name for name in load_file(tmp_path / LORA_FILE) if not name.startswith("unet.")]
    assert names and all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)


def test_of_the_unet_alone_nothing_is_said_of_a_text_encoder(lora, tiny_sd, tmp_path):
    denoiser = loading.load(SPEC, tiny_sd, torch.float32).denoiser
    lora(text_encoder_rank=None).attach(denoiser, torch.float32)
    lora(text_encoder_rank=None).save_weights(denoiser, tmp_path)
    facts = read_adapter_facts(tmp_path / LORA_FILE)
    assert (facts.text_encoder_rank, facts.text_encoder_alpha) == (None, None)
    assert all(name.startswith("unet.") for name in load_file(tmp_path / LORA_FILE))


@pytest.mark.parametrize("change", ["without the text encoder", "with a strange part", "another rank", "dora"])
def test_a_file_that_does_not_fit_is_refused(both, lora, tmp_path, change):
    denoiser, again = both(), both()
    lora().attach(denoiser, torch.float32)
    lora().save_weights(denoiser, tmp_path)
    state = load_file(tmp_path / LORA_FILE)
    if change == "without the text encoder":
        state = {name: one for name, one in state.items() if name.startswith("unet.")}
    elif change == "with a strange part":
        state["text_encoder_2.layer.lora_A.weight"] = torch.zeros(1)
    save_file(state, tmp_path / LORA_FILE)
    kind = {"another rank": {"text_encoder_rank": 3}, "dora": {"dora": True}}.get(change, {})
    lora(**kind).attach(again, torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="does not fit|size mismatch"):
        lora(**kind).load_weights(again, tmp_path)
