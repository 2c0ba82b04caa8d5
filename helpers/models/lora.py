"""LoRA and its relatives: small matrices beside frozen weights, in files that diffusers loads as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from helpers.config.families import LORA_TARGETS
from helpers.models.adapters import trainable_parameters
from helpers.models.denoiser import Denoiser
from helpers.models.facts import Origin, metadata
from helpers.models.quantized import pack

LORA_FILE = "pytorch_lora_weights.safetensors"

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers of a text encoder that get an adapter: all four of an attention, or diffusers misreads kohya's format."""

MAGNITUDE = ".lora_magnitude_vector"

CLIP_LEVEL = "text_model."
"""A level of CLIP's names that transformers has dropped. Files keep it: tools from before that look for it."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021) beside frozen weights.

    Attributes:
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: of the adapters' input, 0 <= dropout < 1.
        targets: a key of `LORA_TARGETS`.
        dora: the direction of each weight is adapted and its magnitude learned apart (DoRA, Liu et al. 2024).
        rslora: the output is scaled by alpha / sqrt(rank) instead (Kalajdzievski 2023).
        ranks: other ranks than `rank`, by the name of a layer among the targets. Their output is scaled as that of all
            others, alpha / rank; with rslora by alpha / sqrt(their own rank), which is its way to treat them alike.
        text_encoder_rank: that of an adapter of the same kind of the denoiser's text encoder; None where it has none.
        text_encoder_alpha: None scales it as `ranks` are scaled.
        base_precision: what the UNet's frozen weights are kept in, a key of `quantized.PACK`; None: as they are loaded.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str
    dora: bool = False
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    text_encoder_rank: int | None = None
    text_encoder_alpha: float | None = None
    base_precision: str | None = None
    origin: Origin | None = None

    def attach(self, denoiser: Denoiser, weights_dtype: torch.dtype) -> None:
        denoiser.requires_grad_(False)
        if self.base_precision:
            pack(denoiser.unet, self.base_precision)
        layers = LORA_TARGETS[self.targets]
        patterns = {"rank_pattern": dict(self.ranks), "alpha_pattern": self._alphas()}
        denoiser.unet.add_adapter(self._config(layers, self.rank, self.alpha, **patterns))
        if self.text_encoder_rank:
            config = self._config(CLIP_TARGETS, self.text_encoder_rank, self._text_encoder_alpha())
            denoiser.text_encoder.add_adapter(config)
            config.base_model_name_or_path = None  # a path, which peft would look for on the hub at each saving
        for parameter in trainable_parameters(denoiser):
            parameter.data = parameter.data.to(weights_dtype)
        if self.dora:
            _measure_magnitudes(denoiser)

    def _config(self, layers: Sequence[str], rank: int, alpha: float, **patterns: Any) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            target_modules=list(layers),
            init_lora_weights="gaussian",
            use_dora=self.dora,
            use_rslora=self.rslora,
            **patterns,
        )

    def _alphas(self) -> dict[str, float]:
        """The alpha of each layer with a rank of its own, where it is not the others'."""
        return {} if self.rslora else {layer: self._alpha_of(rank) for layer, rank in self.ranks.items()}

    def _alpha_of(self, rank: int) -> float:
        """The alpha that has an adapter of this rank count as one of `rank`."""
        return self.alpha if self.rslora else self.alpha * rank / self.rank

    def _text_encoder_alpha(self) -> float | None:
        if self.text_encoder_alpha is None and self.text_encoder_rank:
            return self._alpha_of(self.text_encoder_rank)
        return self.text_encoder_alpha

    def save_weights(self, denoiser: Denoiser, folder: Path) -> None:
        parts = _parts(denoiser)

        def write(weights: dict[str, torch.Tensor], path: str) -> None:
            # diffusers' own metadata comes first: without it alpha is lost, and the adapter would be scaled wrongly.
            config = {
                f"{name}.{key}": value
                for name, part in parts.items()
                for key, value in part.peft_config["default"].to_dict().items()
            }
            save_file(weights, path, {LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=sorted)} | facts)

        facts = metadata(
            self.origin,
            kind="dora" if self.dora else "lora",
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            rslora=self.rslora,
            ranks=",".join(f"{layer}={rank}" for layer, rank in self.ranks.items()) or None,
            text_encoder_rank=self.text_encoder_rank,
            text_encoder_alpha=self._text_encoder_alpha(),
            base_precision=self.base_precision,
        )
        states = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
        if texts := states.get("text_encoder_lora_layers"):
            texts = {f"{CLIP_LEVEL}{name}": one for name, one in texts.items()}
            # Of a text encoder diffusers reads magnitudes by this name only, and without a word draws others.
            states["text_encoder_lora_layers"] = _renamed(texts, MAGNITUDE, f"{MAGNITUDE}.weight")
        getattr(diffusers, self.origin.pipeline).save_lora_weights(folder, **states, save_function=write)

    def load_weights(self, denoiser: Denoiser, folder: Path) -> None:
        state = _renamed(load_file(folder / LORA_FILE), f"{MAGNITUDE}.weight", MAGNITUDE)
        for name, part in _parts(denoiser).items():
            own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
            own = {key.removeprefix(f"{name}.").removeprefix(CLIP_LEVEL): one for key, one in own.items()}
            result = set_peft_model_state_dict(part, own)
            wrong = [key for key in result.missing_keys if "lora_" in key] + result.unexpected_keys
            if wrong:
                raise ValueError(f"{folder / LORA_FILE} does not fit: {wrong}")
        if state:
            raise ValueError(f"{folder / LORA_FILE} does not fit: {list(state)}")

    def export(self, denoiser: Denoiser, base: Path, output: Path) -> Path:
        self.save_weights(denoiser, output)
        return output / LORA_FILE


def _parts(denoiser: Denoiser) -> dict[str, torch.nn.Module]:
    """The models that have an adapter, by their names in diffusers' pipelines and files."""
    texts = {} if denoiser.text_encoder is None else {"text_encoder": denoiser.text_encoder}
    return {"unet": denoiser.unet} | texts


def _renamed(state: Mapping[str, torch.Tensor], ending: str, other: str) -> dict[str, torch.Tensor]:
    """The same tensors; those whose names end in `ending` end in `other`."""
    return {name.removesuffix(ending) + other if name.endswith(ending) else name: one for name, one in state.items()}


def _measure_magnitudes(denoiser: Denoiser) -> None:
    """Set DoRA's magnitudes to the norms of the weights, in the adapter's own dtype.

    peft measures in the frozen weights' dtype. Norms rounded to bfloat16 beside a float32 adapter would scale each
    channel by up to 2^-8 before the first step.
    """
    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer):
            for name, dora in layer.lora_magnitude_vector.items():
                dora.update_layer(
                    base_layer=layer.get_base_layer(),
                    lora_A=layer.lora_A[name].weight,
                    lora_B=layer.lora_B[name].weight,
                    scaling=layer.scaling[name],
                )
