"""The architectures of the published models, kept here so that what they need can be told without a download."""

from __future__ import annotations

from pathlib import Path

ARCHITECTURES = Path(__file__).parent / "architectures"


def architecture(hub_id: str) -> Path | None:
    """The `config.json` of a published model's UNet; None for other models."""
    owner, _, name = hub_id.partition("/")
    path = ARCHITECTURES / f"{name}_unet.json"
    return path if owner == "DeepFloyd" and path.exists() else None
