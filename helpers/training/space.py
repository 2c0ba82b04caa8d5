"""What a run will write to the disk, told before it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from helpers.caching.embeds import stored_texts, text_key
from helpers.caching.storages import STORAGES
from helpers.caching.store import stored_keys
from helpers.config.backends import Backends
from helpers.config.options import Config
from helpers.data.dataset import Dataset
from helpers.data.preparation import cached_sizes
from helpers.files import DiskFull, existing_parent, free_bytes, printable
from helpers.models.pipelines import copied_bytes
from helpers.models.spaces import Latents, Pixels
from helpers.models.spec import Spec
from helpers.models.text import CLIP, T5
from helpers.sizes import Size
from helpers.training import checkpoints, memory
from helpers.training.memory import Saved
from helpers.training.memory_report import setup_of, shown


class Need(NamedTuple):
    """So many bytes, of what, in which folder."""

    what: str
    nbytes: int
    folder: Path


def embed_size(text: T5 | CLIP, architecture: Path | None, storage: str) -> int:
    """Bytes of one text's embedding as it is stored; 0 where the UNet that reads it is not at hand."""
    width = json.loads(architecture.read_bytes()).get(text.reader_key) if architecture else None
    return text.length * STORAGES[storage].nbytes(width or 0)


def cache_needs(
    backends: Backends,
    datasets: Sequence[Dataset],
    prepared: Mapping[str, str],
    images: Pixels | Latents,
    embed_size: int,
    storage: str,
) -> list[Need]:
    """What the caches lack. An embedding by whichever encoder counts as there, if it is stored in the same way.

    Args:
        prepared: the text that is encoded for each caption.
    """
    needs = []
    wanted: dict[str, set[str]] = {entry.id: set() for entry in backends.text_embeds}
    for backend, dataset in zip(backends.images, datasets):
        wanted[backend.text_embeds] |= {text_key(prepared[caption]) for caption in dataset.captions()}
        sizes = cached_sizes(dataset, backend.downsample_method, images)
        missing = sizes.keys() - stored_keys(backend.cache_dir)
        taken = sum(sizes[key] for key in missing)
        needs.append(Need(f"{images.cached} of {len(missing):,} images of {dataset.id!r}", taken, backend.cache_dir))
        if conditioning := backends.conditioning_of(backend):
            jobs = {job.key: job for job in dataset.control_jobs(backend.downsample_method)}
            missing = jobs.keys() - stored_keys(conditioning.cache_dir)
            taken = sum(3 * jobs[key].size.width * jobs[key].size.height for key in missing)
            what = f"pixels of {len(missing):,} conditioning images of {dataset.id!r}"
            needs.append(Need(what, taken, conditioning.cache_dir))
    for entry in backends.text_embeds:
        missing = wanted[entry.id] - stored_texts(entry.cache_dir, storage)
        needs.append(Need(f"text embeds of {len(missing):,} captions", len(missing) * embed_size, entry.cache_dir))
    return [need for need in needs if need.nbytes]


def saved_sizes(config: Config, spec: Spec, architecture: Path) -> Saved:
    """What one checkpoint takes, and the weights in it."""
    return memory.saved(setup_of(config, spec, architecture, Size(64, 64)))  # of images of any size


def require_one_checkpoint(output: Path, saved: Saved) -> None:
    """See that there is room for one more.

    Raises:
        DiskFull: there is not.
    """
    free = free_bytes(output)
    if free is not None and free < saved.checkpoint:
        raise DiskFull("one more checkpoint", output, saved.checkpoint)


def output_needs(config: Config, saved: Saved, base: Path | None) -> list[Need]:
    """Checkpoints on top of those that are there, one more than are kept since the oldest one goes last; the result.

    Args:
        base: the folder with the model's files, as far as they are at hand.
    """
    output, limit = config.run.output_dir, config.run.checkpoints_total_limit
    number = max(1, limit + 1 - len(checkpoints.found(output)))
    kept = f"CHECKPOINTING_LIMIT + 1, less those that are there: {number}" if limit else "of all that are kept, 1"
    result, what = saved.trained * (2 if config.run.export == "kohya" else 1), "result"
    if config.training_kind == "full" and not config.training.controlnet:
        result = saved.unet + (copied_bytes(base, config.model.variant) if base else 0)
        what += "" if base else ", besides what it copies of the base: all but the UNet, which is not here to be counted"
    return [
        Need(f"checkpoints of {shown(saved.checkpoint)} ({kept})", number * saved.checkpoint, output),
        Need(what, result, output),
    ]


def describe(needs: Sequence[Need]) -> list[str]:
    """What takes how much on which disk, line by line."""
    lines = ["Disk space needed, besides what is there already:"]
    for disk in _by_disk(needs):
        lines += [f"  {shown(need.nbytes):>11}  {need.what}, in {printable(need.folder)}" for need in disk]
        lines.append(f"  {shown(_sum(disk)):>11}  in all, where {_free(disk)} free")
    return lines


def shortages(needs: Sequence[Need]) -> list[str]:
    """A line for each disk that has less room than is needed."""
    return [
        f"Disk space: {shown(_sum(disk))} will be needed in {printable(disk[0].folder)}, where {_free(disk)} free: "
        + ", ".join(f"{need.what} ({shown(need.nbytes)})" for need in disk)
        for disk in _by_disk(needs)
        if (free := free_bytes(disk[0].folder)) is not None and free < _sum(disk)
    ]


def _by_disk(needs: Sequence[Need]) -> list[list[Need]]:
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(existing_parent(need.folder).stat().st_dev, []).append(need)
    return list(disks.values())


def _sum(disk: Sequence[Need]) -> int:
    return sum(need.nbytes for need in disk)


def _free(disk: Sequence[Need]) -> str:
    free = free_bytes(disk[0].folder)
    return "it is not told how much is" if free is None else f"{shown(free)} are"
