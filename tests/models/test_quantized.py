"""Weights in 8 and 4 bits: how near they are, and that a LoRA beside them learns as beside what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from helpers.models import loading
from helpers.models.adapters import trainable_parameters
from helpers.models.denoiser import Denoiser
from helpers.models.facts import read_adapter_facts
from helpers.models.families import SPECS
from helpers.models.gradient_checkpointing import checkpoint_everything
from helpers.models.ledger import Ledger
from helpers.models.lora import LORA_FILE, LoRA
from helpers.models.quantized import BLOCK, NORMAL_LEVELS, PACK, PACKED, nf4_pairs, pack, unpack
from tests.models.test_gradient_checkpointing import gradients_of, inputs_of, kept_for_backward

PACKED_LAYERS = tuple(PACKED.values())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def there_and_back(weight: torch.Tensor, precision: str) -> torch.Tensor:
    pairs = nf4_pairs(weight) if precision == "nf4" else None
    back = unpack(weight.shape, *PACK[precision](weight), pairs)
    assert back.shape == weight.shape and back.dtype == weight.dtype
    return back


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(dtype)


@pytest.fixture
def unet_in(smaller_model) -> Callable[..., UNet2DConditionModel]:
    """The smaller model's UNet in a dtype, float32 unless one is given."""
    return lambda dtype=torch.float32: loading.load(SPECS["deepfloyd-i"], smaller_model, dtype).unet


@pytest.fixture
def rounded() -> Callable[..., UNet2DConditionModel]:
    """A UNet with the weights that a packed one stands for, in ordinary layers."""

    def rounded(unet: UNet2DConditionModel, packed: UNet2DConditionModel) -> UNet2DConditionModel:
        unet = deepcopy(unet)
        for layer, other in zip(unet.modules(), packed.modules(), strict=True):
            if isinstance(other, PACKED_LAYERS):
                layer.weight.data = other.weight
        return unet

    return rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 3, 3), (1, 1)])
def test_int8_is_off_by_half_a_step_of_its_channel(shape, dtype):
    weight = drawn(*shape, dtype=dtype)
    off = (there_and_back(weight, "int8") - weight).float().abs().flatten(1)
    largest = weight.float().abs().flatten(1).amax(dim=1, keepdim=True)
    rounding = largest * torch.finfo(dtype).eps  # of the scales, and of the weights themselves
    assert (off <= largest / 254 + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (8, 4, 3, 3), (1, 1), (4, BLOCK)])
def test_nf4_takes_the_nearest_of_its_levels(shape, dtype):
    weight = drawn(*shape, dtype=dtype)
    blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    candidates = blocks.abs().amax(dim=1).view(-1, 1, 1) * torch.tensor(NORMAL_LEVELS)
    nearest = (blocks[..., None] - candidates).abs().amin(dim=2).flatten()[: weight.numel()].view(shape)
    off = (there_and_back(weight, "nf4") - weight).float().abs()
    torch.testing.assert_close(off, nearest, rtol=0, atol=2 * float(weight.abs().max()) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("precision", PACK)
def test_channels_of_zeros_stay_zeros_and_as_a_whole_none_is_off(precision):
    weight = drawn(4, 4096, dtype=torch.bfloat16)
    weight[1] = 0
    back = there_and_back(weight, precision)
    assert (back[1] == 0).all()
    kept = (0, 2, 3)
    gain = (back.double() * weight.double()).sum(dim=1)[[*kept]] / weight.double().square().sum(dim=1)[[*kept]]
    assert ((gain - 1).abs() < {"int8": 5e-4, "nf4": 1e-2}[precision]).all()


@pytest.mark.parametrize("precision", PACK)
def test_nearly_all_weights_are_packed_and_nothing_else_is(unet_in, precision):
    unet = unet_in(torch.bfloat16)
    packed = deepcopy(unet)
    pack(packed, precision)
    before, after = unet.state_dict(), packed.state_dict()
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    gone = {name for name in before.keys() - after.keys()}
    assert gone and all(name.endswith(".weight") and "_block" in name for name in gone)
    assert not any(isinstance(layer, PACKED_LAYERS) for layer in (packed.conv_in, packed.conv_out))
    blocks = [*packed.down_blocks, packed.mid_block, *packed.up_blocks]
    assert not [layer for block in blocks for layer in block.modules() if type(layer) in PACKED]
    small = [layer for layer in packed.modules() if isinstance(layer, PACKED_LAYERS)]
    kept = sum(layer.codes.nbytes + layer.scales.nbytes for layer in small)
    assert kept < {"int8": 0.53, "nf4": 0.29}[precision] * sum(before[name].nbytes for name in gone)


@pytest.mark.parametrize("precision", PACK)
@pytest.mark.parametrize("targets, kind", [
    ("attention", {}), ("attention+conv", {"rslora": True}), ("attention+conv", {"dora": True}),
])
def test_an_adapter_learns_as_beside_the_rounded_weights(unet_in, rounded, moved, origin, precision, targets, kind):
    packed = unet_in()
    adapter = LoRA(2, 4, 0.0, targets, base_precision=precision, origin=origin, **kind)
    full = deepcopy(packed)
    pack(packed, precision)
    full = rounded(full, packed)
    results = []
    for unet, one in ((unet_in(), adapter), (full, replace(adapter, base_precision=None))):
        torch.manual_seed(0)
        one.attach(Denoiser(unet), torch.float32)
        moved(unet)
        results.append((unet(*inputs_of(unet)).sample, gradients_of(unet, inputs_of(unet))))
    (out, gradients), (expected, wanted) = results
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", PACK)
@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, True), (torch.bfloat16, False)])
def test_it_learns_in_bfloat16_and_under_autocast_and_checkpointing_changes_no_bit(
    unet_in, origin, moved, precision, dtype, autocast
):
    unet = unet_in(dtype)
    trained = torch.float32 if autocast else dtype
    LoRA(2, 4, 0.0, "attention+conv", base_precision=precision, origin=origin).attach(Denoiser(unet), trained)
    moved(unet)
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        plain = gradients_of(unet, inputs_of(unet))
        plain = {name: one.clone() for name, one in plain.items()}
        checkpoint_everything(unet)
        again = gradients_of(unet, inputs_of(unet))
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(one.isfinite().all() for one in plain.values())
    assert any(one.abs().sum() > 0 for name, one in plain.items() if "lora" in name)


