"""What of a UNet is trained, and how that is saved so that diffusers loads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import diffusers
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

LORA_FILE = "pytorch_lora_weights.safetensors"
# IF keeps its text keys and values in add_k_proj and add_v_proj: without them a caption can hardly be learned.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
LORA_TARGETS = {"attention": ATTENTION, "attention+conv": ATTENTION + CONVOLUTIONS}


class Adapter(Protocol):
    """A way of training a UNet."""

    def attach(self, unet: UNet2DConditionModel, weights_dtype: torch.dtype) -> None:
        """Mark what is trained, with those parameters in `weights_dtype`."""

    def save_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        """Write the trained weights into a checkpoint's folder."""

    def load_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        """Take them back from there, bit for bit."""

    def export(self, unet: UNet2DConditionModel, base: Path, output: Path) -> Path:
        """Write the finished result into the output folder; returns its path."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021) beside frozen weights.

    Attributes:
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: of the adapters' input, 0 <= dropout < 1.
        targets: a key of `LORA_TARGETS`.
    """

    pipeline: str
    rank: int
    alpha: float
    dropout: float
    targets: str

    def attach(self, unet: UNet2DConditionModel, weights_dtype: torch.dtype) -> None:
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=list(LORA_TARGETS[self.targets]),
                init_lora_weights="gaussian",
            )
        )
        for parameter in trainable_parameters(unet):
            parameter.data = parameter.data.to(weights_dtype)

    def save_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        # With the metadata, since alpha is lost without it and diffusers would scale the adapter wrongly.
        getattr(diffusers, self.pipeline).save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )

    def load_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        state = {name.removeprefix("unet."): tensor for name, tensor in load_file(folder / LORA_FILE).items()}
        result = set_peft_model_state_dict(unet, state)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if missing or result.unexpected_keys:
            raise ValueError(f"{folder / LORA_FILE} does not fit: {missing + result.unexpected_keys}")

    def export(self, unet: UNet2DConditionModel, base: Path, output: Path) -> Path:
        self.save_weights(unet, output)
        return output / LORA_FILE


@dataclass(frozen=True)
class Full:
    """Every weight of the UNet.

    Attributes:
        variant: the variant of the base's weight files ("fp16"), or None for the plain ones.
        trains_variance: whether the learned variance is trained too; without it the pipeline samples with a fixed one.
    """

    variant: str | None = None
    trains_variance: bool = True

    def attach(self, unet: UNet2DConditionModel, weights_dtype: torch.dtype) -> None:
        unet.to(weights_dtype).requires_grad_(True)

    def save_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        _save_unet(unet, folder / "unet")

    def load_weights(self, unet: UNet2DConditionModel, folder: Path) -> None:
        saved = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=unet.dtype, use_safetensors=True)
        unet.load_state_dict(saved.state_dict())

    def export(self, unet: UNet2DConditionModel, base: Path, output: Path) -> Path:
        """Write `pipeline/`: the base's other components, copied as files, beside the tuned UNet."""
        pipeline, partial = output / "pipeline", output / ".pipeline.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        index = json.loads((base / "model_index.json").read_text("utf-8"))
        index.pop("_name_or_path", None)
        for name, component in index.items():
            if not isinstance(component, list) or name == "unet":
                continue
            if (base / name).is_dir():
                _copy_component(base / name, partial / name, self.variant)
            else:  # an optional component, such as IF's safety checker, that was never fetched
                index[name] = [None, None]
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        if not self.trains_variance:
            _change_json(partial / "scheduler" / "scheduler_config.json", variance_type="fixed_small")
        _save_unet(unet, partial / "unet")
        shutil.rmtree(pipeline, ignore_errors=True)
        return partial.rename(pipeline)


def _save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    unet.save_pretrained(folder)
    _change_json(folder / "config.json", _name_or_path=None)  # where the base lay is nobody else's business


def _change_json(path: Path, **values: object) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text("utf-8")), **values}
    kept = {key: value for key, value in content.items() if value is not None or key not in values}
    path.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def _copy_component(source: Path, target: Path, variant: str | None) -> None:
    """Copy a component; of its weights only one variant, under the names of the plain one. Pickled ones stay behind."""
    target.mkdir()
    infix = f".{variant}" if variant else ""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        is_weights = path.suffix in (".safetensors", ".bin", ".msgpack", ".h5") or ".index." in path.name
        is_wanted = path.suffix in (".safetensors", ".json") and (infix in path.name if infix else ".fp16" not in path.name)
        if is_weights and not is_wanted:
            continue
        copy = target / path.relative_to(source)
        copy = copy.with_name(copy.name.replace(infix, "")) if is_weights and infix else copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        if infix and is_weights and path.suffix == ".json":
            copy.write_text(copy.read_text("utf-8").replace(infix, ""), "utf-8")


def trainable_parameters(unet: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]
