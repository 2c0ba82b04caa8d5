"""What a saved adapter tells of itself, in its safetensors metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, UNet2DConditionModel
from pydantic import TypeAdapter
from safetensors import safe_open

from helpers.files import on_one_line
from helpers.models.parts import LossSettings
from helpers.models.schedulers import ZERO_TERMINAL_SNR, prediction_type_of
from helpers.models.spec import Spec

PREFIX = "floydtuner."


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is trained on, and what sampling must do as the training did.

    Attributes:
        base_model: a hub id, or the name of a local folder or file; never a path.
        family: the key of a `config.families.Family`, which tells the stage.
        pipeline: the class of diffusers that samples it.
        variance_type: that of the scheduler to sample with: a predicted variance is of use only where it was trained.
            None for schedulers that know none.
        zero_terminal_snr: see `schedulers.ZERO_TERMINAL_SNR`.
        caption_cleaning: how captions are prepared, the `cleaning` of the family's text side.
        token_length: positions of the text that the UNet attends to.
        base_fingerprint: of the UNet's files (`fingerprints.fingerprint_unet`), by which the base is known under any
            name; files from before there was one have None.
    """

    base_model: str
    family: str
    pipeline: str
    prediction_type: str
    variance_type: str | None = None
    zero_terminal_snr: bool = False
    caption_cleaning: str
    token_length: int
    base_fingerprint: str | None = None

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """What a scheduler of the base must be told to sample what was trained."""
        variance = {"variance_type": self.variance_type} if self.variance_type else {}
        return variance | (dict(ZERO_TERMINAL_SNR) if self.zero_terminal_snr else {})


@dataclass(frozen=True, kw_only=True)
class AdapterFacts(Origin):
    """What a saved adapter is.

    Attributes:
        kind: lora, dora, bitfit or controlnet; the first two alone have a rank, an alpha and targets.
        rslora: the adapter's output is scaled by alpha / sqrt(rank) instead of alpha / rank.
        targets: the layers that have an adapter, a key of `config.families.LORA_TARGETS`.
        text_encoder_rank, text_encoder_alpha: those of the text encoder's adapter, where it has one in the same file.
        ranks: other ranks for some of them, as the option `lora_rank_pattern` has them; None where there are none.
        base_precision: what the base's weights were kept in while it was trained, int8 or nf4; None: as they were
            loaded. It fits the base in any precision.
    """

    kind: str
    rank: int | None = None
    alpha: float | None = None
    targets: str | None = None
    ranks: str | None = None
    rslora: bool = False
    text_encoder_rank: int | None = None
    text_encoder_alpha: float | None = None
    base_precision: str | None = None


def variance_type_of(folder: Path) -> str | None:
    """The variance that the scheduler of the pipeline in `folder` samples with, in diffusers' words, if it says so."""
    return DDPMScheduler.load_config(folder / "scheduler").get("variance_type")


def origin_of(
    name: str, family: str, spec: Spec, folder: Path, loss: LossSettings, fingerprint: str | None = None
) -> Origin:
    """The origin of what is trained on the weights in `folder`.

    Args:
        name: as the user gave it: a hub id, or the path of a folder or a file.
        loss: what is trained; a variance only where the UNet predicts one.
        fingerprint: of the UNet's files.
    """
    predicted = UNet2DConditionModel.load_config(folder / "unet")["out_channels"] == 2 * spec.space.channels
    own = variance_type_of(folder)
    # The base's, where nothing changes it.
    fixed = "fixed_small" if predicted or (own and own.startswith("learned")) else own
    return Origin(
        base_model=Path(name).name if Path(name).exists() else name,
        family=family,
        pipeline=spec.pipeline,
        prediction_type=prediction_type_of(folder),
        variance_type="learned_range" if predicted and loss.trains_variance else fixed,
        zero_terminal_snr=loss.zero_terminal_snr,
        caption_cleaning=spec.text.cleaning,
        token_length=spec.text.length,
        base_fingerprint=fingerprint,
    )


def metadata(origin: Origin, **own: Any) -> dict[str, str]:
    """The metadata of a safetensors file with an adapter; `own` are the fields that `AdapterFacts` has beside Origin's.

    The "format" is what diffusers and transformers expect in any file of theirs.
    """
    facts = asdict(AdapterFacts(**asdict(origin), **own))
    return {"format": "pt"} | {
        PREFIX + name: value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items() if value is not None
    }


def read_adapter_facts(path: Path) -> AdapterFacts | None:
    """What the adapter in a safetensors file tells of itself; None for one that this project did not make.

    Anyone may have written it, and it is shown on consoles: each text is on one line.

    Raises:
        ValueError: facts are missing or are of the wrong kind.
    """
    with safe_open(path, framework="pt") as file:
        stored: Mapping[str, str] = file.metadata() or {}
    facts = {name.removeprefix(PREFIX): on_one_line(value) for name, value in stored.items() if name.startswith(PREFIX)}
    return TypeAdapter(AdapterFacts).validate_python(facts) if facts else None
