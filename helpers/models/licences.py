"""The licences of the published models, which what is trained on them inherits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.config.families import DEEPFLOYD_I, DEEPFLOYD_II, STABLE_DIFFUSION


@dataclass(frozen=True)
class Licence:
    """A licence as the hub names it.

    Attributes:
        key: of the hub's list; "other" for one that is not in it.
        name: what people call it.
        link: its text.
    """

    key: str
    name: str
    link: str


IF = Licence("other", "deepfloyd-if-license", "https://huggingface.co/spaces/DeepFloyd/deepfloyd-if-license")
OPENRAIL = Licence(
    "creativeml-openrail-m", "CreativeML OpenRAIL-M", "https://huggingface.co/spaces/CompVis/stable-diffusion-license"
)
OPENRAIL_PLUS = Licence(
    "openrail++", "CreativeML OpenRAIL++-M",
    "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
)  # fmt: skip

_SD = {**{hub_id: flavour for flavour, hub_id in STABLE_DIFFUSION.flavours.items()}, **STABLE_DIFFUSION.former_names}

LICENCES: Mapping[str, Licence] = MappingProxyType(
    {hub_id: IF for family in (DEEPFLOYD_I, DEEPFLOYD_II) for hub_id in family.flavours.values()}
    | {hub_id: OPENRAIL if flavour.startswith("1.") else OPENRAIL_PLUS for hub_id, flavour in _SD.items()}
    | {"stabilityai/stable-diffusion-x4-upscaler": OPENRAIL_PLUS}
)
"""By the models' hub ids; of others nothing is known."""
