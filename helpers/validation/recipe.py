"""The recipe of a validation picture: all that makes it again, and nothing of where its user keeps things."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from helpers.config.paths import LONGEST_NAME, from_root
from helpers.files import CONTROLS, on_one_line
from helpers.sizes import Size

IMAGES = "validation_images"
MOST_TOGETHER = 1024
"""How many pictures a batch may have: of 8x8 pixels, the smallest, one has as many."""


class NotReplayable(Exception):
    """A picture that cannot be made again; the message says why, and how such a picture can be."""


def _plain(name: str) -> str:
    """The name of a file. Raises ValueError for what is none, or leads to another folder."""
    if name in ("", ".", "..") or "/" in name or CONTROLS.search(name) or len(name.encode()) > LONGEST_NAME:
        raise ValueError("needs the plain name of a file")
    return name


def _below(path: str) -> str:
    """The place of a file inside a folder. Raises ValueError for one that leads out of it."""
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts:
        raise ValueError("needs the place of a file inside its folder")
    from_root(path)  # raises for what no file system could have
    return path


def _not_above(path: str) -> str:
    """A folder as `paths.portable` tells it."""
    return path if path in (".", "~") else _below(path)


def _words(text: str) -> str:
    """What can be encoded. Raises ValueError for halves of UTF-16 pairs."""
    text.encode()
    return text


Words = Annotated[str, AfterValidator(_words)]
Name = Annotated[str, AfterValidator(_plain)]
Inside = Annotated[str, AfterValidator(_below)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class File(_Part):
    """An image of a dataset: its place in the dataset's folder, and the SHA-256 of its bytes."""

    dataset: str
    path: Inside
    content: str


class Shown(_Part):
    """What a picture shows.

    Attributes:
        name: its file's, without the size.
        prompt: a validation prompt, or the caption of `image`.
        image: what it is made of, where that is an eval image.
        control: the conditioning image of that.
    """

    name: Name
    prompt: Words
    image: File | None = None
    control: File | None = None


class Recipe(_Part):
    """How a picture was made.

    Attributes:
        base_model: a hub id, or what `paths.portable_model` tells of a path.
        base_fingerprint: `planning.Job.base`.
        output_dir: of the training, as `paths.portable` tells it.
        picture: the name of its file, without the suffix.
        scheduler: a key of `schedulers.SAMPLERS`.
        scheduler_changes: what it is told otherwise than the base's.
        precision: of the computation.
        averaged: whether the weights were the moving average of the trained ones.
        device: the kind of it.
        together: what was made in one batch, in its order, the picture itself among it: on some machines a picture's
            last bits depend on the others.
    """

    version: Literal[1] = 1
    kind: Literal["validation"] = "validation"
    model_type: str
    base_model: str
    base_fingerprint: str
    pipeline: str
    output_dir: Annotated[str, AfterValidator(_not_above)]
    step: Annotated[int, Field(ge=0)]
    picture: Name
    prompt: str
    negative_prompt: Words
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]
    seed: int
    inference_steps: int
    guidance: float
    guidance_rescale: float
    scheduler: str
    scheduler_changes: dict[str, Any]
    noise_level: int | None = None
    precision: str
    averaged: bool
    device: str
    together: Annotated[list[Shown], Field(min_length=1, max_length=MOST_TOGETHER)]
    versions: dict[str, str]

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    @property
    def options(self) -> dict[str, Any]:
        """The options of a training that draws only this again."""
        drawn = {
            "validation_prompt": None,
            "validation_prompt_library": None,
            "validation_negative_prompt": self.negative_prompt,
            "validation_resolution": str(self.size),
            "validation_num_inference_steps": self.inference_steps,
            "validation_guidance": self.guidance,
            "validation_guidance_rescale": self.guidance_rescale,
            "validation_noise_scheduler": self.scheduler,
            "validation_seed": self.seed,
            "use_ema": self.averaged,
        }
        return drawn | ({} if self.noise_level is None else {"validation_noise_level": self.noise_level})


def picture_name(name: str, size: Size) -> str:
    """The name of a picture's file, without its suffix."""
    return f"{name}_{size}"


def made_with() -> dict[str, str]:
    """The versions of what computes a picture."""
    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def read(recipe: Mapping[str, Any]) -> Recipe:
    """A recipe that anyone may have written, checked.

    Raises:
        NotReplayable: it is none of a validation picture.
    """
    try:
        read = Recipe.model_validate(dict(recipe))
    except ValidationError as error:
        first = error.errors()[0]
        place = on_one_line(".".join(str(part) for part in first["loc"])) or "recipe"
        raise NotReplayable(f"The picture's recipe cannot be used: {place}: {on_one_line(first['msg'])}.") from error
    if read.picture not in {picture_name(shown.name, read.size) for shown in read.together}:
        raise NotReplayable("The picture's recipe cannot be used: the picture is not among those that it makes.")
    return read
