"""How much of what a GPU can compute a training makes use of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.models.ledger import META
from helpers.sizes import Size
from helpers.training.memory import Setup, loss_without_data, without_data
from helpers.training.nonfinite import Passed

PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H200 NVL": 835, "H800": 989, "H800 PCIe": 756, "H100": 989,
    "H100 NVL": 835, "H100 PCIe": 756, "A100": 312, "A800": 312, "A40": 149.7, "A30": 165, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 6000 Ada": 364, "RTX A6000": 154.8, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5,
    "RTX 3090 Ti": 80, "RTX 3090": 71,
}  # fmt: skip
"""By words of a GPU's name, 1e12 operations a second in two bytes, dense, summed in float32: NVIDIA's data sheets."""


LESS = re.compile(r"Laptop|MIG|GRID|-\d+[A-Z]$|RTX \d+ D\b")
"""Names of a part of such a GPU, or of one that is slower than its name."""


def peak_of(name: str) -> float | None:
    """Floating-point operations a second of the GPU of this name, as CUDA tells it; None where it is not known."""
    known = [] if LESS.search(name) else [words for words in PEAKS if re.search(rf"\b{words}\b", name)]
    return PEAKS[max(known, key=len)] * 1e12 if known else None


def operations(setup: Setup) -> int:
    """Floating-point operations of a forward and a backward pass of one sample; multiplying and adding are two.

    Counted are products of matrices, convolutions and attention; what gradient checkpointing computes twice, once.
    """
    # In float32 all layers fit together, where only autocast makes them do so otherwise.
    in_float32 = {"weights": torch.float32, "trained": torch.float32, "autocast": False}
    setup = replace(setup, batch_size=1, checkpointing=False, **in_float32)
    with FlopCounterMode(display=False) as counter, META:
        loss_without_data(without_data(setup), setup).backward()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Utilisation:
    """MFU, the model FLOPs utilisation (Chowdhery et al. 2022, appendix B).

    Attributes:
        peak: operations a second that the GPU can do.
        of_a_pixel: operations of a sample, for each pixel of its image: of images of other sizes nearly the same.
    """

    peak: float
    of_a_pixel: float

    def operations(self, passes: Sequence[Passed]) -> float:
        """Those of this process in some passes."""
        sizes = [use.plan.target for one in passes for use in one.uses]
        return self.of_a_pixel * sum(size.width * size.height for size in sizes)

    def share(self, operations: float, seconds: float) -> float:
        """The share, 0 to 1, of what the GPU could have done."""
        return operations / seconds / self.peak


def utilisation_of(setup: Setup, size: Size, device: torch.device) -> Utilisation | None:
    """That of a run whose images have this size, in pixels; None where it is not known what the device can do.

    Operations in float32, and a CPU's, have other limits.
    """
    in_two_bytes = setup.autocast or setup.weights != torch.float32
    if device.type != "cuda" or not in_two_bytes or not (peak := peak_of(torch.cuda.get_device_name(device))):
        return None
    return Utilisation(peak, operations(setup) / (size.width * size.height))
