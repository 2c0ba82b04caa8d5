"""What `inference.py` does once its options are checked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.caching.embeds import NonFiniteEmbedding
from helpers.caching.store import DamagedShard
from helpers.config.inference import Request, is_file, read_request
from helpers.config.inference_options import InferenceOptions
from helpers.config.paths import shown
from helpers.config.problems import ConfigError
from helpers.files import existing_parent, printable
from helpers.images.recipes import compared
from helpers.inference import recipe as recipes
from helpers.inference.cascade import free_file, render
from helpers.inference.plan import describe, plan
from helpers.inference.recipe import NotReplayable, Recipe
from helpers.models.errors import WeightsError
from helpers.models.results import AdapterError

REFUSALS = (ConfigError, WeightsError, AdapterError, NotReplayable, NonFiniteEmbedding, DamagedShard)
"""What the user's input can be wrong in: each says in words what to change."""


def run(request: Request, arguments: Sequence[str], recipe: Mapping[str, Any] | None = None) -> int:
    """Draw, or say what would be drawn; returns the exit code.

    Args:
        arguments: the flags, which are read again beside a recipe's options.
        recipe: of the picture to make again, as its file has it.

    Raises:
        one of `REFUSALS`, DiskFull.
    """
    again = None if recipe is None else recipes.parse(recipe, request.options.replay)
    if again:
        request = read_request(arguments, again.said())
    _require_writable(request.options)
    planned = plan(request, again)
    for line in (*planned.notes, *describe(planned)):
        print(line)
    if request.options.dry_run:
        print("Dry run: nothing was downloaded or drawn.")
        return 0
    for line in _made_otherwise(again, recipes.device_name(planned.device)) if again else ():
        print(line)
    for path in render(planned, again):
        print(shown(path))
        if again:
            print(compared(path, request.options.replay))
    return 0


def _require_writable(options: InferenceOptions) -> None:
    """See that pictures and embeddings can be written, without making a folder yet."""
    folder = options.output.parent if is_file(options.output) else options.output
    problems = []
    for option, place in (("--output", folder), ("--cache_dir", options.cache_dir)):
        try:
            with tempfile.TemporaryFile(dir=existing_parent(place)):
                pass
        except OSError as error:
            words = f"{printable(place)} cannot be written to ({error.strerror}): name another folder"
            problems.append(f"{option}: {words}")
    if problems:
        raise ConfigError(problems)


def _made_otherwise(again: Recipe, device: str) -> list[str]:
    """What is not as it was, so that the picture may differ in its last bits."""
    now = {"device": device, **recipes.versions()}
    before = {"device": again.device, **again.versions}
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    differing = [f"{name} was {before[name]}, is {now[name]}" for name in changed]
    return [f"The bytes may differ: {', '.join(differing)}."] if differing else []


def output_of_replay(request: Request) -> Path:
    """Where a training's picture goes, which is made again by that training's code and options.

    Raises:
        ConfigError: other flags were typed, or nothing can be written there.
    """
    options, others = request.options, sorted(request.flags - {"replay", "output"})
    if others:
        words = "found beside --replay of a training's picture, which can only be made as it was: leave it out"
        raise ConfigError([f"--{name}: {words}" for name in others])
    _require_writable(options)
    if is_file(options.output):
        return options.output
    return free_file(options.output, options.replay.stem)
