"""Options that existing env files name and that this trainer does not have.

Their "off" value passes, because it asks for nothing. Any other value is refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from helpers.config.problems import found

FALSE = ("false", "0", "no", "off", "none", "no_change")

LATER_PREFIXES: Mapping[str, str] = MappingProxyType({
    "TEXT_ENCODER_": "remove it: TRAIN_TEXT_ENCODER=true trains a LoRA of all of CLIP, for as long as the UNet's",
    "DELETE_": "set it to false, the dataset is only read: images that cannot be used are left out and listed",
})
"""Exports that begin so, with what to do instead."""


def prefixed_problem(name: str, value: str) -> str | None:
    """The problem with an export of `LATER_PREFIXES`; None where it is off or no such export."""
    instead = next((words for prefix, words in LATER_PREFIXES.items() if name.startswith(prefix)), None)
    if instead is None or value.strip().lower() in ("", *FALSE):
        return None
    return f"export {name}: found {found(value)}, which is not offered: {instead}"
