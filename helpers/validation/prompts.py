"""The prompts of validation, with their embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

LONGEST_NAME = 60


@dataclass(frozen=True)
class Prompt:
    """A prompt, the name that its files have, and its embedding `[length, D]`."""

    name: str
    text: str
    embeds: Tensor


def named_prompts(prompt: str | None, library: Mapping[str, str]) -> dict[str, str]:
    """The single prompt, named by itself, and those of a library, by file names that are safe and unique."""
    texts = ({prompt: prompt} if prompt else {}) | dict(library)
    named: dict[str, str] = {}
    for key, text in texts.items():
        name = re.sub(r"\W+", "_", key.lower()).strip("_")[:LONGEST_NAME] or "prompt"
        if name in named:
            name = f"{name}_{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
        named[name] = text
    return named


def with_embeds(named: Mapping[str, str], embed: Callable[[str], Tensor]) -> tuple[Prompt, ...]:
    return tuple(Prompt(name, text, embed(text)) for name, text in named.items())
