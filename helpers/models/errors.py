"""What is said of weights that cannot be used."""

from __future__ import annotations

from pathlib import Path

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
