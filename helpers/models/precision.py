"""What sampling computes in, whatever a UNet's weights are in."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class AsFloat32(nn.Module):
    """A UNet as one of float32, whatever it computes in: so what lies between its steps is not rounded to that."""

    dtype = torch.float32

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
        dtype = self.unet.dtype
        output, *_ = self.unet(x.to(dtype), t, encoder_hidden_states.to(dtype), **others)
        return (output.float(),)
