"""Options that existing env files and config files name and that this trainer does not have.

Their "off" value passes, because it asks for nothing. Any other value is refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from helpers.config.problems import found

FALSE = ("false", "0", "no", "off", "none")


@dataclass(frozen=True)
class Later:
    """A name without a meaning here. `off` is None where every value passes: another option switches it off."""

    name: str
    exports: tuple[str, ...]
    off: tuple[str, ...] | None
    instead: str

    @property
    def label(self) -> str:
        return f'--{self.name} (export {" or ".join(self.exports)}, key "{self.name}")'

    def problem(self, value: object) -> str | None:
        """What to tell the user who gave `value`; None where it asks for nothing."""
        off = self.off is None or value is None or str(value).strip().lower() in ("", *self.off)
        return None if off else f"{self.label}: found {found(value)}, which is not offered: {self.instead}"


_TABLE = (
    Later("push_to_hub", ("PUSH_TO_HUB",), FALSE, "set it to false and upload the output folder with `hf upload`"),
    Later("push_checkpoints_to_hub", ("PUSH_CHECKPOINTS",), FALSE,
          "set it to false and upload the output folder with `hf upload`"),
    Later("hub_model_id", ("HUB_MODEL_NAME",), None, ""),
)
LATER: Mapping[str, Later] = MappingProxyType({row.name: row for row in _TABLE})
"""By the option's name."""

LATER_EXPORTS: Mapping[str, Later] = MappingProxyType({name: row for row in _TABLE for name in row.exports})

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
