"""Checkpoints: the trained weights as diffusers reads them, and all else that a run is, without pickle."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers.config.options import ROWS
from helpers.files import flush
from helpers.models.adapters import Adapter

TENSORS = "state.safetensors"
STATE = "state.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be resumed from; the message names the options concerned."""


def save(output: Path, step: int, adapter: Adapter, unet: torch.nn.Module, state: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoint-<step>`; only when it is safe on the disk, delete the oldest ones beyond `keep` (0 keeps all).

    Args:
        state: nested dicts, lists and tuples of tensors and plain values; read back by `load_state`.
    """
    folder = output / f"checkpoint-{step}"
    for leftover in output.glob(".checkpoint-*.partial"):
        shutil.rmtree(leftover)
    partial = output / f".{folder.name}.partial"
    partial.mkdir(parents=True)
    adapter.save_weights(unet, partial)
    tensors: dict[str, torch.Tensor] = {}
    (partial / STATE).write_text(json.dumps(_pack(state, tensors), indent=1) + "\n", "utf-8")
    save_file(tensors, partial / TENSORS)
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    partial.rename(folder)
    flush(output)
    for old in found(output)[:-keep] if keep else []:
        shutil.rmtree(old)
    return folder


def set_aside_later(output: Path, checkpoint: Path) -> list[Path]:
    """Move the checkpoints after this one into `abandoned/`, for a run that goes back to it; returns their new paths.

    They stay, but are no longer taken for the latest, nor pruned, nor in the way of the new ones of the same steps.
    """
    later = found(output)[found(output).index(checkpoint) + 1 :]
    moved = []
    for folder in later:
        moved.append(_free(output / "abandoned" / folder.name))
        moved[-1].parent.mkdir(exist_ok=True)
        folder.rename(moved[-1])
    return moved


def _free(path: Path) -> Path:
    """The path itself, or with a number behind it where it is taken."""
    candidates = (path.with_name(f"{path.name}-{number}" if number else path.name) for number in itertools.count())
    return next(candidate for candidate in candidates if not candidate.exists())


def found(output: Path) -> list[Path]:
    """The complete checkpoints in an output folder, oldest first."""
    folders = output.glob("checkpoint-*") if output.is_dir() else []
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folders}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(steps[path][1]))


def choose(output: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: `latest`, a name, or `none`.

    Raises:
        CheckpointError: there is none of that name, or a run would start anew over another one's checkpoints.
    """
    checkpoints = found(output)
    if wanted == "latest":
        return checkpoints[-1] if checkpoints else None
    if wanted == "none":
        if checkpoints:
            raise CheckpointError(
                f"{ROWS['resume_from_checkpoint'].label}: found none, but OUTPUT_DIR {output} holds"
                f" {checkpoints[-1].name}. Type latest to go on from there, or name another OUTPUT_DIR."
            )
        return None
    if output / wanted not in checkpoints:
        names = ", ".join(path.name for path in checkpoints) or "none"
        raise CheckpointError(
            f"{ROWS['resume_from_checkpoint'].label}: {output} has no {wanted!r}. It has: {names}."
        )
    return output / wanted


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`, on the CPU.

    Raises:
        CheckpointError: it was not made by this trainer, or is damaged.
    """
    packed = _read(folder)
    try:
        return _unpack(packed, load_file(folder / TENSORS))
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(_unusable(folder, f"{TENSORS}: {error}")) from error


def require_same(folder: Path, identity: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Refuse a checkpoint made with other settings or other data, before any weights load.

    Args:
        identity: option -> value, of those that a run cannot change.
        data: dataset id -> digest of what determines its batches.

    Raises:
        CheckpointError: naming each setting and each dataset that differs.
    """
    saved = _unpack(_read(folder), None)
    settings, datasets = saved.get("identity", {}), saved.get("data", {})
    # A checkpoint from before an option was added was made with what is now the default.
    was = {option: settings.get(option, ROWS[option].field.default) for option in identity}
    differing = [
        f"{ROWS[option].label} was {was[option]!r} and is now {value!r}"
        for option, value in identity.items()
        if was[option] != value
    ]
    differing += [f"dataset {name!r} is new" for name in data.keys() - datasets.keys()]
    differing += [f"dataset {name!r} is gone" for name in datasets.keys() - data.keys()]
    differing += [
        f"the images, captions or settings of dataset {name!r} changed"
        for name in sorted(data.keys() & datasets.keys())
        if data[name] != datasets[name]
    ]
    if differing:
        raise CheckpointError(
            f"{folder} was made otherwise: {'; '.join(differing)}."
            " Set that back to go on with it, or name another OUTPUT_DIR (--output_dir) to start anew."
        )


def _read(folder: Path) -> Any:
    try:
        return json.loads((folder / STATE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(_unusable(folder, f"{STATE}: {error}")) from error


def _unusable(folder: Path, reason: str) -> str:
    return (
        f"{ROWS['output_dir'].label}: found {folder}, which this trainer did not make or which is damaged ({reason})."
        " Name another OUTPUT_DIR, or move that folder away."
    )


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Turn a nested state into JSON, with its tensors moved into `tensors`."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(entry, tensors) for entry in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor] | None) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content] if tensors is not None else None
    if kind == "dict":
        return {key: _unpack(entry, tensors) for key, entry in content}
    entries = [_unpack(entry, tensors) for entry in content]
    return tuple(entries) if kind == "tuple" else entries
