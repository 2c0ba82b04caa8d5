"""BitFit: only biases move, and they are all that is saved."""

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline
from safetensors.torch import load_file

from helpers.models.bitfit import BIASES_FILE, BitFit
from helpers.models.facts import read_adapter_facts

BITFIT = {"model_type": "deepfloyd-full", "use_bitfit": True, "lora_rank": None}


def test_exactly_the_biases_are_trained(unet_in, origin):
    unet = unet_in()
    BitFit(origin=origin).attach(unet, torch.float32)
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == name.endswith(".bias"), name


@pytest.mark.parametrize("autocast, trained", [(True, torch.float32), (False, torch.bfloat16)])
def test_beside_frozen_bf16_weights_it_starts_at_the_model_itself_but_for_rounding(
    unet_in, output_of, autocast, trained
):
    unet = unet_in(torch.bfloat16)
    plain = output_of(unet, autocast)
    BitFit().attach(unet, trained)
    torch.testing.assert_close(output_of(unet, autocast), plain, atol=0.05, rtol=0)
    large = [name for name, p in unet.named_parameters() if p.ndim > 1 and p.dtype != torch.bfloat16]
    assert not large, "what is frozen stays small"


@pytest.mark.parametrize("flags", [
    {},
    {"mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adamw_bf16"},
    {"mixed_precision": "bf16", "gradient_checkpointing": True},
], ids=["fp32", "pure bf16", "mixed bf16"])
def test_bitfit_moves_biases_alone_resumes_bit_for_bit_and_loads_in_diffusers(small_run, pipeline, output_of, flags):
    whole, parts = small_run(**BITFIT, **flags)
    biases, again, before = load_file(whole / BIASES_FILE), load_file(parts / BIASES_FILE), pipeline.unet.state_dict()
    assert biases.keys() == {name for name in before if name.endswith(".bias")}
    assert all(torch.equal(biases[name], again[name]) for name in biases)
    assert all(not torch.equal(biases[name].float(), before[name]) for name in biases)
    assert not list(whole.glob("checkpoint-*/unet")), "checkpoints hold the biases alone"

    tuned = DiffusionPipeline.from_pretrained(whole / "pipeline")
    assert type(tuned) is IFPipeline and tuned.scheduler.config.variance_type == "learned_range"
    dtype = torch.bfloat16 if "mixed_precision" in flags else torch.float32
    for name, tensor in tuned.unet.state_dict().items():
        torch.testing.assert_close(tensor, biases.get(name, before[name].to(dtype)).float(), atol=0, rtol=0)

    pipeline.unet.load_state_dict(biases, strict=False)  # the small file alone, as a user would
    torch.testing.assert_close(output_of(pipeline.unet), output_of(tuned.unet), atol=0.1 if flags else 1e-5, rtol=0)


def test_the_small_file_tells_its_facts(unet_in, origin, tmp_path):
    unet = unet_in()
    BitFit(origin=origin).save_weights(unet, tmp_path)
    facts = read_adapter_facts(tmp_path / BIASES_FILE)
    assert (facts.kind, facts.rank, facts.alpha, facts.targets) == ("bitfit", None, None, None)
    assert all(getattr(facts, name) == value for name, value in vars(origin).items())


def test_biases_of_another_model_are_refused(unet_in, origin, tmp_path):
    unet = unet_in()
    BitFit(origin=origin).save_weights(unet, tmp_path)
    unet.conv_out.bias = None
    with pytest.raises(ValueError, match="does not fit.*conv_out.bias"):
        BitFit().load_weights(unet, tmp_path)


def test_a_checkpoint_of_full_tuning_is_not_gone_on_with(trainer, capsys):
    assert trainer(**{**BITFIT, "use_bitfit": False}, max_train_steps=1) == 0
    assert trainer(**BITFIT, max_train_steps=2) == 2
    assert 'key "use_bitfit") was False and is now True' in capsys.readouterr().err
