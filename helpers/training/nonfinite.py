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
        images: of all processes.
        loss: a scalar; among several processes with the weight of its images in their mean.
        timesteps: int64 `[B]`.
        text: the sum of each embedding, or of its tokens, float32 `[B]`: not finite where one of its values is not.
    """

    uses: tuple[Use, ...]
    images: int
    loss: Tensor
    timesteps: Tensor
    text: Tensor


def all_finite(losses: Tensor, norm: Tensor) -> bool:
    """Whether the losses and the gradient's norm are finite: the one time in a step that a GPU is waited for."""
    return bool(torch.cat([norm.float().reshape(1), losses]).isfinite().all())


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The largest of all values, which unlike the sum of their squares is never too large for float32."""
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)


def reports(passes: Sequence[Passed]) -> list[tuple[bool, list[str]]]:
    """Of each pass whether its loss is finite, and the lines that tell its images: plain values, for other processes."""
    return [(math.isfinite(one.loss.item()), _lines(one)) for one in passes]


def describe(
    losses: Tensor,
    norm: Tensor,
    told: Sequence[tuple[bool, list[str]]],
    computed: torch.dtype,
    trained: torch.dtype,
) -> str:
    """What was not finite, in which dtypes, and the images, captions and timesteps that it came from.

    Args:
        told: the `reports` of all passes, of all processes.
        computed, trained: the dtypes of the forward pass and of what is trained.
    """
    spoilt = losses[~losses.isfinite()]
    if len(spoilt):
        what = f"the loss is {spoilt[0].item()}"
    else:
        what = f"the loss is {losses.mean().item():.4g}, but the gradient's norm is {norm.item()}"
    guilty = [lines for finite, lines in told if not finite] or [lines for _, lines in told]
    lines = "\n".join(line for some in guilty for line in some)
    return f"{what} (computed in {computed}, trained in {trained}). It came from:\n{lines}"


def _lines(one: Passed) -> list[str]:
    lines = []
    for use, timestep, text in zip(one.uses, one.timesteps.tolist(), one.text.tolist()):
        spoilt = "" if math.isfinite(text) else ", whose embedding is not finite"
        caption = repr(use.caption) if not use.dropped else "its caption dropped"
        lines.append(f"  {printable(use.record.path)}, timestep {timestep}, {caption}{spoilt}")
    return lines
