"""A ControlNet begins as nothing, learns from conditioning images, and is in files what it is in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from torch import nn

from helpers.data.collate import Batch
from helpers.models import loading
from helpers.models.adapters import trainable_parameters
from helpers.models.controlnet import ControlNet
from helpers.models.denoiser import Denoiser
from helpers.models.facts import origin_of, read_adapter_facts
from helpers.models.families import SPECS
from helpers.models.gradient_checkpointing import checkpoint_everything
from helpers.models.parts import LossSettings, Parts
from helpers.training.step import training_loss

SPEC = SPECS["sd"].with_controlnet
EDGE = 64


@pytest.fixture
def parts(tiny_sd) -> Parts:
    """The tiny Stable Diffusion with a ControlNet attached."""
    torch.manual_seed(0)
    parts = loading.load(SPEC, tiny_sd, torch.float32)
    adapter(tiny_sd).attach(parts.denoiser, torch.float32)
    return parts


def adapter(base: Path) -> ControlNet:
    return ControlNet(origin=origin_of(str(base), "sd", SPEC, base, LossSettings()))


def moved(denoiser: Denoiser) -> None:
    """Give the zero convolutions some weights, as a few steps would."""
    with torch.no_grad():
        for name, parameter in denoiser.controlnet.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))


def batch(control: torch.Tensor | None = None, width: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    moments = torch.rand(2, 8, EDGE // 8, EDGE // 8, generator=generator).half()
    edges = torch.randint(256, (2, EDGE, EDGE, 3), dtype=torch.uint8, generator=generator)
    text = torch.randn(2, 77, width, generator=generator).bfloat16()
    return Batch(moments, text, (None, None), control=edges if control is None else control)


def loss_of(parts: Parts, control: torch.Tensor | None = None) -> torch.Tensor:
    shown = batch(control, parts.unet.config.cross_attention_dim)
    return training_loss(parts, parts.denoiser, shown, torch.Generator().manual_seed(2)).loss


def test_it_alone_is_trained_in_the_dtype_that_is_asked_for(tiny_sd):
    parts = loading.load(SPEC, tiny_sd, torch.bfloat16)
    adapter(tiny_sd).attach(parts.denoiser, torch.float32)
    assert {p.dtype for p in parts.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in parts.denoiser.controlnet.parameters()} == {torch.float32}
    trained = {id(p) for p in trainable_parameters(parts.denoiser)}
    assert trained == {id(p) for p in parts.denoiser.controlnet.parameters()}


def test_at_first_the_unet_draws_as_without_it_and_then_by_the_conditioning_image(parts, tiny_sd):
    black = torch.zeros(2, EDGE, EDGE, 3, dtype=torch.uint8)
    plain = loss_of(loading.load(SPEC, tiny_sd, torch.float32))
    assert torch.equal(loss_of(parts), plain) and torch.equal(loss_of(parts, black), plain)
    moved(parts.denoiser)
    assert len({loss_of(parts).item(), loss_of(parts, black).item(), plain.item()}) == 3


def test_once_its_output_is_not_zero_all_of_it_learns_down_to_the_conditioning_images_first_layer(parts):
    loss_of(parts).backward()
    hint = parts.denoiser.controlnet.controlnet_cond_embedding.conv_in.weight
    assert not hint.grad.any(), "behind zero convolutions"
    assert all(block.weight.grad.any() for block in parts.denoiser.controlnet.controlnet_down_blocks)
    moved(parts.denoiser)
    parts.denoiser.zero_grad()
    loss_of(parts).backward()
    assert all(p.grad.any() for p in (hint, parts.denoiser.controlnet.controlnet_cond_embedding.conv_out.weight))
    assert all(p.grad is not None for p in parts.denoiser.controlnet.parameters()), "or several processes would wait"
    assert all(p.grad is None for p in parts.unet.parameters())


def test_it_is_shown_the_conditioning_image_as_its_pipeline_shows_it(parts):
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    seen = []
    parts.denoiser.controlnet.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    loss_of(parts)
    [(x_t, t, text, shown)] = seen
    processor = VaeImageProcessor(8, do_convert_rgb=True, do_normalize=False)
    pictures = [Image.fromarray(picture.numpy()) for picture in batch().control]
    assert torch.equal(shown, processor.preprocess(pictures, height=EDGE, width=EDGE))
    assert x_t.shape == (2, 4, EDGE // 8, EDGE // 8) and text.shape[:2] == (2, 77) and t.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit_and_by_diffusers_too(tiny_sd, tmp_path, dtype):
    parts = loading.load(SPEC, tiny_sd, dtype)
    control = adapter(tiny_sd)
    control.attach(parts.denoiser, dtype)
    moved(parts.denoiser)
    control.save_weights(parts.denoiser, tmp_path)
    other = loading.load(SPEC, tiny_sd, dtype)
    control.attach(other.denoiser, dtype)
    control.load_weights(other.denoiser, tmp_path)
    read = ControlNetModel.from_pretrained(tmp_path / "controlnet", dtype=dtype)
    for model in (other.denoiser.controlnet, read):
        assert_same_weights(model, parts.denoiser.controlnet)
    assert str(tiny_sd) not in (tmp_path / "controlnet" / "config.json").read_text()


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    weights = model.state_dict()
    assert weights.keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(weights[name], tensor) and weights[name].dtype == tensor.dtype


def test_its_file_tells_what_it_was_trained_on(parts, tiny_sd, tmp_path):
    result = adapter(tiny_sd).export(parts.denoiser, tiny_sd, tmp_path)
    assert result == tmp_path / "controlnet" and [path.name for path in tmp_path.iterdir()] == ["controlnet"]
    facts = read_adapter_facts(result / "diffusion_pytorch_model.safetensors")
    assert (facts.kind, facts.family, facts.base_model) == ("controlnet", "sd", tiny_sd.name)
    assert (facts.pipeline, facts.prediction_type) == ("StableDiffusionControlNetPipeline", "epsilon")
    adapter(tiny_sd).export(parts.denoiser, tiny_sd, tmp_path)  # over an earlier one


def test_with_gradient_checkpointing_the_gradients_are_the_same_bit_for_bit(parts):
    moved(parts.denoiser)

    def gradients() -> list[torch.Tensor]:
        parts.denoiser.train().zero_grad()
        loss_of(parts).backward()
        return [parameter.grad.clone() for parameter in trainable_parameters(parts.denoiser)]

    plain = gradients()
    for net in parts.denoiser.nets:
        checkpoint_everything(net)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))
