"""LoRA and its relatives: small matrices beside frozen weights, in files that diffusers loads as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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

LORA_FILE = "pytorch_lora_weights.safetensors"


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
    """

    rank: int
    alpha: float
    dropout: float
    targets: str
    dora: bool = False
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    origin: Origin | None = None

    def attach(self, denoiser: Denoiser, weights_dtype: torch.dtype) -> None:
        denoiser.requires_grad_(False)
        denoiser.unet.add_adapter(
            LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=list(LORA_TARGETS[self.targets]),
                init_lora_weights="gaussian",
                use_dora=self.dora,
                use_rslora=self.rslora,
                rank_pattern=dict(self.ranks),
                alpha_pattern=self._alphas(),
            )
        )
        for parameter in trainable_parameters(denoiser):
            parameter.data = parameter.data.to(weights_dtype)
        if self.dora:
            _measure_magnitudes(denoiser)

    def _alphas(self) -> dict[str, float]:
        """The alpha of each layer with a rank of its own, where it is not the others'."""
        if self.rslora:
            return {}
        return {layer: self.alpha * rank / self.rank for layer, rank in self.ranks.items()}

    def save_weights(self, denoiser: Denoiser, folder: Path) -> None:
        def write(weights: dict[str, torch.Tensor], path: str) -> None:
            # diffusers' own metadata comes first: without it alpha is lost, and the adapter would be scaled wrongly.
            config = {f"unet.{key}": value for key, value in denoiser.unet.peft_config["default"].to_dict().items()}
            save_file(weights, path, {LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=sorted)} | facts)

        facts = metadata(
            self.origin,
            kind="dora" if self.dora else "lora",
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            rslora=self.rslora,
            ranks=",".join(f"{layer}={rank}" for layer, rank in self.ranks.items()) or None,
        )
        getattr(diffusers, self.origin.pipeline).save_lora_weights(
            folder, unet_lora_layers=get_peft_model_state_dict(denoiser.unet), save_function=write
        )

    def load_weights(self, denoiser: Denoiser, folder: Path) -> None:
        state = {name.removeprefix("unet."): tensor for name, tensor in load_file(folder / LORA_FILE).items()}
        result = set_peft_model_state_dict(denoiser.unet, state)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if missing or result.unexpected_keys:
            raise ValueError(f"{folder / LORA_FILE} does not fit: {missing + result.unexpected_keys}")

    def export(self, denoiser: Denoiser, base: Path, output: Path) -> Path:
        self.save_weights(denoiser, output)
        return output / LORA_FILE


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
