"""Adapters in the format of ComfyUI and A1111: diffusers' own reader of it makes the same model of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from helpers.config.families import DEEPFLOYD_I, LORA_TARGETS
from helpers.models.facts import Origin, metadata, read_adapter_facts
from helpers.models.kohya import KOHYA_FILE, NotExportable, Scaling, describe, export, main, to_kohya
from helpers.models.lora import LORA_FILE

ORIGIN = Origin(
    base_model="someone/their-sd", family="sd", pipeline="StableDiffusionPipeline", prediction_type="epsilon",
    variance_type="fixed_small", caption_cleaning="none", token_length=77,
)
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
CONV = {"targets": "attention+conv"}
DORA = {"use_dora": True}
RSLORA = {"use_rslora": True}
RANKS = {"rank_pattern": {"to_q": 1, "attn2.to_k": 8, "conv1": 2}, "alpha_pattern": {"to_q": 3, "attn2.to_k": 1.5}}
TEXT_RANKS = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 2}}
KINDS = {
    "lora": {}, "conv": CONV, "rslora": RSLORA, "ranks": RANKS | CONV, "rslora ranks": RSLORA | RANKS | CONV,
    "dora": DORA, "dora conv": DORA | CONV, "dora rslora ranks": DORA | RSLORA | RANKS | CONV,
}


def tiny_unet(width: int = 768) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, attention_head_dim=2,
        cross_attention_dim=width, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def tiny_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )).eval()


def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None, text_encoder=tiny_text_encoder(), tokenizer=None, unet=tiny_unet(), scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def outputs(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 768, generator=generator)
    with torch.no_grad():
        texts = text_encoder(torch.arange(14).reshape(2, 7)).last_hidden_state
        return unet(x, torch.tensor([3, 700]), text).sample, texts


def adapted(model: torch.nn.Module, targets: tuple[str, ...], **kind: object) -> torch.nn.Module:
    """The model with an adapter of rank 4 and alpha 6, none of whose parameters is what it starts as."""
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **kind))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def layers_of(model: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """Save the adapters of a UNet and a text encoder as this project does; returns the file."""

    def saved(
        unet: torch.nn.Module, text_encoder: torch.nn.Module | None = None, origin: Origin = ORIGIN
    ) -> Path:
        models = {"unet": unet} | ({"text_encoder": text_encoder} if text_encoder else {})
        config = {f"{part}.{name}": value for part, model in models.items()
                  for name, value in model.peft_config["default"].to_dict().items()}
        own = metadata(origin, kind="lora", rank=4, alpha=6.0, targets="attention")

        def write(weights: dict[str, torch.Tensor], path: str) -> None:
            save_file(weights, path, {LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=sorted)} | own)

        layers = {f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in models.items()}
        StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, save_function=write)
        return tmp_path / LORA_FILE

    return saved


def read_by_diffusers(path: Path) -> StableDiffusionPipeline:
    """A pipeline with the adapter in a file of that format."""
    reader = pipeline()
    state = load_file(path)
    if not any(name.endswith("dora_scale") for name in state):
        reader.load_lora_weights(path)
        return reader
    # The pipeline's loader leaves DoRA out, though its conversion knows it; peft has the magnitudes in other shapes.
    state, alphas = _convert_non_diffusers_lora_to_diffusers(state)
    for name in [name for name in state if "lora_magnitude_vector" in name]:
        scale = state[name]
        state[name] = scale.flatten() if scale.ndim == 2 else scale.transpose(0, 1)
    reader.load_lora_into_unet(state, alphas, reader.unet, _pipeline=reader)
    reader.load_lora_into_text_encoder(state, alphas, reader.text_encoder, _pipeline=reader)
    return reader


@pytest.mark.parametrize("with_text_encoder", [False, True], ids=["unet", "both"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_diffusers_makes_the_trained_model_of_the_exported_file(saved, tmp_path, kind, with_text_encoder):
    config = dict(KINDS[kind])
    unet = adapted(tiny_unet(), LORA_TARGETS[config.pop("targets", "attention")], **config)
    config |= TEXT_RANKS if "rank_pattern" in config else {}
    text_encoder = adapted(tiny_text_encoder(), CLIP_ATTENTION, **config) if with_text_encoder else None
    read = read_by_diffusers(export(saved(unet, text_encoder), tmp_path / KOHYA_FILE))
    plain = outputs(tiny_unet(), tiny_text_encoder())
    trained, found = outputs(unet, text_encoder or tiny_text_encoder()), outputs(read.unet, read.text_encoder)
    torch.testing.assert_close(found, trained, atol=1e-5, rtol=1e-5)
    assert (trained[0] - plain[0]).abs().max() > 1e-2
    assert ((trained[1] - plain[1]).abs().max() > 1e-2) == with_text_encoder


@pytest.mark.parametrize("kind", ["conv", "dora rslora ranks"])
def test_each_adapted_layer_is_there_once(saved, tmp_path, kind):
    config = dict(KINDS[kind])
    unet = adapted(tiny_unet(), LORA_TARGETS[config.pop("targets")], **config)
    names = list(load_file(export(saved(unet), tmp_path / KOHYA_FILE)))
    kinds = ["alpha", "lora_down.weight", "lora_up.weight"] + ["dora_scale"] * ("use_dora" in config)
    layers = [f"lora_unet_{name.replace('.', '_')}" for name in layers_of(unet)]
    assert sorted(names) == sorted(f"{layer}.{kind}" for layer in layers for kind in kinds)
    for target in LORA_TARGETS["attention+conv"]:
        if not target.startswith("add_"):  # IF's own
            assert any(layer.endswith(target.replace(".", "_")) for layer in layers), target


def test_the_unets_names_are_those_that_diffusers_gives(saved, tmp_path):
    """All but alpha, for which diffusers' own conversion always says the rank."""
    file = saved(adapted(tiny_unet(), LORA_TARGETS["attention+conv"]))
    ours, theirs = load_file(export(file, tmp_path / KOHYA_FILE)), convert_state_dict_to_kohya(load_file(file))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith("alpha"))
    assert {(ours[name].item(), theirs[name].item()) for name in ours if name.endswith("alpha")} == {(6, 4)}


BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"


@pytest.mark.parametrize("layer, name", [
    (f"unet.{BLOCK}.attn1.to_q", "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"),
    (f"unet.{BLOCK}.attn2.to_out.0", "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0"),
    (f"unet.{BLOCK}.ff.net.0.proj", "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj"),
    ("unet.mid_block.resnets.0.time_emb_proj", "lora_unet_mid_block_resnets_0_time_emb_proj"),
    ("unet.up_blocks.3.resnets.2.conv_shortcut", "lora_unet_up_blocks_3_resnets_2_conv_shortcut"),
    ("text_encoder.encoder.layers.0.self_attn.q_proj", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
    ("text_encoder.text_model.encoder.layers.9.mlp.fc1", "lora_te_text_model_encoder_layers_9_mlp_fc1"),
])
@pytest.mark.parametrize("down, up, scale", [
    ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    ("lora.down.weight", "lora.up.weight", "lora_magnitude_vector.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "lora_magnitude_vector"),
])
def test_names_of_peft_and_of_diffusers_become_those_that_the_tools_know(layer, name, down, up, scale):
    state = {down: torch.ones(2, 3), up: torch.ones(5, 2), scale: torch.ones(5)}
    scalings = {"unet": Scaling(8.0), "text_encoder": Scaling(8.0)}
    tensors = to_kohya({f"{layer}.{ending}": tensor for ending, tensor in state.items()}, scalings)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{name}.alpha": (), f"{name}.lora_down.weight": (2, 3), f"{name}.lora_up.weight": (5, 2),
        f"{name}.dora_scale": (5, 1),
    }


@pytest.mark.parametrize("layer, expected", [("mid.to_q", 3), ("mid.attn2.to_k", 1.5), ("mid.attn1.to_k", 6)])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_over_rank_is_the_scale_that_was_trained(layer, expected, rslora):
    scaling = Scaling(6, RANKS["alpha_pattern"], rslora)
    assert scaling.alpha(layer, 16) / 16 == expected / (4 if rslora else 16)


@pytest.mark.parametrize("kind", ["dora conv", "dora rslora ranks"])
def test_doras_scale_is_the_norm_of_each_outputs_weights(saved, tmp_path, kind):
    """W' = dora_scale V / ||V||, with V the weight and its LoRA: from the exported file and the base alone."""
    config = dict(KINDS[kind])
    unet = adapted(tiny_unet(), LORA_TARGETS[config.pop("targets")], **config)
    tensors = load_file(export(saved(unet), tmp_path / KOHYA_FILE))
    for name, layer in layers_of(unet).items():
        alpha, down, up, scale = (
            tensors[f"lora_unet_{name.replace('.', '_')}.{kind}"]
            for kind in ("alpha", "lora_down.weight", "lora_up.weight", "dora_scale")
        )
        weight = layer.base_layer.weight.detach()
        assert scale.shape == (len(weight), *[1] * (weight.ndim - 1))
        v = weight + (alpha / len(down) * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        norm = v.flatten(1).norm(dim=1).reshape(scale.shape)
        layer.merge()
        torch.testing.assert_close(scale * v / norm, layer.base_layer.weight.detach(), atol=1e-5, rtol=1e-5)


def test_bfloat16_is_kept_where_nothing_is_changed_and_loses_nothing_where_something_is():
    state = {
        f"unet.{layer}.lora_{matrix}.weight": torch.randn(2, 2).bfloat16() for layer in "abc" for matrix in "AB"
    }
    tensors = to_kohya(state, {"unet": Scaling(6, {"c": 1})})
    assert [tensors[f"lora_unet_{layer}.alpha"].item() for layer in "abc"] == [6, 6, 6]
    dtypes = [tensors[f"lora_unet_{layer}.lora_up.weight"].dtype for layer in "abc"]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(tensors["lora_unet_c.lora_up.weight"], state["unet.c.lora_B.weight"].float() / 6)


@pytest.mark.parametrize("width, prediction_type, said", [
    (768, "epsilon", {"ss_v2": "False", "ss_base_model_version": "sd_v1"}),
    (1024, "epsilon", {"ss_v2": "True", "ss_base_model_version": "sd_v2"}),
    (1024, "v_prediction", {"ss_v2": "True", "ss_base_model_version": "sd_v2_v"}),
    (64, "epsilon", {}),
])
def test_the_file_says_what_it_is_for(saved, tmp_path, width, prediction_type, said):
    origin = replace(ORIGIN, prediction_type=prediction_type)
    target = export(saved(adapted(tiny_unet(width), LORA_TARGETS["attention"]), origin=origin), tmp_path / KOHYA_FILE)
    with safe_open(target, framework="pt") as file:
        stored = file.metadata()
    own = {name: value for name, value in stored.items() if name.startswith("ss_")}
    assert own == {"ss_network_dim": "4", "ss_network_alpha": "6", **said}
    assert read_adapter_facts(target) == read_adapter_facts(tmp_path / LORA_FILE)
    assert LORA_ADAPTER_METADATA_KEY not in stored  # beside alphas diffusers refuses it


@pytest.mark.parametrize("tensors, prediction_type, said", [
    ({"lora_unet_a_attn2_to_k.lora_down.weight": torch.ones(4, 1024)}, None, {"ss_network_dim": "4", "ss_v2": "True"}),
    ({"a.lora_down.weight": torch.ones(4, 9), "b.lora_down.weight": torch.ones(2, 9)}, "epsilon", {}),
    ({"a.alpha": torch.tensor(4 * 2**0.5)}, "epsilon", {"ss_network_alpha": "5.65685"}),
])
def test_what_is_not_known_or_not_one_for_all_layers_is_not_said(tensors, prediction_type, said):
    assert describe(tensors, prediction_type) == said


CONFIG = {"unet.lora_alpha": 6.0}
MATRICES = {f"unet.mid.to_q.lora_{matrix}.weight": torch.ones(2, 2) for matrix in "AB"}


@pytest.mark.parametrize("tensors, config, own, words", [
    (MATRICES, None, {}, "no lora_adapter_metadata, which tells its alpha"),
    (MATRICES, {"text_encoder.lora_alpha": 6.0}, {}, "does not tell the alpha of its unet"),
    (MATRICES, {"unet.lora_alpha": "much"}, {}, "cannot be read"),
    (MATRICES, CONFIG | {"unet.alpha_pattern": {"(": 1}}, {}, "cannot be read"),
    (MATRICES, [], {}, "cannot be read"),
    ({"unet.mid.to_q.lora_A.weight": torch.ones(2, 2)}, CONFIG, {}, "unet.mid.to_q lacks one of its two matrices"),
    (MATRICES | {"unet.mid.to_q.bias": torch.ones(2)}, CONFIG, {}, "found 'unet.mid.to_q.bias', which is no part of"),
    (MATRICES | {"text_encoder_2.a.lora_A.weight": torch.ones(2, 2)}, CONFIG, {}, "found 'text_encoder_2.a.lora_A"),
    (MATRICES, CONFIG, {"kind": "bitfit"}, "it has the biases of a BitFit"),
    (MATRICES, CONFIG, {"family": "deepfloyd-ii"}, "ComfyUI and A1111 have no DeepFloyd IF stage II"),
    (MATRICES, CONFIG, {"rank": "many"}, "has damaged facts of its own"),
])
def test_what_has_no_equal_is_refused_in_words(tmp_path, capsys, tensors, config, own, words):
    facts = metadata(ORIGIN, kind="lora", rank=2, alpha=6.0, targets="attention")
    facts |= {f"floydtuner.{name}": value for name, value in own.items()}
    facts |= {} if config is None else {LORA_ADAPTER_METADATA_KEY: json.dumps(config)}
    save_file(tensors, tmp_path / LORA_FILE, facts)
    with pytest.raises(NotExportable):
        export(tmp_path / LORA_FILE, tmp_path / KOHYA_FILE)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / KOHYA_FILE).exists()


@pytest.mark.parametrize("name, out, written", [
    ("", None, KOHYA_FILE), (LORA_FILE, None, KOHYA_FILE), ("", "mine.safetensors", "mine.safetensors"),
    ("", "other", f"other/{KOHYA_FILE}"),
])
def test_the_command_exports_what_was_trained_before(saved, tmp_path, capsys, name, out, written):
    saved(adapted(tiny_unet(), ("to_q",)))
    (tmp_path / "other").mkdir()
    assert main([str(tmp_path / name)] + ([str(tmp_path / out)] if out else [])) == 0
    assert f"{tmp_path / written}, for ComfyUI and A1111" in capsys.readouterr().out
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in load_file(tmp_path / written)


@pytest.mark.parametrize("out, words", [
    (LORA_FILE, "is the adapter itself"),
    ("mine.ckpt", "ends in .safetensors"),
    ("no/such.safetensors", "No such file"),
])
def test_the_command_refuses_a_target_that_would_not_do(saved, tmp_path, capsys, out, words):
    before = saved(adapted(tiny_unet(), ("to_q",))).read_bytes()
    assert main([str(tmp_path), str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / LORA_FILE).read_bytes() == before


def test_the_command_tells_where_nothing_is(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "there is no adapter" in capsys.readouterr().err
    (tmp_path / LORA_FILE).write_bytes(b"torn")
    assert main([str(tmp_path)]) == 2
    assert "is no whole safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    ({}, "for ComfyUI and A1111"),
    ({"use_dora": True}, "for ComfyUI, which applies a DoRA nearly as it was trained; not for A1111"),
])
def test_a_training_writes_both_files(trainer, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setitem(vars(DEEPFLOYD_I), "kohya", True)
    output = tmp_path / "output"
    assert trainer(export="kohya", lora_alpha=2, **flags) == 0
    assert f"{KOHYA_FILE}    the same, {said}" in capsys.readouterr().out
    own, theirs = load_file(output / LORA_FILE), load_file(output / KOHYA_FILE)
    assert len(own) == sum(not name.endswith("alpha") for name in theirs)
    assert {tensor.item() for name, tensor in theirs.items() if name.endswith("alpha")} == {2}
    (output / KOHYA_FILE).unlink()
    assert trainer(lora_alpha=2, **flags) == 0
    assert not (output / KOHYA_FILE).exists()
