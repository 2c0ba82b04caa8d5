"""The architectures of the published models, kept here so that what they need can be told without a download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from helpers.config.families import DEEPFLOYD_III, STABLE_DIFFUSION

ARCHITECTURES = Path(__file__).parent / "architectures"

_LIKE = {
    "1.4": "stable-diffusion-v1", "1.5": "stable-diffusion-v1",
    "2.0-base": "stable-diffusion-2-base", "2.1-base": "stable-diffusion-2-base",
    "2.0": "stable-diffusion-2", "2.1": "stable-diffusion-2",
    "iii-x4": "stable-diffusion-x4-upscaler",
}  # fmt: skip
LIKE: Mapping[str, str] = MappingProxyType(
    {hub_id: _LIKE[flavour] for flavour, hub_id in (STABLE_DIFFUSION.flavours | DEEPFLOYD_III.flavours).items()}
    | {hub_id: _LIKE[flavour] for hub_id, flavour in STABLE_DIFFUSION.former_names.items()}
)
"""Models of several names and one architecture."""


def text_encoder_of(architecture: Path) -> Path:
    """The `config.json` of the text encoder that a UNet is trained with: in its pipeline's folder, or published.

    Args:
        architecture: that of the UNet.
    """
    if architecture.parent == ARCHITECTURES:
        return architecture.with_name(architecture.name.replace("_unet", "_text_encoder"))
    return architecture.parent.parent / "text_encoder" / architecture.name


def vae_of(architecture: Path) -> Path | None:
    """The `config.json` of the VAE that a UNet's latents are of, in the same places; None where none is there."""
    if architecture.parent != ARCHITECTURES:
        path = architecture.parent.parent / "vae" / architecture.name
        return path if path.is_file() else None
    own = architecture.with_name(architecture.name.replace("_unet", "_vae"))
    if own.is_file():
        return own
    return ARCHITECTURES / "stable-diffusion_vae.json" if architecture.name.startswith("stable-diffusion") else None


def architecture(hub_id: str) -> Path | None:
    """The `config.json` of a published model's UNet; None for other models."""
    owner, _, name = hub_id.partition("/")
    if hub_id not in LIKE and owner != "DeepFloyd":
        return None
    path = ARCHITECTURES / f"{LIKE.get(hub_id, name)}_unet.json"
    return path if path.exists() else None
