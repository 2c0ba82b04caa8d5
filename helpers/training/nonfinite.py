"""Losses and gradients that are NaN or infinite: how they are seen, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.data.sampler import Use
from helpers.files import printable


@dataclass(frozen=True)
class Passed:
    """What a forward and backward pass leaves behind, on the device.

    Attributes:
        loss: a scalar.
        timesteps: int64 `[B]`.
        text: the sum of each embedding, float32 `[B]`: not finite where one of its values is not.
    """

    uses: tuple[Use, ...]
    loss: Tensor
    timesteps: Tensor
    text: Tensor


def all_finite(passes: Sequence[Passed], norm: Tensor) -> bool:
    """Whether the losses and the gradient's norm are finite: the one time in a step that a GPU is waited for."""
    return bool(torch.stack([norm.float(), *(one.loss for one in passes)]).isfinite().all())


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The largest of all values, which unlike the sum of their squares is never too large for float32."""
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)


def describe(passes: Sequence[Passed], norm: Tensor, computed: torch.dtype, trained: torch.dtype) -> str:
    """What was not finite, in which dtypes, and the images, captions and timesteps that it came from.

    Args:
        computed, trained: the dtypes of the forward pass and of what is trained.
    """
    losses = [one.loss.item() for one in passes]
    of_loss = [one for one, loss in zip(passes, losses) if not math.isfinite(loss)]
    if of_loss:
        what = f"the loss is {next(loss for loss in losses if not math.isfinite(loss))}"
    else:
        what = f"the loss is {sum(losses) / len(losses):.4g}, but the gradient's norm is {norm.item()}"
    lines = [line for one in of_loss or passes for line in _lines(one)]
    return f"{what} (computed in {computed}, trained in {trained}). It came from:\n" + "\n".join(lines)


def _lines(one: Passed) -> list[str]:
    lines = []
    for use, timestep, text in zip(one.uses, one.timesteps.tolist(), one.text.tolist()):
        spoilt = "" if math.isfinite(text) else ", whose embedding is not finite"
        caption = repr(use.caption) if not use.dropped else "its caption dropped"
        lines.append(f"  {printable(use.record.path)}, timestep {timestep}, {caption}{spoilt}")
    return lines
