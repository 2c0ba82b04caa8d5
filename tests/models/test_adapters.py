import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline

from helpers.diffusion.objective import LossSettings
from helpers.models import loading
from helpers.models.adapters import ATTENTION, CONVOLUTIONS, LORA_TARGETS, Full, LoRA, trainable_parameters
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
    unet = loading.load(SPEC, tiny_model, torch.float32).unet
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
    unet = loading.load(SPEC, tiny_model, torch.float32).unet
    attentions = sum(name.endswith("add_k_proj") for name, _ in unet.named_modules())
    lora().attach(unet, torch.float32)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    for target in ATTENTION:
        assert sum(f".{target}.lora_A" in name for name in trained) == attentions, target
    assert len(trained) == attentions * len(ATTENTION) * 2


def test_convolution_targets_reach_resnets_and_samplers(tiny_model):
    unet = loading.load(SPEC, tiny_model, torch.float32).unet
    lora("attention+conv").attach(unet, torch.float32)
    trained = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    for target in CONVOLUTIONS:
        assert any(f".{target}.lora_A" in name for name in trained), target
    assert any("downsamplers" in name for name in trained) and any("upsamplers" in name for name in trained)


@pytest.mark.parametrize("frozen, trained", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_adapters_have_their_own_dtype_beside_the_frozen_weights(tiny_model, frozen, trained):
    unet = loading.load(SPEC, tiny_model, frozen).unet
    lora().attach(unet, trained)
    assert {parameter.dtype for parameter in trainable_parameters(unet)} == {trained}
    assert {parameter.dtype for parameter in unet.parameters() if not parameter.requires_grad} == {frozen}


def test_weights_come_back_bit_for_bit_and_others_are_refused(tiny_model, tmp_path):
    unet = loading.load(SPEC, tiny_model, torch.float32).unet
    lora().attach(unet, torch.float32)
    before = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}
    lora().save_weights(unet, tmp_path)
    for parameter in trainable_parameters(unet):
        parameter.data.zero_()
    lora().load_weights(unet, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters() if p.requires_grad)
    other = loading.load(SPEC, tiny_model, torch.float32).unet
    lora("attention+conv").attach(other, torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        lora("attention+conv").load_weights(other, Path(tmp_path))


def test_a_pipeline_exported_from_a_variant_loads_as_the_plain_one(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    for stem in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        (base / f"{stem}.safetensors").rename(base / f"{stem}.fp16.safetensors")
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickled")
    unet = loading.load(SPEC, base, torch.float32, "fp16").unet
    exported = Full("fp16").export(unet, base, tmp_path / "output")
    pipeline = IFPipeline.from_pretrained(exported, safety_checker=None, requires_safety_checker=False)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet))
    assert not list(exported.rglob("*.bin"))
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["pipeline"]


def test_nothing_that_is_exported_tells_where_the_base_lay(tiny_model, tmp_path):
    unet = loading.load(SPEC, tiny_model, torch.float32).unet
    Full().save_weights(unet, tmp_path / "checkpoint")
    Full().export(unet, tiny_model, tmp_path / "output")
    for path in tmp_path.rglob("*.json"):
        assert str(tiny_model) not in path.read_text("utf-8"), path


@pytest.mark.parametrize("trained, variance", [(True, "learned_range"), (False, "fixed_small")])
def test_a_pipeline_samples_with_a_fixed_variance_where_it_was_not_trained(tiny_model, tmp_path, trained, variance):
    unet = loading.load(SPEC, tiny_model, torch.float32, loss=LossSettings(trains_variance=trained)).unet
    exported = Full(trains_variance=trained).export(unet, tiny_model, tmp_path)
    assert DDPMScheduler.from_pretrained(exported / "scheduler").config.variance_type == variance
