"""What predicts the noise: the UNet, and what stands beside it."""

from __future__ import annotations

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn


class Denoiser(nn.Module):
    """A UNet, and the models that are trained together with it.

    All of a training step's gradients flow through one call of it, as training in several processes needs.

    Attributes:
        text_encoder: reads the captions where it is trained too; else the text comes as cached embeddings.
        controlnet: adds what a conditioning image asks for to the UNet's features.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: nn.Module | None = None,
        controlnet: ControlNetModel | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.controlnet = controlnet

    @property
    def nets(self) -> tuple[UNet2DConditionModel | ControlNetModel, ...]:
        """The UNet, and the ControlNet where there is one: what is made of blocks."""
        return (self.unet,) if self.controlnet is None else (self.unet, self.controlnet)

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet's inputs are cast to."""
        return self.unet.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """The embeddings `[B, length, D]` of captions, from their tokens, int64 `[B, length]`, by the text encoder."""
        return self.text_encoder(tokens).last_hidden_state

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, class_labels: Tensor | None = None, control: Tensor | None = None
    ) -> Tensor:
        """The UNet's output `[B, C, H, W]`, in its dtype.

        Args:
            x: `[B, C, H, W]`.
            t: int64 `[B]`.
            text: embeddings `[B, length, D]`, or the captions' tokens, int64 `[B, length]`, for the text encoder.
            control: the conditioning images for the ControlNet, uint8 `[B, H, W, 3]`.
        """
        x = x.to(self.dtype)
        if self.text_encoder is not None:
            text = self.embed(text)
        # No attention mask: IF's pipelines never pass one, and its UNet was trained to see all positions.
        text = text.to(self.dtype)
        added = {}
        if self.controlnet is not None:
            hint = control.permute(0, 3, 1, 2).float().div_(255).to(self.dtype)  # as its pipeline makes them
            down, middle = self.controlnet(x, t, text, hint, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(x, t, text, class_labels=class_labels, **added).sample
