"""BitFit: only biases move, and they are all that is saved."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from helpers.models.bitfit import BIASES_FILE, BitFit
from helpers.models.denoiser import Denoiser
from helpers.models.facts import read_adapter_facts

BITFIT = {"model_type": "deepfloyd-full", "use_bitfit": True, "lora_rank": None}


def test_exactly_the_biases_are_trained(unet_in, origin):
    unet = unet_in()
    BitFit(origin=origin).attach(Denoiser(unet), torch.float32)
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == name.endswith(".bias"), name


@pytest.mark.parametrize("autocast, trained", [(True, torch.float32), (False, torch.bfloat16)])
def test_beside_frozen_bf16_weights_it_starts_at_the_model_itself_but_for_rounding(
    unet_in, output_of, autocast, trained
):
    unet = unet_in(torch.bfloat16)
    plain = output_of(unet, autocast)
    BitFit().attach(Denoiser(unet), trained)
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
    for name, tensor in tuned.unet.state_dict().items():
        assert torch.equal(tensor, biases[name].float() if name in biases else before[name]), name

    pipeline.unet.load_state_dict(biases, strict=False)  # the small file alone, as a user would
    assert torch.equal(output_of(pipeline.unet), output_of(tuned.unet))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_exported_pipeline_is_the_base_but_for_its_biases(tiny_model, origin, moved, tmp_path, dtype, variant):
    """Whatever precision it was trained in; here with a base of another dtype and of several files."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    shutil.rmtree(base / "unet")
    own = UNet2DConditionModel.from_pretrained(tiny_model / "unet", dtype=dtype)
    own.save_pretrained(base / "unet", variant=variant, max_shard_size="1MB")
    unet = UNet2DConditionModel.from_pretrained(base / "unet", dtype=torch.bfloat16, variant=variant)
    adapter = BitFit(variant, origin)
    adapter.attach(Denoiser(unet), torch.float32)
    pipeline = adapter.export(Denoiser(moved(unet)), base, tmp_path / "output")
    trained = dict(unet.named_parameters())
    written = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in own.state_dict().items():
        expected = trained[name].to(dtype) if name.endswith(".bias") else tensor
        assert written[name].dtype == dtype and torch.equal(written[name], expected), name


def test_bitfit_trains_the_second_stage(trainer, tmp_path, tiny_stage2, dataloader):
    flags = {**BITFIT, "model_type": "deepfloyd-stage2", "pretrained_model_name_or_path": tiny_stage2}
    flags |= {"mixed_precision": "bf16", "num_eval_images": 0, "validation_resolution": "64", "learning_rate": 1e-2}
    assert trainer(**flags, resolution=64) == 0
    biases = load_file(tmp_path / "output" / BIASES_FILE)
    before = UNet2DConditionModel.from_pretrained(tiny_stage2 / "unet").state_dict()
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "output" / "pipeline")
    assert type(tuned) is IFSuperResolutionPipeline
    for name, tensor in tuned.unet.state_dict().items():
        assert torch.equal(tensor, biases[name] if name in biases else before[name]), name
    assert all(not torch.equal(biases[name], before[name]) for name in biases)
    assert read_adapter_facts(tmp_path / "output" / BIASES_FILE).family == "deepfloyd-ii"


def test_the_small_file_tells_its_facts(unet_in, origin, tmp_path):
    unet = unet_in()
    BitFit(origin=origin).save_weights(Denoiser(unet), tmp_path)
    facts = read_adapter_facts(tmp_path / BIASES_FILE)
    assert (facts.kind, facts.rank, facts.alpha, facts.targets) == ("bitfit", None, None, None)
    assert all(getattr(facts, name) == value for name, value in vars(origin).items())


def test_biases_of_another_model_are_refused(unet_in, origin, tmp_path):
    unet = unet_in()
    BitFit(origin=origin).save_weights(Denoiser(unet), tmp_path)
    unet.conv_out.bias = None
    with pytest.raises(ValueError, match="does not fit.*conv_out.bias"):
        BitFit().load_weights(Denoiser(unet), tmp_path)


def test_a_checkpoint_of_full_tuning_is_not_gone_on_with(trainer, capsys):
    assert trainer(**{**BITFIT, "use_bitfit": False}, max_train_steps=1) == 0
    assert trainer(**BITFIT, max_train_steps=2) == 2
    assert 'key "use_bitfit") was False and is now True' in capsys.readouterr().err
