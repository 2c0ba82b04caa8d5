import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from helpers.models.denoiser import Denoiser
from helpers.models.full import Full
from helpers.models.gradient_checkpointing import checkpoint_everything
from helpers.models.lora import LoRA
from helpers.models.published import architecture
from helpers.training.memory import AsOnCuda

# What Stable Diffusion's blocks have and IF's have not: transformers, and samplers that are single convolutions.
STABLE_DIFFUSION = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}


def kept_for_backward(unet: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes of the tensors, other than parameters, that the forward pass saves for the backward pass."""
    parameters = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(*inputs)
    return sum(storage.nbytes() for storage in saved.values())


def inputs_of(unet: UNet2DConditionModel, batch: int = 2) -> tuple[torch.Tensor, ...]:
    config, edge = unet.config, unet.config.sample_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, edge, edge, generator=generator)
    text = torch.randn(batch, 77, config.encoder_hid_dim or config.cross_attention_dim, generator=generator)
    return x.to(unet.dtype), torch.tensor([3, 700][:batch]), text.to(unet.dtype)


def gradients_of(unet: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The gradients of one step in train mode, and the random number that is drawn after it."""
    torch.manual_seed(0)
    unet.train().zero_grad()
    unet(*inputs)[0].float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.grad is not None}
    return gradients | {"the next random number": torch.rand(1)}


def assert_same_gradients(unet: UNet2DConditionModel) -> None:
    inputs = inputs_of(unet)
    plain = {name: gradient.clone() for name, gradient in gradients_of(unet, inputs).items()}
    checkpoint_everything(unet)
    checkpointed = gradients_of(unet, inputs)
    assert plain.keys() == checkpointed.keys() and len(plain) > 20
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("adapter", [LoRA(32, 32, 0.0, "attention"), Full()], ids=["lora", "full"])
def test_three_quarters_of_what_if_keeps_for_the_backward_pass_go(adapter):
    with torch.device("meta"), AsOnCuda(autocast=False):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(architecture("DeepFloyd/IF-I-M-v1.0"))
        ).train()
        adapter.attach(Denoiser(unet), torch.float32)
        inputs = torch.empty(2, 3, 64, 64), torch.empty(2, dtype=torch.int64), torch.empty(2, 77, 4096)
        plain = kept_for_backward(unet, *inputs)
        unet.enable_gradient_checkpointing()
        of_diffusers = kept_for_backward(unet, *inputs)
        unet.disable_gradient_checkpointing()
        checkpoint_everything(unet)
        ours = kept_for_backward(unet, *inputs)
    assert ours < 0.25 * plain < of_diffusers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_gradients_are_the_same_bit_for_bit_with_dropout_too(unet_in, dtype, trained):
    unet = unet_in(dtype)
    if trained == "lora":
        LoRA(4, 4, 0.3, "attention+conv").attach(Denoiser(unet), dtype)
    else:
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = 0.3
        Full().attach(Denoiser(unet), dtype)
    assert_same_gradients(unet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_stable_diffusions_blocks_are_the_same_too(dtype):
    unet = UNet2DConditionModel(**STABLE_DIFFUSION, dropout=0.3).to(dtype)
    inputs = inputs_of(unet)
    plain = kept_for_backward(unet.train(), *inputs)
    assert_same_gradients(unet)
    assert kept_for_backward(unet, *inputs) < 0.5 * plain


def test_it_acts_only_while_training(unet_in):
    unet = unet_in()
    inputs = inputs_of(unet)
    plain = kept_for_backward(unet.eval(), *inputs)
    checkpoint_everything(unet)
    assert kept_for_backward(unet, *inputs) == plain
    assert kept_for_backward(unet.train(), *inputs) < 0.25 * plain
    with torch.no_grad():
        assert kept_for_backward(unet, *inputs) == 0


def test_names_classes_files_and_copies_are_what_they_were(unet_in, tmp_path):
    unet = unet_in().eval()
    before = [(name, type(module)) for name, module in unet.named_modules()], list(unet.state_dict())
    inputs = inputs_of(unet)
    output = unet(*inputs)[0]
    checkpoint_everything(unet)
    assert before == ([(name, type(module)) for name, module in unet.named_modules()], list(unet.state_dict()))
    unet.save_pretrained(tmp_path)
    assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path)(*inputs)[0], output)
    assert {path.name for path in Path(tmp_path).iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    duplicate = copy.deepcopy(unet)
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert torch.equal(duplicate(*inputs)[0], output), "a copy computes with its own weights"


def test_it_compiles_to_one_graph(unet_in):
    unet = unet_in()
    block, inputs = unet.mid_block, (torch.randn(1, 64, 8, 8), torch.randn(1, 64), torch.randn(1, 77, 64))
    plain = gradients_of(block, inputs)
    checkpoint_everything(unet)
    block.compile(backend="eager", fullgraph=True, dynamic=False)
    compiled = gradients_of(block, inputs)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
