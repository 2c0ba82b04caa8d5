"""What a training has written, loaded into a pipeline of diffusers to sample with."""

from __future__ import annotations

from pathlib import Path

from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file

from helpers.models.bitfit import BIASES_FILE
from helpers.models.facts import AdapterFacts, read_adapter_facts
from helpers.models.lora import LORA_FILE


def load_adapter(pipeline: DiffusionPipeline, path: Path | str, name: str | None = None) -> AdapterFacts | None:
    """Load a LoRA, DoRA or BitFit into the pipeline of its base, and set the scheduler that it was trained for.

    Args:
        path: the adapter's file, or the output folder of its training.
        name: what to call a LoRA or DoRA, for `set_adapters`.

    Returns:
        what the adapter tells of itself; None for one of another trainer, which leaves the scheduler as it is.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: these biases are not of this UNet, or adapters that were loaded before have renamed its layers.
    """
    file = adapter_file(Path(path))
    facts = read_adapter_facts(file)
    if facts and facts.kind == "bitfit":
        strange = pipeline.unet.load_state_dict(load_file(file), strict=False).unexpected_keys
        if strange:
            raise ValueError(f"{file}: the UNet has no {strange[0]}; load biases of its base, and before any LoRA")
    else:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    if facts:
        scheduler = pipeline.scheduler
        kind = DDIMScheduler if facts.zero_terminal_snr else type(scheduler)  # SD's usual one, PNDM, has no such thing
        pipeline.scheduler = kind.from_config(scheduler.config, **facts.scheduler_changes)
    return facts


def adapter_file(path: Path) -> Path:
    """The file of the adapter at `path`: that file itself, or the one in that folder."""
    files = [path] if path.is_file() else [path / name for name in (LORA_FILE, BIASES_FILE)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"there is no adapter in {path}: neither {LORA_FILE} nor {BIASES_FILE}")
    return found
