from pathlib import Path

import pytest
import torch
from diffusers import IFPipeline

from helpers.models import loading
from helpers.models.adapters import ATTENTION, CONVOLUTIONS, LORA_TARGETS, LoRA, trainable_parameters
from helpers.models.families import SPECS

SPEC = SPECS["deepfloyd-i"]


def lora(targets: str = "attention", alpha: float = 4) -> LoRA:
    return LoRA("IFPipeline", rank=2, alpha=alpha, dropout=0.0, targets=targets)


def output_of(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 3, 64, 64, generator=generator), torch.randn(2, 77, 64, generator=generator)
    with torch.no_grad():
        return unet.eval()(x, torch.tensor([3, 700]), text).sample


@pytest.mark.parametrize("targets", sorted(LORA_TARGETS))
@pytest.mark.parametrize("alpha", [1, 2, 8])
def test_a_saved_lora_gives_the_same_output_in_diffusers(tiny_model, tmp_path, targets, alpha):
    unet = loading.load(SPEC, tiny_model, torch.float32, None).unet
    plain = output_of(unet)
    adapter = lora(targets, alpha)
    adapter.attach(unet, torch.float32)
    for parameter in trainable_parameters(unet):
        torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_weights(unet, tmp_path)
    pipeline = IFPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), atol=1e-5, rtol=0)
    assert (output_of(unet) - plain).abs().max() > 1e-2


def test_every_attention_has_an_adapter_on_its_text_keys_and_values(tiny_model):
    unet = loading.load(SPEC, tiny_model, torch.float32, None).unet
    attentions = sum(name.endswith("add_k_proj") for name, _ in unet.named_modules())
    lora().attach(unet, torch.float32)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    for target in ATTENTION:
        assert sum(f".{target}.lora_A" in name for name in trained) == attentions, target
    assert len(trained) == attentions * len(ATTENTION) * 2


def test_convolution_targets_reach_resnets_and_samplers(tiny_model):
    unet = loading.load(SPEC, tiny_model, torch.float32, None).unet
    lora("attention+conv").attach(unet, torch.float32)
    trained = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    for target in CONVOLUTIONS:
        assert any(f".{target}.lora_A" in name for name in trained), target
    assert any("downsamplers" in name for name in trained) and any("upsamplers" in name for name in trained)


@pytest.mark.parametrize("frozen, trained", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_adapters_have_their_own_dtype_beside_the_frozen_weights(tiny_model, frozen, trained):
    unet = loading.load(SPEC, tiny_model, frozen, None).unet
    lora().attach(unet, trained)
    assert {parameter.dtype for parameter in trainable_parameters(unet)} == {trained}
    assert {parameter.dtype for parameter in unet.parameters() if not parameter.requires_grad} == {frozen}


def test_weights_come_back_bit_for_bit_and_others_are_refused(tiny_model, tmp_path):
    unet = loading.load(SPEC, tiny_model, torch.float32, None).unet
    lora().attach(unet, torch.float32)
    before = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}
    lora().save_weights(unet, tmp_path)
    for parameter in trainable_parameters(unet):
        parameter.data.zero_()
    lora().load_weights(unet, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters() if p.requires_grad)
    other = loading.load(SPEC, tiny_model, torch.float32, None).unet
    lora("attention+conv").attach(other, torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        lora("attention+conv").load_weights(other, Path(tmp_path))
