"""Models to sample with, of whatever family: found by name, told by their files, loaded one component at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from helpers.config.families import FAMILIES, Family
from helpers.config.jsonfile import load_json
from helpers.models import loading, single_file
from helpers.models.errors import OPTION, WeightsError, load_whole, unfit
from helpers.models.families import SPECS
from helpers.models.published import ARCHITECTURES, architecture, text_encoder_of, vae_of
from helpers.models.single_file import Conversion
from helpers.models.spec import Spec
from helpers.models.text import T5

PUBLISHED_T5 = ARCHITECTURES / "t5-v1_1-xxl_text_encoder.json"
"""That of all published stages of DeepFloyd IF."""

TEXT = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Base:
    """A model to sample with.

    Attributes:
        name: a hub id, or the path of a folder or of a single file.
        configs: the folder with its small files; None where it is not at hand, and nothing may be downloaded.
        architecture: the UNet's `config.json`; None where that is not known either.
        source: the hub id, or the folder, that its weights are read from.
        notes: what the user should be told.
    """

    name: str
    family: Family
    spec: Spec
    configs: Path | None
    architecture: Path | None
    source: str
    notes: tuple[str, ...] = ()

    @property
    def unet(self) -> Mapping[str, Any]:
        """The UNet's configuration; empty where it is not known."""
        return load_json(self.architecture) if self.architecture else {}

    @property
    def text_encoder(self) -> Path | None:
        """The text encoder's `config.json`, if that is at hand."""
        own = text_encoder_of(self.architecture) if self.architecture else None
        paths = [own, PUBLISHED_T5 if self.configs is None and isinstance(self.spec.text, T5) else None]
        return next((path for path in paths if path and path.is_file()), None)

    @property
    def vae(self) -> Mapping[str, Any]:
        """The VAE's configuration; empty where it is not known."""
        path = vae_of(self.architecture) if self.architecture else None
        return load_json(path) if path else {}

    @property
    def reads_text_by_itself(self) -> bool:
        """Whether it comes with a text encoder, as most do; of models on the hub all."""
        return self.configs is None or all((self.configs / name).is_dir() for name in TEXT)

    @property
    def scale(self) -> int:
        """How many times larger than its low-resolution image its picture is; 1 where there is none."""
        return getattr(self.spec.conditioning, "scale", 1)

    @property
    def edge(self) -> int:
        """The edge in pixels of the pictures that it was made for."""
        factor = getattr(self.spec.space, "factor", 1)
        edge = self.unet.get("sample_size")
        return edge * factor if isinstance(edge, int) and edge > 0 else self.family.resolution


def find(name: str, download: bool) -> Base:
    """The model of that name, its configuration checked.

    Args:
        download: fetch its small files where they are on the hub.

    Raises:
        WeightsError: it cannot be had, or it is none that can be sampled here.
    """
    if not download and not Path(name).is_dir():
        return _known(name)
    folder = loading.fetch_any_configs(name)
    family = loading.family_of(folder)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise WeightsError(f"{OPTION}: the model in {folder} is none of those that are known here: {known}.")
    spec = SPECS[family.key]
    without = [] if any((folder / part).exists() for part in TEXT) else TEXT
    loading.check(family, spec, folder, without=without)
    return Base(name, family, spec, folder, folder / "unet" / "config.json", name)


def find_single_file(conversion: Conversion, make: bool) -> Base:
    """The model in a single file, of which a folder is made first, once.

    Args:
        make: make the folder where it is not there yet; else it is told by the configurations that it will have.

    Raises:
        WeightsError: the folder cannot be made.
        DiskFull: it has no room.
    """
    notes = tuple(conversion.told())
    if make:
        single_file.make(conversion)
    if conversion.is_made:
        base = find(str(conversion.folder), download=False)
    else:  # the weights beside those configurations, where there are any, are others
        base = replace(find(conversion.configs, download=False), configs=None)
    return replace(base, name=str(conversion.file.path), notes=notes)


def _known(name: str) -> Base:
    """A model of the hub, by what is known of it here."""
    at_hand = loading.at_hand(name, None, "unet/config.json")
    named = (one for one in FAMILIES if name in one.flavours.values() or name in one.former_names)
    family = next(named, None) or (loading.family_of(at_hand.parent.parent) if at_hand else None)
    if family is None:
        raise WeightsError(f"{OPTION}: {name} is on the hub, and nothing is known of it here without a download.")
    return Base(name, family, SPECS[family.key], None, at_hand or architecture(name), name)


def fetch(base: Base, variant: str | None, only: Collection[str]) -> Path:
    """The folder with the weights of these components, downloaded where it has to be.

    Raises:
        WeightsError: they cannot be had, or are not whole.
    """
    folder = loading.fetch_weights(base.source, None, variant, base.spec, only)
    loading.check_weight_files(folder, variant, base.spec, only)
    return folder


def variant_of(base: Base, variant: str | None) -> str | None:
    """The variant to take of a model's weights: of a local folder only one that it has."""
    if variant is None or not Path(base.source).is_dir():
        return variant
    return variant if any(Path(base.source).glob(f"unet/*.{variant}.safetensors")) else None


def load_unet(folder: Path, dtype: torch.dtype, variant: str | None) -> UNet2DConditionModel:
    """A pipeline's UNet, on the CPU.

    Raises:
        WeightsError: its files do not fit together.
    """
    try:
        return load_whole(UNet2DConditionModel, folder / "unet", dtype=dtype, variant=variant).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a config of any content makes diffusers raise
        raise unfit("the UNet", folder, error) from error
