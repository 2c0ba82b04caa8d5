"""Frozen weights kept in 8 or 4 bits.

A layer computes its weights from these for its forward pass, and once more for its backward pass, so that at any time
no more than one layer has them in full; but for DoRA with dropout, for which peft multiplies by weights in full, and
keeps them. All of it is PyTorch's own operations, for any device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from tqdm import tqdm

BLOCK = 64
"""Weights that have a scale in common in nf4."""

NORMAL_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat's sixteen numbers (Dettmers et al. 2023, appendix E): quantiles of a normal distribution, and 0."""


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `[out, ...]` as int8 of the same shape, and scales `[out, 1, ...]` in their dtype, one a channel.

    The codes are nearest for the scales as they are rounded, so that no channel is off as a whole.
    """
    exact = weight.float()
    scales = (exact.abs().amax(dim=tuple(range(1, exact.ndim)), keepdim=True) / 127).to(weight.dtype)
    scales = torch.where(scales == 0, 1, scales)
    return (exact / scales.float()).round_().clamp_(-127, 127).to(torch.int8), scales


def pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as uint8 `[blocks, 32]`, two codes each, and their scales `[blocks, 1]` in their dtype.

    Blocks are consecutive weights; the last one is filled up with zeros.
    """
    exact = weight.float().flatten()
    exact = F.pad(exact, (0, -exact.numel() % BLOCK)).view(-1, BLOCK)
    scales = exact.abs().amax(dim=1, keepdim=True).to(weight.dtype)
    scales = torch.where(scales == 0, 1, scales)
    levels = torch.tensor(NORMAL_LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(exact / scales.float(), between, out_int32=True).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2], scales


def nf4_pairs(like: Tensor) -> Tensor:
    """The two numbers that each byte of nf4 stands for, `[256, 2]`, in the dtype and on the device of `like`."""
    levels = torch.tensor(NORMAL_LEVELS, dtype=like.dtype, device=like.device)
    return torch.cartesian_prod(levels, levels)


def unpack(shape: torch.Size, codes: Tensor, scales: Tensor, pairs: Tensor | None) -> Tensor:
    """The weights that were packed, in the scales' dtype; `pairs` are None for int8."""
    if pairs is None:
        return codes * scales  # one operation, with no copy of the codes in between
    weight = F.embedding(codes.int(), pairs).view(-1, BLOCK)
    return weight.mul_(scales).flatten()[: shape.numel()].view(shape)


class _Linear(torch.autograd.Function):
    """`F.linear` of packed weights. For its backward pass it keeps nothing but these, which are there anyway.

    The arguments are named one by one, because torch.compile tells by their count whether the context is one of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: torch.Size, codes: Tensor, scales: Tensor, pairs: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, pairs)
        ctx.of_weight, ctx.dtype = shape, x.dtype
        return F.linear(x, unpack(shape, codes, scales, pairs), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = unpack(ctx.of_weight, *ctx.saved_tensors).to(grad.dtype)
        return (grad @ weight).to(ctx.dtype), None, None, None, None, None


class _Conv2d(torch.autograd.Function):
    """The same of `F.conv2d`; `geometry` are its stride, padding, dilation and groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        geometry: tuple,
        shape: torch.Size,
        codes: Tensor,
        scales: Tensor,
        pairs: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, pairs)
        ctx.geometry, ctx.of_weight, ctx.of_input, ctx.dtype = geometry, shape, x.shape, x.dtype
        return F.conv2d(x, unpack(shape, codes, scales, pairs), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = unpack(ctx.of_weight, *ctx.saved_tensors).to(grad.dtype)
        x_grad = conv2d_input(ctx.of_input, weight, grad, *ctx.geometry)
        return x_grad.to(ctx.dtype), None, None, None, None, None, None


class _Packed(nn.Module):
    """What the layers have in common. peft takes them for what they inherit from."""

    weight_shape: torch.Size
    codes: nn.Parameter
    scales: nn.Parameter
    pairs: nn.Parameter | None

    @property
    def packed(self) -> tuple[torch.Size, Tensor, Tensor, Tensor | None]:
        """What `unpack` makes the weights of."""
        return self.weight_shape, self.codes, self.scales, self.pairs

    @property
    def weight(self) -> Tensor:
        """The weights in full, computed anew at each look."""
        return unpack(*self.packed)


class PackedLinear(_Packed, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.bias, *self.packed)


class PackedConv2d(_Packed, nn.Conv2d):
    def __new__(cls, *sizes: Any, **options: Any) -> nn.Module:
        """peft makes an adapter's matrices by the class of its base layer: those are ordinary ones."""
        return nn.Conv2d(*sizes, **options) if sizes else super().__new__(cls)

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _Conv2d.apply(x, self.bias, geometry, *self.packed)


PACKED: Mapping[type[nn.Module], type[_Packed]] = MappingProxyType({nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d})
PACK: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = MappingProxyType({"int8": pack_int8, "nf4": pack_nf4})


def pack(unet: UNet2DConditionModel, precision: str) -> None:
    """Keep the weights of all linear layers and convolutions of a UNet's blocks in `precision`, a key of `PACK`.

    These are nearly all of its weights. Biases, norms, embeddings, the first and the last convolution stay. The UNet
    must be frozen: from here on no gradient comes to the weights and biases of these layers.
    """
    pairs = nn.Parameter(nf4_pairs(unet.conv_in.weight), requires_grad=False) if precision == "nf4" else None
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    layers = [layer for block in blocks for layer in block.modules() if type(layer) in PACKED]
    # Of 4 billion weights it takes a core 40 seconds in int8, and minutes in nf4.
    for layer in tqdm(layers, desc=f"packing weights as {precision}", unit="layer", leave=False, delay=1):
        _pack_layer(layer, PACK[precision], pairs)


def _pack_layer(
    layer: nn.Linear | nn.Conv2d, pack: Callable[[Tensor], tuple[Tensor, Tensor]], pairs: nn.Parameter | None
) -> None:
    """Make it a packed one where it stands: its own class would not part with `weight` as a parameter."""
    weight = layer.weight.detach()
    del layer.weight
    layer.__class__ = PACKED[type(layer)]
    codes, scales = pack(weight)
    layer.weight_shape = weight.shape
    # Parameters, not buffers: those would be sent from process to process at each step.
    layer.codes = nn.Parameter(codes, requires_grad=False)
    layer.scales = nn.Parameter(scales, requires_grad=False)
    layer.register_parameter("pairs", pairs)  # one for all layers
