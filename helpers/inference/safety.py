"""The safety checker and the watermark that a model's folder brings along, for those who switch them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from helpers.config.jsonfile import load_json
from helpers.models import loading
from helpers.models.bases import Base
from helpers.models.errors import WeightsError, load_whole, unfit


class _Finished:
    """What transformers asks of each model's `__init__` in the end, and diffusers' checkers leave out."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.post_init()


CHECKERS = {
    kind.__name__: type(kind.__name__, (_Finished, kind), {})
    for kind in (IFSafetyChecker, StableDiffusionSafetyChecker)
}
"""The kinds of checkers that a pipeline may list."""

CHECKER, EXTRACTOR, WATERMARKER = "safety_checker", "feature_extractor", "watermarker"


class SafetyChecker:
    """Tells which pictures are not to be shown.

    Raises:
        WeightsError: the model's folder has none that can be used.
    """

    def __init__(self, base: Base, device: torch.device) -> None:
        folder = _fetched(base, CHECKER, EXTRACTOR, option=CHECKER)
        name = load_json(folder / "model_index.json").get(CHECKER)
        kind = CHECKERS.get(name[1]) if isinstance(name, list) and len(name) == 2 else None
        if kind is None:
            raise WeightsError(f"--{CHECKER}: {base.name} lists no safety checker that is known here.")
        try:
            self._extract = CLIPImageProcessor.from_pretrained(folder / EXTRACTOR)
            self._model = load_whole(kind, folder / CHECKER, dtype=torch.float32).to(device).eval()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a config of any content makes transformers raise
            raise unfit("the safety checker", folder, error) from error
        self._device = device

    def __call__(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Which of them it names; the model's own pipeline makes those black."""
        pixels = self._extract(list(pictures), return_tensors="pt").pixel_values.to(self._device)
        # Black is what the checker itself makes of a picture that it names, for either of IF's two reasons.
        shown = [np.ones((1, 1, 3), np.float32) for _ in pictures]
        with torch.inference_mode():
            checked, *_ = self._model(clip_input=pixels, images=shown)
        return [not np.asarray(each).any() for each in checked]


class Watermark:
    """Puts the mark of a model's folder onto pictures.

    Raises:
        WeightsError: the model's folder has none.
    """

    def __init__(self, base: Base) -> None:
        folder = _fetched(base, WATERMARKER, option="watermark")
        try:
            self._marker = load_whole(IFWatermarker, folder / WATERMARKER)
        except Exception as error:  # whatever a config of any content makes diffusers raise
            raise unfit("the watermark", folder, error) from error

    def __call__(self, picture: Image.Image) -> Image.Image:
        [marked] = self._marker.apply_watermark([picture.copy()])
        return marked


def fetch_switched_on(base: Base, safety_checker: bool, watermark: bool) -> None:
    """Fetch what will be needed, before anything is drawn.

    Raises:
        WeightsError: the model has none of it.
    """
    if safety_checker:
        _fetched(base, CHECKER, EXTRACTOR, option=CHECKER)
    if watermark:
        _fetched(base, WATERMARKER, option="watermark")


def _fetched(base: Base, *components: str, option: str) -> Path:
    folder = loading.fetch_components(base.source, components)
    for name in components:
        if not (folder / name).is_dir():
            words = f"{base.name} has no {name}: leave the switch out, or name weights that have it"
            raise WeightsError(f"--{option}: {words}.")
    if not any((folder / components[0]).glob("*.safetensors")):
        words = f"{base.name} has no {components[0]} as safetensors; pickled files are not opened"
        raise WeightsError(f"--{option}: {words}.")
    return folder
