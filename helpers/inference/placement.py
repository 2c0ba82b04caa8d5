"""Where a component's weights lie, and how much it does at a time, so that it stays within a device's memory."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.models.footprint import Footprint

GB = 10**9

RESERVED = 700_000_000
"""Bytes of a GPU that CUDA itself, its libraries and fragments take."""

MOST = 16
"""Pictures made at a time, at the most: a recipe names all of them."""

MOST_PIXELS_ON_CPU = 16 * 64 * 64
"""There more at a time only takes memory."""


@dataclass(frozen=True)
class Place:
    """How a component works.

    Attributes:
        by_groups: its weights wait in the host's memory, and come to the device layer by layer.
        batch: pictures or captions at a time, a power of two.
        tiled: a picture is made in tiles.
        bytes: what it takes of the device.
    """

    by_groups: bool
    batch: int
    tiled: bool
    bytes: int


@dataclass(frozen=True)
class Budget:
    """What may be taken of a device.

    Attributes:
        bytes: None where nothing limits it.
        words: what it is and why.
        rewards_batches: whether more at a time is faster, as on a GPU.
    """

    bytes: int | None
    words: str
    rewards_batches: bool = True


def budget_of(vram: str, kind: str, free: int | None) -> Budget:
    """What `--vram` allows.

    Args:
        kind: of device, such as cuda.
        free: bytes that a GPU has free; None where that is not known.
    """
    if kind != "cuda":
        return Budget(None, f"on the {kind.upper()}, whose memory is not counted", rewards_batches=False)
    if vram == "max" or (vram == "auto" and free is None):
        return Budget(None, "all of the GPU (--vram max)" if vram == "max" else "all of the GPU")
    if vram == "auto":
        return Budget(max(0, free - RESERVED), f"{free / GB:.1f} GB, which are free on the GPU")
    return Budget(int(vram) * GB - RESERVED, f"{vram} GB, as --vram says")


def place(
    need: Footprint, budget: Budget, pixels: int = 0, most: int = MOST, tiled: Footprint | None = None
) -> Place:
    """How a component works within a budget: whole if it fits with one picture, else in groups.

    What does not fit at all gets what takes least.

    Args:
        pixels: of a picture.
        most: at a time.
        tiled: what it takes for a picture made in tiles, where that can be.
    """
    if budget.bytes is None:
        limit = max(1, MOST_PIXELS_ON_CPU // pixels) if pixels and not budget.rewards_batches else most
        batch = _power_of_two(min(most, limit))
        return Place(False, batch, False, need.peak(batch))
    by_groups = need.peak(1) > budget.bytes
    if by_groups and tiled:
        return Place(False, 1, True, tiled.peak(1))
    resident = need.group if by_groups else need.weights
    room = (budget.bytes - resident) // need.each if need.each else most
    batch = _power_of_two(max(1, min(most, room)))
    return Place(by_groups, batch, False, need.peak(batch, by_groups))


def _power_of_two(number: int) -> int:
    """The largest one of at most `number`, so that a smaller batch never lies across two larger ones."""
    return 1 << (number.bit_length() - 1)