@pytest.mark.parametrize("precision", PACK)
def test_no_weights_in_full_are_kept_for_the_backward_pass(precision):
    """Neither they nor the input; and of several layers one has them at a time."""
    unet = nn.Module()
    layers = nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1, bias=False) for _ in range(4))).requires_grad_(False)
    unet.conv_in, unet.down_blocks, unet.mid_block, unet.up_blocks = nn.Conv2d(1, 1, 1), [], layers, []
    pack(unet, precision)
    x = torch.randn(1, 128, 4, 4, requires_grad=True)
    assert kept_for_backward(layers, x) == 0
    full = 4 * 128 * 128 * 9
    ledger = Ledger([x, *layers.parameters()])
    with ledger:
        layers(x).sum().backward()
    assert full <= ledger.most_activations < 2 * full


def test_torch_compile_takes_it_as_one_graph():
    for precision in PACK:
        torch._dynamo.reset()
        unet = nn.Module()
        unet.mid_block = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(2), nn.Linear(4, 6)).requires_grad_(False)
        unet.conv_in, unet.down_blocks, unet.up_blocks = nn.Conv2d(1, 1, 1), [], []
        pack(unet, precision)
        x = torch.randn(2, 4, 4, 4, requires_grad=True)
        expected = torch.autograd.grad(unet.mid_block(x).square().sum(), x)
        compiled = torch.compile(unet.mid_block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), expected)


def test_pefts_own_matrices_are_ordinary_layers(unet_in, origin):
    unet = unet_in()
    LoRA(2, 4, 0.0, "attention+conv", base_precision="int8", origin=origin).attach(Denoiser(unet), torch.float32)
    adapted = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
    inside = [layer for layer in adapted if isinstance(layer.get_base_layer(), PACKED_LAYERS)]
    assert inside
    for layer in adapted:
        assert {type(part["default"]) for part in (layer.lora_A, layer.lora_B)} <= {nn.Linear, nn.Conv2d}
    names = {name for name, one in unet.named_parameters() if one.requires_grad}
    assert names and all("lora_" in name for name in names)
    assert all(one.is_floating_point() for one in trainable_parameters(unet))


@pytest.mark.parametrize("flags", [
    {"base_model_precision": "int8", "use_dora": True},
    {"base_model_precision": "nf4", "mixed_precision": "bf16", "gradient_checkpointing": True, "use_ema": True},
], ids=["int8", "nf4"])
def test_a_run_resumes_bit_for_bit_and_its_file_is_as_any_other(small_run, smaller_model, output_of, flags):
    whole, parts = small_run(pretrained_model_name_or_path=smaller_model, **flags)
    trained, again = (load_file(folder / LORA_FILE) for folder in (whole, parts))
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)
    assert read_adapter_facts(whole / LORA_FILE).base_precision == flags["base_model_precision"]
    pipeline = DiffusionPipeline.from_pretrained(smaller_model)
    plain = output_of(pipeline.unet)
    pipeline.load_lora_weights(whole)
    assert len([name for name, _ in pipeline.unet.named_parameters() if "lora_" in name]) == len(trained)
    assert (output_of(pipeline.unet) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("base, flags", [
    ("tiny_stage2", {"model_type": "deepfloyd-stage2-lora", "lora_targets": "attention+conv"}),
    ("tiny_stage3", {"model_type": "deepfloyd-stage3-lora", "resolution": 64}),
    ("tiny_sd", {"model_type": "lora", "train_text_encoder": True, "export": "kohya"}),
    ("tiny_sd", {"model_type": "lora", "mixed_precision": "fp16", "use_rslora": True}),
], ids=["stage II", "stage III", "SD and its text encoder", "SD in fp16"])
def test_every_family_trains_beside_it(trainer, request, tmp_path, base, flags):
    common = {"resolution": 64, "base_model_precision": "int8", "max_train_steps": 1}
    assert trainer(pretrained_model_name_or_path=request.getfixturevalue(base), **{**common, **flags}) == 0
    trained = load_file(tmp_path / "output" / LORA_FILE)
    assert trained and all(tensor.isfinite().all() for tensor in trained.values())


def test_a_checkpoint_of_another_precision_is_not_gone_on_with(trainer, smaller_model, capsys):
    flags = {"pretrained_model_name_or_path": smaller_model}
    assert trainer(**flags, max_train_steps=1, base_model_precision="int8") == 0
    assert trainer(**flags, max_train_steps=2) == 2
    said = capsys.readouterr().err
    assert "--base_model_precision" in said and "'int8'" in said and "'no_change'" in said
