"""Checkpoints: the trained weights as diffusers reads them, and all else that a run is, without pickle."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from helpers.config.options import ROWS
from helpers.files import DiskFull, content_hash, flush, is_full, printable
from helpers.models.adapters import Adapter, trainable_parameters
from helpers.models.denoiser import Denoiser

TENSORS = "state.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
FORMAT = "checkpoint-1"
ABANDONED, DAMAGED = "abandoned", "damaged"
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading JSON of any content raises."""


class CheckpointError(Exception):
    """A checkpoint that cannot be resumed from; the message names the options concerned."""


@contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Hold an output folder, which is made, for one run; where nothing came to be in it, it is gone afterwards.

    The system lets go of it however the process ends.

    Raises:
        CheckpointError: another run is at work in it.
    """
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{ROWS['output_dir'].label}: another run is at work in {printable(output)}, and two would spoil each"
                " other's checkpoints. Wait until it has ended, or name another OUTPUT_DIR."
            ) from None
        except OSError:  # a network disk without locks
            pass
        yield
    finally:
        if is_new:
            with suppress(OSError):  # there is something in it
                output.rmdir()
        os.close(handle)


def save(output: Path, step: int, adapter: Adapter, denoiser: Denoiser, state: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoint-<step>`; only when it is safe on the disk, delete the oldest ones beyond `keep` (0 keeps all).

    It is written under another name, flushed, and renamed, with a manifest of its files' sizes and hashes. One that is
    there already stays as it is; a damaged one of that step is moved into `damaged/`.

    Args:
        state: nested dicts, lists and tuples of tensors and plain values; read back by `load_state`.

    Raises:
        DiskFull: there is no room for it. What was saved before is still there, and nothing of this one.
    """
    folder = output / f"checkpoint-{step}"
    sweep(output)
    if folder.exists() and damage(folder):
        _set_aside(folder, DAMAGED)
    if not folder.exists():
        _write(folder, step, adapter, denoiser, state)
    _prune(output, step, keep)
    return folder


