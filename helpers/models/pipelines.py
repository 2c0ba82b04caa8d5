"""Pipelines in diffusers' layout, written with a tuned UNet beside the base's other components."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import diffusers
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from helpers.models.facts import Origin
from helpers.models.schedulers import SCHEDULER_CONFIG

CHECKS = "requires_safety_checker"
"""What a pipeline's index has beside its components, where the pipeline has a safety checker."""

WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def write_pipeline(unet: UNet2DConditionModel, base: Path, output: Path, variant: str | None, origin: Origin) -> Path:
    """Write `output/pipeline`: the base's components copied as files, the tuned UNet, and a scheduler that fits it.

    Args:
        base: the folder of the pipeline that was tuned.
        variant: the variant of its weight files to copy ("fp16"), or None for the plain ones.

    Raises:
        FileNotFoundError: the base lacks a component that the pipeline cannot do without.
    """
    pipeline, partial = output / "pipeline", output / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index = json.loads((base / "model_index.json").read_text("utf-8"))
    index.pop("_name_or_path", None)
    index["_class_name"] = origin.pipeline
    takes = inspect.signature(getattr(diffusers, origin.pipeline)).parameters
    if CHECKS not in takes:  # else each who loads it is warned
        index.pop(CHECKS, None)
    optional = getattr(diffusers, origin.pipeline)._optional_components
    for name, component in list(index.items()):
        if not isinstance(component, list) or name == "unet":
            continue
        if name not in takes:  # no component of it; a name like "../../home" would lead out of both folders
            del index[name]
        elif name in optional and not _is_usable(base / name):  # such as IF's safety checker, which is never fetched
            index[name] = [None, None]
            if name == "safety_checker" and CHECKS in takes:
                index[CHECKS] = False
        elif component != [None, None]:
            _copy_component(base / name, partial / name, variant)
    changes = origin.scheduler_changes
    if origin.zero_terminal_snr:  # of which SD's usual scheduler, PNDM, knows nothing
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
        changes["_class_name"] = "DDIMScheduler"
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    _change_json(partial / "scheduler" / SCHEDULER_CONFIG, **changes)
    save_unet(unet, partial / "unet")
    shutil.rmtree(pipeline, ignore_errors=True)
    return partial.rename(pipeline)


def read_unet(base: Path, variant: str | None) -> UNet2DConditionModel:
    """A pipeline's UNet as its files have it, in their dtype.

    Args:
        variant: the variant of its weight files ("fp16"), or None for the plain ones.
    """
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    whole, shards = base / "unet" / f"{stem}.safetensors", (base / "unet").glob(f"{stem}-*.safetensors")
    with safe_open(whole if whole.exists() else next(shards), framework="pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return UNet2DConditionModel.from_pretrained(base / "unet", dtype=dtype, variant=variant, use_safetensors=True)


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    unet.save_pretrained(folder)
    _change_json(folder / "config.json", _name_or_path=None)  # where the base lay is nobody else's business


def _change_json(path: Path, **values: object) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text("utf-8")), **values}
    kept = {key: value for key, value in content.items() if value is not None or key not in values}
    path.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def _is_usable(component: Path) -> bool:
    """Whether a component is there, and has its weights, if it has any, not only in pickled files."""
    suffixes = {path.suffix for path in component.rglob("*")}
    return bool(suffixes) and (".safetensors" in suffixes or not suffixes & set(WEIGHTS))


def copied_bytes(base: Path, variant: str | None) -> int:
    """The size of the files that `write_pipeline` copies of a base, which may lie there in part only."""
    components = (path for path in base.iterdir() if path.is_dir() and path.name != "unet" and _is_usable(path))
    return sum(path.stat().st_size for source in components for path in _files_to_copy(source, variant)[0])


def _files_to_copy(source: Path, variant: str | None) -> tuple[list[Path], str]:
    """A component's files, of its weights only one variant; and what the names of that variant's weights hold.

    A component may lack the variant, as diffusers allows: then the plain weights are copied.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    infix = f".{variant}" if variant and any(f".{variant}" in path.name for path in files) else ""

    def is_wanted(path: Path) -> bool:
        is_of_variant = infix in path.name if infix else ".fp16" not in path.name
        return not _is_weights(path) or (is_of_variant and path.suffix in (".safetensors", ".json"))

    return [path for path in files if is_wanted(path)], infix


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS or ".index." in path.name


def _copy_component(source: Path, target: Path, variant: str | None) -> None:
    """Copy a component; the weights under the names of the plain variant. Pickled ones stay behind."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source.parent} has no {source.name}, which its pipeline needs")
    files, infix = _files_to_copy(source, variant)
    for path in files:
        is_weights = _is_weights(path)
        copy = target / path.relative_to(source)
        copy = copy.with_name(copy.name.replace(infix, "")) if is_weights and infix else copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        if infix and is_weights and path.suffix == ".json":
            copy.write_text(copy.read_text("utf-8").replace(infix, ""), "utf-8")
