"""Weights that cannot be used: how that is found, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.config.options import ROWS

OPTION = ROWS["pretrained_model_name_or_path"].label


class WeightsError(Exception):
    """The named weights cannot be used; the message says why and what to type instead."""


def unfit(what: str, folder: Path, error: Exception) -> WeightsError:
    """What to raise where a library cannot make a model of files, each of which looks sound."""
    return WeightsError(
        f"{OPTION}: {what} in {folder} cannot be loaded, as its files do not fit together"
        f" ({type(error).__name__}: {error}): download it again."
    )


def load_whole(kind: type, folder: Path, **options: Any) -> Any:
    """A library's model, with all of its weights from the safetensors files of a folder.

    What the files lack transformers draws at random, and diffusers leaves without values; neither says so.

    Raises:
        ValueError: the files lack some, or whatever else the library finds.
    """
    # Never a pickled file, which the libraries would fall back to.
    model, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing):,} of its weights are in no file, such as {missing[0]}")
    return model
