"""LoRA, DoRA and rsLoRA: what they start as, and what diffusers makes of their files."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.config.families import ATTENTION, CONVOLUTIONS, LORA_TARGETS
from helpers.models.denoiser import Denoiser
from helpers.models.facts import read_adapter_facts
from helpers.models.lora import LORA_FILE, LoRA

KINDS = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True}, "both": {"dora": True, "rslora": True}}
RANKS = {"to_q": 1, "add_k_proj": 8}


@pytest.fixture
def lora(origin):
    return lambda targets="attention", alpha=4, **kind: LoRA(2, alpha, 0.0, targets, origin=origin, **kind)


@pytest.mark.parametrize("targets", sorted(LORA_TARGETS))
@pytest.mark.parametrize(
    "kind",
    [*KINDS.values(), {"ranks": RANKS}, {"rslora": True, "ranks": RANKS}, {"dora": True, "ranks": RANKS}],
    ids=[*KINDS, "ranks", "rslora ranks", "dora ranks"],
)
def test_a_saved_adapter_gives_the_same_output_in_diffusers(
    unet_in, pipeline, lora, moved, output_of, tmp_path, targets, kind
):
    unet = unet_in()
    plain = output_of(unet)
    adapter = lora(targets, **kind)
    adapter.attach(Denoiser(unet), torch.float32)
    moved(unet)
    adapter.save_weights(Denoiser(unet), tmp_path)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), atol=0, rtol=0)
    assert (output_of(unet) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("targets", sorted(LORA_TARGETS))
@pytest.mark.parametrize("dora", [False, True])
def test_the_second_stage_takes_adapters_too(tiny_stage2, origin, moved, output_of, tmp_path, targets, dora):
    adapter = LoRA(2, 4, 0.0, targets, dora, origin=replace(origin, pipeline="IFSuperResolutionPipeline"))
    unet = UNet2DConditionModel.from_pretrained(tiny_stage2 / "unet")
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(moved(unet)), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny_stage2)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), atol=0, rtol=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_computes_what_its_paper_says(unet_in, lora, moved, kind):
    unet = unet_in()
    lora(**KINDS[kind]).attach(Denoiser(unet), torch.float32)
    moved(unet)
    layer = unet.down_blocks[2].attentions[0].to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight + b @ a * (4 / 2**0.5 if "rslora" in KINDS[kind] else 4 / 2)
    if "dora" in KINDS[kind]:  # W' = m V / ||V||, each row of V a direction
        weight = layer.lora_magnitude_vector["default"].weight[:, None] * weight / weight.norm(dim=1, keepdim=True)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base_layer.bias, atol=1e-5, rtol=1e-5)


# Under the CPU's autocast peft's norms of convolutions are bfloat16: with them, DoRA starts within its rounding.
@pytest.mark.parametrize("targets, frozen, trained", [
    ("attention", torch.float32, torch.float32),
    ("attention", torch.bfloat16, torch.float32),
    ("attention", torch.bfloat16, torch.bfloat16),
    ("attention+conv", torch.float32, torch.float32),
    ("attention+conv", torch.bfloat16, torch.bfloat16),
])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_starts_at_the_model_itself(unet_in, lora, output_of, targets, frozen, trained, kind):
    unet = unet_in(frozen)
    autocast = frozen != trained
    plain = output_of(unet, autocast)
    lora(targets, **KINDS[kind]).attach(Denoiser(unet), trained)
    assert torch.equal(output_of(unet, autocast), plain)


def test_every_attention_has_an_adapter_on_its_text_keys_and_values(unet_in, lora):
    unet = unet_in()
    attentions = sum(name.endswith("add_k_proj") for name, _ in unet.named_modules())
    lora().attach(Denoiser(unet), torch.float32)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    for target in ATTENTION:
        assert sum(f".{target}.lora_A" in name for name in trained) == attentions, target
    assert len(trained) == attentions * len(ATTENTION) * 2


def test_convolution_targets_reach_resnets_and_samplers(unet_in, lora):
    unet = unet_in()
    lora("attention+conv", dora=True).attach(Denoiser(unet), torch.float32)
    trained = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    for target in CONVOLUTIONS:
        assert any(f".{target}.lora_A" in name for name in trained), target
        assert any(f".{target}.lora_magnitude_vector" in name for name in trained), target
    assert any("downsamplers" in name for name in trained) and any("upsamplers" in name for name in trained)


def test_layers_have_the_ranks_that_they_are_given(unet_in, lora):
    unet = unet_in()
    lora("attention+conv", ranks=RANKS).attach(Denoiser(unet), torch.float32)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            assert parameter.shape[1] == RANKS.get(name.split(".lora_B")[0].split(".")[-1], 2), name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_a_rank_of_its_own_changes_no_layers_scale_but_by_rsloras_own_rule(unet_in, lora, alpha, rslora):
    """An alpha like the rank counts in full in every layer, one of half the rank by half."""
    unet = unet_in()
    lora("attention+conv", alpha, ranks={**RANKS, "to_out.0": 3}, rslora=rslora).attach(Denoiser(unet), torch.float32)
    layers = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {1, 2, 3, 8}
    for layer in layers:
        scale = alpha / layer.r["default"] ** 0.5 if rslora else alpha / 2
        assert layer.scaling["default"] == pytest.approx(scale)


@pytest.mark.parametrize("other", [{"targets": "attention+conv"}, {"dora": True}])
def test_weights_of_another_adapter_are_refused(unet_in, lora, tmp_path, other):
    unet, another = unet_in(), unet_in()
    lora().attach(Denoiser(unet), torch.float32)
    lora().save_weights(Denoiser(unet), tmp_path)
    lora(**other).attach(Denoiser(another), torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        lora(**other).load_weights(Denoiser(another), tmp_path)


def test_a_file_tells_its_facts_beside_what_diffusers_reads(unet_in, lora, origin, tmp_path):
    unet = unet_in()
    adapter = lora("attention+conv", 8, rslora=True, ranks=RANKS)
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path)
    facts = read_adapter_facts(tmp_path / LORA_FILE)
    assert (facts.kind, facts.rank, facts.alpha, facts.targets, facts.rslora) == ("lora", 2, 8, "attention+conv", True)
    assert facts.ranks == "to_q=1,add_k_proj=8"
    assert all(getattr(facts, name) == value for name, value in vars(origin).items())
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        diffusers_own = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    assert (diffusers_own["unet.r"], diffusers_own["unet.lora_alpha"], diffusers_own["unet.use_rslora"]) == (2, 8, True)


@pytest.mark.parametrize("flags", [
    {"lora_dropout": 0.3, "lora_targets": "attention+conv", "use_rslora": True},
    {"mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adamw_bf16"},
    {"mixed_precision": "bf16", "gradient_checkpointing": True},
], ids=["fp32", "pure bf16", "mixed bf16"])
def test_dora_trains_resumes_bit_for_bit_and_loads_in_diffusers(small_run, tmp_path, pipeline, flags):
    whole, parts = small_run(use_dora=True, **flags)
    trained, again, earlier = (load_file(folder / LORA_FILE) for folder in (whole, parts, whole / "checkpoint-2"))
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    magnitudes = [name for name in trained if name.endswith("lora_magnitude_vector")]
    assert magnitudes and not any(torch.equal(trained[name], earlier[name]) for name in magnitudes)
    assert read_adapter_facts(whole / LORA_FILE).kind == "dora"
    pipeline.load_lora_weights(whole)
    loaded = {name: p for name, p in pipeline.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(trained)
    assert next(iter(pipeline.unet.peft_config.values())).use_dora


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_a_checkpoint_of_another_kind_is_not_gone_on_with(trainer, tmp_path, capsys, option):
    assert trainer(max_train_steps=1) == 0
    assert trainer(max_train_steps=2, **{option: True}) == 2
    assert f'key "{option}") was False and is now True' in capsys.readouterr().err