def _write(folder: Path, step: int, adapter: Adapter, denoiser: Denoiser, state: Mapping[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    packed = json.dumps(_pack(state, tensors), indent=1) + "\n"
    partial = _partial(folder)
    try:
        partial.mkdir(parents=True)
        adapter.save_weights(denoiser, partial)
        (partial / STATE).write_text(packed, "utf-8")
        save_file(tensors, partial / TENSORS)
        _write_manifest(partial, step)
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        partial.rename(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_full(error):
            raise
        saved = [*trainable_parameters(denoiser), *tensors.values()]
        raise DiskFull(folder.name, folder.parent, len(packed) + sum(tensor.nbytes for tensor in saved)) from error
    flush(folder.parent)


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": content_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"format": FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _prune(output: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to this step, delete the oldest ones beyond `keep`."""
    for old in [folder for folder in found(output) if _step(folder) <= step][:-keep] if keep else []:
        # Out of the way first: one of which half is deleted would be taken for damaged.
        _delete(old.rename(_partial(old)))


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are the trained weights, and not the run's state."""
    own = {folder / name for name in (TENSORS, STATE, MANIFEST)}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)


def sweep(output: Path) -> None:
    """Delete what saving or deleting a checkpoint left when the process was killed at it."""
    for leftover in output.glob(".checkpoint-*.partial"):
        _delete(leftover)


def _delete(folder: Path) -> None:
    """Delete what a run needs no more. Where that fails, which is said, the next save tries again."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        tqdm.write(f"{printable(folder)} cannot be deleted ({error.strerror}). Training goes on.")


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def set_aside_later(output: Path, checkpoint: Path) -> list[Path]:
    """Move the checkpoints after this one away, for a run that goes back to it; returns their new paths.

    They stay, in `abandoned/` or `damaged/`, but are no longer taken for the latest, nor pruned, nor in the way of the
    new ones of the same steps.
    """
    later = [folder for folder in _all(output) if _step(folder) > _step(checkpoint)]
    return [_set_aside(folder, DAMAGED if damage(folder) else ABANDONED) for folder in later]


def _set_aside(folder: Path, under: str) -> Path:
    place = _free(folder.parent / under / folder.name)
    place.parent.mkdir(exist_ok=True)
    return folder.rename(place)


def _free(path: Path) -> Path:
    """The path itself, or with a number behind it where it is taken."""
    candidates = (path.with_name(f"{path.name}-{number}" if number else path.name) for number in itertools.count())
    return next(candidate for candidate in candidates if not candidate.exists())


def found(output: Path) -> list[Path]:
    """The checkpoints in an output folder that are whole by the sizes of their files, oldest first."""
    return [folder for folder in _all(output) if damage(folder, hashes=False) is None]


def _all(output: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, oldest first."""
    folders = output.glob("checkpoint-*") if output.is_dir() else []
    return sorted((path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def damage(folder: Path, hashes: bool = True) -> str | None:
    """Why a checkpoint cannot be trusted, in words; None if all files are what its manifest says.

    Args:
        hashes: read all of it, at about 1 GB a second, and do not only look at the sizes.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        step, kind = manifest["step"], manifest["format"]
        files = {folder / name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it is not whole, or another trainer or an older version made it"
    except _UNREADABLE as error:
        return f"{MANIFEST} cannot be read: {error}"
    if (step, kind) != (_step(folder), FORMAT):
        return f"its {MANIFEST} is of step {step!r} and format {kind!r}, not {_step(folder)} and {FORMAT!r}"
    problems = (_damage_of_file(path, *expected, hashes) for path, expected in files.items())
    return next((problem for problem in problems if problem), None)


def _damage_of_file(path: Path, size: int, sha256: str, hashes: bool) -> str | None:
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size:,} bytes, not {size:,}"
        return f"{path.name} has another content than was written" if hashes and content_hash(path) != sha256 else None
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read: {error}"


def choose(output: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: `latest` that is whole, a name, or `none`. It says which ones it skips, and why.

    Raises:
        CheckpointError: there is none of that name, it is damaged, all are, or a run would start anew over another
            one's checkpoints.
    """
    label, checkpoints = ROWS["resume_from_checkpoint"].label, _all(output)
    if wanted == "latest":
        return _newest_whole(checkpoints)
    if wanted == "none":
        if checkpoints:
            raise CheckpointError(
                f"{label}: found none, but OUTPUT_DIR {output} holds"
                f" {checkpoints[-1].name}. Type latest to go on from there, or name another OUTPUT_DIR."
            )
        return None
    if output / wanted not in checkpoints:
        names = ", ".join(path.name for path in checkpoints) or "none"
        raise CheckpointError(f"{label}: {output} has no {wanted!r}. It has: {names}.")
    reason = damage(output / wanted)
    if reason:
        raise CheckpointError(
            f"{label}: found {wanted}, which is damaged: {reason}. Type latest for the newest one that is whole."
        )
    return output / wanted


def _newest_whole(checkpoints: list[Path]) -> Path | None:
    reasons: dict[Path, str] = {}
    for folder in reversed(checkpoints):
        reason = damage(folder)
        if reason is None:
            for damaged, words in reasons.items():
                print(f"{damaged.name} is damaged ({words}), and skipped.")
            return folder
        reasons[folder] = reason
    if reasons:
        raise CheckpointError(
            "\n  ".join([
                f"{ROWS['output_dir'].label}: no checkpoint in {printable(checkpoints[0].parent)} can be gone on from:",
                *(f"{folder.name}: {reason}" for folder, reason in reasons.items()),
            ])
            + "\nMove these folders away to start anew, or name another OUTPUT_DIR."
        )
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`, on the CPU.

    Raises:
        CheckpointError: it was not made by this trainer, or is damaged.
    """
    try:
        return _unpack(json.loads((folder / STATE).read_bytes()), load_file(folder / TENSORS))
    except (*_UNREADABLE, SafetensorError) as error:
        raise CheckpointError(_unusable(folder, error)) from error


def load_plain(folder: Path) -> dict[str, Any]:
    """The same with None for each tensor, without reading those.

    Raises:
        CheckpointError: as `load_state`.
    """
    try:
        return _unpack(json.loads((folder / STATE).read_bytes()), None)
    except _UNREADABLE as error:
        raise CheckpointError(_unusable(folder, error)) from error


@contextmanager
def refused_if_other(folder: Path) -> Iterator[None]:
    """Within it, what a state's content makes code fail with means: this trainer did not write it.

    A manifest says that files are whole, not who wrote them.

    Raises:
        CheckpointError: instead of such an error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*_UNREADABLE, RuntimeError, SafetensorError) as error:
        raise CheckpointError(_unusable(folder, error)) from error


def changes(
    folder: Path, options: Mapping[str, Any], fixed: Mapping[str, str], data: Mapping[str, str]
) -> dict[str, tuple[Any, Any]]:
    """The options with another value than the checkpoint was made with: name -> (then, now).

    Args:
        options: name -> value.
        fixed: those that a run cannot change, with the reason.
        data: dataset id -> digest of what determines its batches.

    Raises:
        CheckpointError: naming each fixed option and each dataset that differs.
    """
    with refused_if_other(folder):
        saved = load_plain(folder)
        settings, datasets = dict(saved.get("options", {})), dict(saved.get("data", {}))
    # A checkpoint from before an option was added was made with what is now the default.
    was = {name: settings.get(name, ROWS[name].field.default if name in fixed else options[name]) for name in options}
    changed = {name: (was[name], now) for name, now in options.items() if was[name] != now}
    differing = [
        f"{ROWS[name].label} was {changed[name][0]!r} and is now {changed[name][1]!r}: {reason}"
        for name, reason in fixed.items()
        if name in changed
    ]
    differing += [f"dataset {name!r} is new" for name in sorted(data.keys() - datasets.keys())]
    differing += [f"dataset {name!r} is gone" for name in sorted(datasets.keys() - data.keys())]
    differing += [
        f"the images, captions or settings of dataset {name!r} changed: it cannot be told any more which of them the"
        " epoch has seen"
        for name in sorted(data.keys() & datasets.keys())
        if data[name] != datasets[name]
    ]
    if differing:
        raise CheckpointError(
            "\n  ".join([f"{folder} was made otherwise:", *differing])
            + "\nSet that back to go on with it, or name another OUTPUT_DIR (--output_dir) to start anew."
        )
    return changed


def require_base(folder: Path, base: str, prediction: str) -> None:
    """See that a checkpoint was made on top of these weights, and learned to predict the same.

    Args:
        base: a fingerprint of the weights' files.
        prediction: "epsilon" or "v_prediction": of a single file it may be a guess, which was put right since.

    Raises:
        CheckpointError: either was changed, though the weights are still found by the same name.
    """
    with refused_if_other(folder):
        saved = load_plain(folder)
    learned = saved.get("prediction", prediction)  # checkpoints of before have neither
    if learned != prediction:
        raise CheckpointError(
            f"{ROWS['prediction_type'].label}: the weights are taken to predict {prediction!r}, but {folder.name} learned to"
            f" predict {learned!r}. Say that to go on with it, or name another OUTPUT_DIR (--output_dir) to start anew."
        )
    if saved.get("base", base) != base:
        raise CheckpointError(
            f"{ROWS['pretrained_model_name_or_path'].label}: the weights' files there have changed since {folder.name}"
            " was made: its weights were learned on top of the other ones. Put those back to go on with it, or name another"
            " OUTPUT_DIR (--output_dir) to start anew."
        )


def _unusable(folder: Path, error: Exception) -> str:
    return (
        f"{ROWS['output_dir'].label}: found {folder}, which this trainer did not make or which is damaged"
        f" ({type(error).__name__}: {error}). Name another OUTPUT_DIR, or move that folder away."
    )


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Turn a nested state into JSON, with its tensors moved into `tensors`."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
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
