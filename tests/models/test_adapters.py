"""What holds for every way of training a UNet."""

import json

import pytest
import torch
from safetensors import safe_open

from helpers.models.adapters import trainable_parameters
from helpers.models.bitfit import BitFit
from helpers.models.denoiser import Denoiser
from helpers.models.full import Full
from helpers.models.lora import LoRA

ADAPTERS = {
    "lora": lambda origin: LoRA(2, 4, 0.0, "attention", origin=origin),
    "dora": lambda origin: LoRA(2, 4, 0.0, "attention+conv", dora=True, rslora=True, origin=origin),
    "bitfit": lambda origin: BitFit(origin=origin),
    "full": lambda origin: Full(origin=origin),
}
PRECISIONS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.fixture(params=list(ADAPTERS))
def adapter(request, origin):
    return ADAPTERS[request.param](origin)


@pytest.mark.parametrize("frozen, trained", PRECISIONS)
def test_trained_weights_have_their_own_dtype_and_come_back_bit_for_bit(
    unet_in, adapter, moved, tmp_path, frozen, trained
):
    unet = unet_in(frozen)
    adapter.attach(Denoiser(unet), trained)
    moved(unet)
    before = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in before.values()} == {trained}
    adapter.save_weights(Denoiser(unet), tmp_path)
    for parameter in trainable_parameters(unet):
        parameter.data.zero_()
    adapter.load_weights(Denoiser(unet), tmp_path)
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters() if p.requires_grad)


def test_nothing_that_is_written_tells_where_the_base_lay(unet_in, adapter, tiny_model, tmp_path):
    unet = unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path / "checkpoint")
    adapter.export(Denoiser(unet), tiny_model, tmp_path / "output")
    written = [path.read_text("utf-8") for path in tmp_path.rglob("*.json")]
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            written.append(json.dumps(file.metadata()))
    assert written and not any(str(tiny_model.parent) in text for text in written)
