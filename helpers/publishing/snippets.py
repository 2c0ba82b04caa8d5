"""Code that samples what was trained, to be pasted."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from helpers.models.bitfit import BIASES_FILE
from helpers.models.controlnet import CONTROLNET
from helpers.models.lora import LORA_FILE
from helpers.sizes import Size

FULL = "full"


@dataclass(frozen=True)
class Use:
    """What there is to sample, and how.

    Attributes:
        kind: lora, dora, bitfit, controlnet or full.
        pipeline: diffusers' class.
        base: a hub id or a path; of no meaning for full.
        base_note: what to say in its line.
        from_file: whether the base is a single file.
        place: the folder or the hub id of what was trained.
        place_note: what to say in its line.
        on_hub: whether that is a hub id.
        loading: further arguments of the base's loading.
        scheduler_changes: what the base's scheduler must be told.
        picture: the size of an image to show the pipeline; None: it takes none.
        sampling: arguments of the pipeline, of which those are taken that it has.
    """

    kind: str
    pipeline: str
    base: str
    base_note: str
    from_file: bool
    place: str
    place_note: str
    on_hub: bool
    loading: Mapping[str, str]
    scheduler_changes: Mapping[str, Any]
    picture: Size | None
    sampling: Mapping[str, Any] = field(default_factory=dict)


def snippet(use: Use) -> str:
    """A program that makes one picture and saves it."""
    imported, head, load, more = [use.pipeline], [], [], ["import torch"]
    if use.kind != FULL:
        head.append(_named("base", use.base, use.base_note))
    head.append(_named("place", use.place, use.place_note))
    if use.picture:
        more.append("from PIL import Image")
        head.append(f'picture = Image.new("RGB", {tuple(use.picture)})  # instead: {_opened(use)}')
    if use.kind == CONTROLNET:
        imported.append("ControlNetModel")
        made = f'ControlNetModel.from_pretrained(place, subfolder="{CONTROLNET}", dtype=torch.bfloat16)'
        load.append(f"controlnet = {made}")
    load.append(f"pipeline = {_made(use)}")
    if use.kind in ("lora", "dora"):
        load.append(f'pipeline.load_lora_weights(place, weight_name="{LORA_FILE}")')
    if use.kind == "bitfit":
        more.append("from safetensors.torch import load_file")
        file = f'f"{{place}}/{BIASES_FILE}"'
        if use.on_hub:
            more.append("from huggingface_hub import hf_hub_download")
            file = f'hf_hub_download(place, "{BIASES_FILE}")'
        load.append(f"pipeline.unet.load_state_dict(load_file({file}), strict=False)")
    if use.scheduler_changes and use.kind != FULL:
        kind = "DDPMScheduler" if "variance_type" in use.scheduler_changes else "DDIMScheduler"
        imported.append(kind)
        changes = ", ".join(f"{name}={quoted(value)}" for name, value in use.scheduler_changes.items())
        load.append(f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config, {changes})")
    imports = sorted([*more, f"from diffusers import {', '.join(sorted(imported))}"], key=str.lower)
    imports = ["import torch", *(line for line in imports if line != "import torch")]
    offload = ["if torch.cuda.is_available():", "    pipeline.enable_model_cpu_offload()"]
    lines = [*imports, "", *head, "", *load, *offload, "image = pipeline(", *_arguments(use), ").images[0]"]
    return "\n".join([*lines, 'image.save("picture.png")'])


def quoted(value: Any) -> str:
    """A plain value as code."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _named(name: str, value: str, note: str) -> str:
    return f"{name} = {quoted(value)}" + (f"  # {note}" if note else "")


def _opened(use: Use) -> str:
    opened = 'Image.open("your-picture.png").convert("RGB")'
    return f"{opened}.resize({tuple(use.picture)})"


def _made(use: Use) -> str:
    if use.kind == FULL:
        return f"{use.pipeline}.from_pretrained(place, dtype=torch.bfloat16)"
    how = "from_single_file" if use.from_file else "from_pretrained"
    words = [f"{name}={quoted(value)}" for name, value in use.loading.items()]
    words += ["controlnet=controlnet"] if use.kind == CONTROLNET else []
    return f"{use.pipeline}.{how}({', '.join(['base', *words, 'dtype=torch.bfloat16'])})"


def _arguments(use: Use) -> list[str]:
    takes = inspect.signature(getattr(diffusers, use.pipeline).__call__).parameters
    words = [f"{name}={quoted(value)}" for name, value in use.sampling.items() if name in takes]
    words += ["image=picture"] if use.picture else []
    return [f"    {word}," for word in [*words, "generator=torch.Generator().manual_seed(42)"]]
