"""The recipe of a picture: all that makes it again, as its PNG carries it; anyone may have written one that is read."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.config.inference import STAGES
from helpers.config.inference_options import Weighed, plain
from helpers.config.options import LARGEST, LONGEST_FOLDER, LONGEST_TEXT
from helpers.config.paths import portable, portable_model
from helpers.files import on_one_line, printable
from helpers.images.recipes import NoRecipe, read_recipe
from helpers.inference.placement import MOST
from helpers.inference.stages import Stage
from helpers.models.fingerprints import fingerprint_file, fingerprint_files, fingerprint_model, fingerprint_unet
from helpers.models.schedulers import SCHEDULER_CONFIG

KIND = "inference"
PACKAGES = ("torch", "diffusers", "transformers", "peft")

DIGITS = 16
"""How many of a fingerprint are kept, in hex."""

SAID = ("variant", "prediction_type", "scheduler", "negative_prompt", "any_base", "safety_checker", "watermark")
"""Options that a recipe says as they were."""

Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Fingerprint = Annotated[str, Field(max_length=DIGITS)]


class NotReplayable(Exception):
    """A picture that cannot be made again; the message says why, and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Made(_Part):
    """One of the pictures that were made together.

    Attributes:
        name: how its files' names begin.
        image: what it was made of, where that was the user's own; and a fingerprint of its file.
    """

    name: Annotated[str, Field(max_length=LONGEST_FOLDER)]
    prompt: Text
    seed: Annotated[int, Field(ge=0, le=2 * LARGEST)]
    image: Text | None = None
    content: Annotated[str, Field(max_length=64)] | None = None


class StageRecipe(_Part):
    """What a stage was.

    Attributes:
        stage: the option that names its model.
        model: fingerprints by component.
        adapters: their fingerprints, in the order of the option.
        batch: pictures made at a time.
        tiled: whether the VAE made them in tiles.
    """

    stage: Literal["stage1", "stage2", "upscaler"]
    model: dict[Annotated[str, Field(max_length=40)], Fingerprint]
    adapters: list[Fingerprint]
    size: Annotated[str, Field(max_length=20)]
    batch: Annotated[int, Field(ge=1, le=MOST)]
    tiled: bool = False


class Recipe(_Part):
    """How a picture was made.

    Attributes:
        options: by their names in the table of inference.py, which checks them again.
        pictures: those that were made together, in their order: on some machines a picture's last bits hang on the
            others.
        index: which of them this one is.
        start: the size that the user's own images were brought to.
        device: its kind.
    """

    version: Literal[1] = 1
    kind: Literal["inference"] = KIND
    options: dict[Annotated[str, Field(max_length=40)], str | int | float | bool]
    pictures: Annotated[list[Made], Field(min_length=1, max_length=MOST)]
    index: Annotated[int, Field(ge=0, lt=MOST)]
    stages: Annotated[list[StageRecipe], Field(min_length=1, max_length=len(STAGES))]
    start: Annotated[str, Field(max_length=20)] | None = None
    dtype: Literal["bf16", "fp32"]
    device: Annotated[str, Field(max_length=200)]
    versions: dict[Annotated[str, Field(max_length=40)], Annotated[str, Field(max_length=80)]]

    @property
    def picture(self) -> Made:
        return self.pictures[self.index]

    def said(self) -> dict[str, Any]:
        """The options as `read_request` takes them."""
        own = {"image": self.picture.image} if self.picture.image else {}
        absent = {stage: "none" for stage in STAGES if self._lacks(stage)}
        return absent | self.options | own | {"size": self.stages[-1].size, "dtype": self.dtype}

    def _lacks(self, option: str) -> bool:
        return option not in {stage.stage for stage in self.stages}


def read(image: Path) -> dict[str, Any]:
    """The recipe in an image, of whatever kind.

    Raises:
        NotReplayable: there is none that can be read.
    """
    try:
        return read_recipe(image)
    except (OSError, NoRecipe) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise NotReplayable(f"--replay: {printable(image)} cannot be made again: {words}.") from error


def parse(content: Mapping[str, Any], image: Path) -> Recipe:
    """A recipe of this kind.

    Raises:
        NotReplayable: it is none.
    """
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        words = on_one_line(f"{where}: {wrong['msg']}")[:300]
        raise NotReplayable(f"--replay: the recipe of {printable(image)} is damaged ({words}).") from None
    allowed = {*SAID, "single_file_config", "steps", "guidance", "noise_level", *STAGES, *(f"{stage}_lora" for stage in STAGES)}
    strange = sorted(set(recipe.options) - allowed)
    if strange or recipe.index >= len(recipe.pictures):
        raise NotReplayable(f"--replay: the recipe of {printable(image)} is damaged ({', '.join(strange) or 'index'}).")
    return recipe


def options_of(options: Any, stages: list[Stage]) -> dict[str, Any]:
    """What the options come to for these stages, each said in full."""
    said = {name: plain(getattr(options, name)) for name in SAID}
    if options.single_file_config:
        said["single_file_config"] = portable_model(options.single_file_config, whole=True)
    for stage in stages:
        said[stage.option] = portable_model(stage.base.name, whole=True)
        if stage.adapters:
            weighed = [Weighed(portable(one.file.path.absolute(), whole=True), one.scale) for one in stage.adapters]
            said[f"{stage.option}_lora"] = ",".join(f"{path}:{scale!r}" for path, scale in weighed)
    levels = [stage.noise_level for stage in stages if stage.noise_level is not None]
    said |= {"steps": ",".join(str(stage.steps) for stage in stages)}
    said |= {"guidance": ",".join(repr(float(stage.guidance)) for stage in stages)}
    said |= {"noise_level": ",".join(map(str, levels))} if levels else {}
    return {name: value for name, value in said.items() if value not in (None, "")}


def fingerprints(stage: Stage, folder: Path, text: Mapping[str, str]) -> dict[str, str]:
    """What tells whether a stage's model is that of before, by component."""
    spec = stage.base.spec
    found = {"unet": fingerprint_unet(folder, stage.variant), "text": text["text_encoder"]}
    for name in ("scheduler", spec.conditioning.scheduler):
        found |= {name: fingerprint_files(folder / name, (SCHEDULER_CONFIG,))} if name else {}
    if spec.space.component:
        found["vae"] = fingerprint_model(folder / spec.space.component, stage.variant)
    return {name: value[:DIGITS] for name, value in found.items()}


def adapter_fingerprints(stage: Stage) -> list[str]:
    return [fingerprint_file(one.file.path)[:DIGITS] for one in stage.adapters]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
