"""Validation by prompts: what the model draws of each, at each size."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from helpers.training.loop import Run
from helpers.validation.recipe import Shown, picture_name
from helpers.validation.render import Rendered, Sampling
from helpers.validation.sheet import Cell

LONGEST_NAME = 60
LONGEST_BYTES = 100  # file systems allow 255, and a name of a file is made of two of these


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the name that its files have."""

    name: str
    text: str


@dataclass(frozen=True)
class PromptPictures:
    """A picture of each prompt at each size."""

    sampling: Sampling
    prompts: tuple[Prompt, ...]

    @property
    def titles(self) -> dict[str, str]:
        return {
            picture_name(prompt.name, size): f"{prompt.text} ({size})"
            for prompt in self.prompts
            for size in self.sampling.sizes
        }

    def render(self, run: Run, folder: Path) -> Rendered:
        pipeline = self.sampling.pipeline(run)
        embeds = [self.sampling.embed(prompt.text) for prompt in self.prompts]
        shown = [Shown(name=prompt.name, prompt=prompt.text) for prompt in self.prompts]
        columns = []
        for size in tqdm(self.sampling.sizes, desc=f"Validation at step {run.step}", unit="size", leave=False):
            images = self.sampling.images(pipeline, size, embeds)
            self.sampling.save(run, folder, size, shown, images)
            columns.append([Cell(image, f"{prompt.text} ({size})") for prompt, image in zip(self.prompts, images)])
        return Rendered([list(row) for row in zip(*columns)])


def safe_name(text: str) -> str:
    """A short name for files that stands for `text`."""
    name = re.sub(r"\W+", "_", text.lower()).strip("_")[:LONGEST_NAME]
    return name.encode()[:LONGEST_BYTES].decode(errors="ignore") or "prompt"


def named_prompts(prompt: str | None, library: Mapping[str, str]) -> dict[str, str]:
    """The single prompt, named by itself, and those of a library, by file names that are safe and unique."""
    texts = ({prompt: prompt} if prompt else {}) | dict(library)
    named: dict[str, str] = {}
    for key, text in texts.items():
        name = safe_name(key)
        while name in named:
            name = f"{name}_{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
        named[name] = text
    return named
