"""How text embeds are kept on the disk: each number as it is, or in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
"""Numbers of a token that share a scale, in 8 bits."""
LARGEST = 127
"""The largest number in 8 bits: -128 is left out, so that both signs reach as far."""
SCALE = torch.bfloat16
"""The dtype of a scale: float16 has more digits, but neither bfloat16's range nor, here, any use for them."""
SCALES = (2.0**-126, 2.0**121)
"""The least, for groups of zeros, by which none is divided by zero; the largest, of which 127 are not infinite yet."""


def quantised(embeds: Tensor) -> Tensor:
    """Embeds `[..., D]` in 8 bits: uint8 `[..., D + 2 ceil(D / 64)]`, a token's numbers and then its groups' scales.

    A number is q x scale, with scale = max|x| / 127 over its group of 64, and so is off by at most half of the scale.
    Numbers are divided by the scale as it is stored, so that its own rounding makes no error besides.
    """
    width = embeds.shape[-1]
    groups = pad(embeds.float(), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / LARGEST).clamp(*SCALES).to(SCALE)
    # A scale that was rounded down would make 127.5 of a group's largest number.
    numbers = (groups / scales[..., None].float()).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return torch.cat([numbers.flatten(-2)[..., :width].view(torch.uint8), scales.view(torch.uint8)], dim=-1)


def dequantise(packed: Tensor, out: Tensor) -> None:
    """The inverse of `quantised`, into bfloat16 `[..., D]`."""
    width = out.shape[-1]
    # A copy also where nothing makes it one: after an odd width scales lie at odd bytes.
    scales = packed[..., width:].clone(memory_format=torch.contiguous_format).view(SCALE)
    out.copy_(packed[..., :width].view(torch.int8))
    whole = width // GROUP
    out[..., : whole * GROUP].unflatten(-1, (whole, GROUP)).mul_(scales[..., :whole, None])
    out[..., whole * GROUP :].mul_(scales[..., whole:])  # a last group of fewer numbers, if there is one


class Exact:
    """bfloat16, as the text encoder gives it."""

    recipe: Mapping[str, str] = MappingProxyType({})
    """What an embed's recipe says of its storage."""

    def nbytes(self, width: int) -> int:
        """Bytes of a token of so many numbers."""
        return 2 * width

    def width(self, stored: int) -> int:
        """How many numbers a token has, of which so many entries are stored."""
        return stored

    def packed(self, embeds: Tensor) -> Tensor:
        """What is stored of bfloat16 `[B, length, D]`: a tensor for each."""
        return embeds

    def unpack(self, records: Sequence[np.ndarray], out: Tensor) -> None:
        """Fill bfloat16 `[B, length, D]`, contiguous, from the bytes of B stored tensors."""
        for row, record in zip(out.view(torch.uint8).flatten(1).numpy(), records):
            row[:] = record


class Int8:
    """8 bits, and a scale for each 64 numbers: see `quantised`. What each method does, `Exact` says."""

    recipe: Mapping[str, str] = MappingProxyType({"storage": f"int8 in groups of {GROUP}"})

    def nbytes(self, width: int) -> int:
        return width + SCALE.itemsize * math.ceil(width / GROUP)

    def width(self, stored: int) -> int:
        return stored - SCALE.itemsize * math.ceil(stored / (GROUP + SCALE.itemsize))

    def packed(self, embeds: Tensor) -> Tensor:
        return quantised(embeds)

    def unpack(self, records: Sequence[np.ndarray], out: Tensor) -> None:
        _, length, width = out.shape
        packed = torch.empty(len(out), length, self.nbytes(width), dtype=torch.uint8)
        for row, record in zip(packed.flatten(1).numpy(), records):
            row[:] = record
        dequantise(packed, out)


STORAGES: Mapping[str, Exact | Int8] = MappingProxyType({"bf16": Exact(), "int8": Int8()})
"""By the values of the option text_embeds_storage."""
