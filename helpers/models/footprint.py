"""What each component of a pipeline takes of a device's memory, told before any weights load.

Weights follow from shapes and dtype, to the byte. For the rest one forward pass runs on PyTorch's meta device while it
is counted what lives, as in `training/memory.py`. What kernels work with for themselves is not in it, nor CUDA itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTextEncoding

from helpers.models.ledger import META, AsOnCuda, Ledger
from helpers.models.lora_files import bare_unet
from helpers.sizes import Size

TOKENS = 77

TEXT_DTYPE, VAE_DTYPE = torch.bfloat16, torch.float32

PREFETCHED = 2
"""Layers whose weights are on the device at a time where they come in groups: one computes, the next one arrives."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a component takes.

    Attributes:
        weights: all of them.
        group: of these what is on the device at a time, at the most, where they come to it layer by layer.
        each: more for each picture or caption that is computed at a time.
    """

    weights: int
    group: int
    each: int

    def peak(self, count: int, by_groups: bool = False) -> int:
        """The most that it takes, for so many pictures or captions at a time."""
        return (self.group if by_groups else self.weights) + count * self.each


def of_unet(
    config: Mapping[str, Any], x: Size, dtype: torch.dtype, guided: bool = True, tokens: int = TOKENS
) -> Footprint:
    """That of a UNet.

    Args:
        config: its configuration.
        x: the extent of what it denoises.
        guided: with guidance all is computed twice for each picture.
        tokens: positions of the text.
    """
    return _of_unet(_plain(config), x, dtype, guided, tokens)


@cache
def _of_unet(config: str, x: Size, dtype: torch.dtype, guided: bool, tokens: int) -> Footprint:
    unet = in_dtype(bare_unet(json.loads(config)), dtype)
    return _footprint(unet, lambda: unet_pass(unet, 1 + guided, x, tokens))


def unet_pass(unet: nn.Module, count: int, x: Size, tokens: int) -> Tensor:
    """What a UNet makes of inputs without meaning, on its device."""
    config, device, dtype = unet.config, unet.device, unet.dtype
    t = torch.zeros(count, dtype=torch.int64, device=device)
    width = config.encoder_hid_dim or config.cross_attention_dim
    text = torch.zeros(count, tokens, width, dtype=dtype, device=device)
    unet_input = torch.zeros(count, config.in_channels, x.height, x.width, dtype=dtype, device=device)
    labels = t if config.class_embed_type or config.num_class_embeds else None
    return unet(unet_input, t, text, class_labels=labels).sample


@cache
def of_text_encoder(config: Path, tokens: int = TOKENS) -> Footprint:
    """That of a text encoder, in bfloat16; `config` is its `config.json`."""
    content = json.loads(config.read_text("utf-8"))
    kind = content.pop("model_type")
    with META:
        model = AutoModelForTextEncoding.from_config(AutoConfig.for_model(kind, **content))
    model = in_dtype(model, TEXT_DTYPE).eval()
    return _footprint(model, lambda: text_pass(model, 1, tokens))


def text_pass(model: nn.Module, count: int, tokens: int) -> Tensor:
    """The embeddings of captions without meaning. They have no mask: it weighs nothing, and cannot be read on meta."""
    return model(torch.zeros(count, tokens, dtype=torch.int64, device=model.device)).last_hidden_state


def of_vae(config: Mapping[str, Any], image: Size, tiled: bool = False) -> Footprint:
    """That of a VAE which decodes pictures of this size, in float32."""
    return _of_vae(_plain(config), image, tiled)


@cache
def _of_vae(config: str, image: Size, tiled: bool) -> Footprint:
    with META:
        vae = AutoencoderKL.from_config(json.loads(config)).eval()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = Size(image.width // factor, image.height // factor)
    edge = vae.tile_latent_min_size
    if not tiled or max(latents) <= edge:
        return _footprint(vae, lambda: decode_pass(vae, 1, latents))
    # One tile on its way, and those that are made; then those, the rows cut from them, and the picture of these.
    one = _footprint(vae, lambda: decode_pass(vae, 1, Size(edge, edge)))
    picture = image.width * image.height * vae.config.out_channels * VAE_DTYPE.itemsize
    made = int(picture / (1 - vae.tile_overlap_factor) ** 2)
    return Footprint(one.weights, one.group, max(one.each + made, made + 2 * picture))


def decode_pass(vae: AutoencoderKL, count: int, latents: Size) -> Tensor:
    """The pictures of latents without meaning."""
    shape = (count, vae.config.latent_channels, latents.height, latents.width)
    return vae.decode(torch.zeros(shape, dtype=vae.dtype, device=vae.device)).sample


def _plain(config: Mapping[str, Any]) -> str:
    """A configuration as text: what is asked for twice is counted once."""
    return json.dumps({name: value for name, value in config.items() if name != "_name_or_path"}, sort_keys=True)


def _footprint(model: nn.Module, run: Callable[[], Tensor]) -> Footprint:
    """That of a model on the meta device, of which `run` computes one picture or caption."""
    ledger = Ledger(_tensors(model))
    with torch.no_grad(), ledger, META, AsOnCuda(autocast=False):
        run()
    largest = max(sum(tensor.nbytes for tensor in _tensors(module, recurse=False)) for module in model.modules())
    return Footprint(sum(tensor.nbytes for tensor in _tensors(model)), PREFETCHED * largest, ledger.most_activations)


def _tensors(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model of shapes alone, as if it were loaded in a dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
