"""One dataset of the dataloader JSON: its images with their plans, and the report of what is used and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from helpers.caching.latents import LatentJob
from helpers.caching.pixels import PixelJob
from helpers.config.backends import ImageBackend
from helpers.data import records
from helpers.data.plans import Plans
from helpers.data.records import Record
from helpers.data.scan import DatasetError, LeftOut, Scan
from helpers.files import printable
from helpers.images.geometry import Plan, Rules, crop_box, plans, refusal
from helpers.sizes import Size

NAMED = 10
"""How many of the files that are left out the console names."""

EXAMPLES = 3
"""How many files an error names where no image is left."""

MOST_CROPS = 8
"""Of an image, that are drawn once and for all where what is cached is made of the crop."""

MOST_SAMPLES = 300_000_000
"""Of an epoch, which is dealt in memory; 10,000 images seen 30,000 times each are as many."""


@dataclass(frozen=True)
class Report:
    """What becomes of a dataset. `buckets` counts the images that can be trained at each target size."""

    dataset_id: str
    found: int
    used: int
    upsampled: int
    repeats: int
    batches_per_epoch: int
    buckets: Mapping[Size, int]
    left_out: tuple[LeftOut, ...]

    def describe(self) -> str:
        """A few lines for the console."""
        times = "once" if self.repeats == 0 else f"{self.repeats + 1} times"
        lines = [
            f"dataset {self.dataset_id!r}: {self.found:,} files found, {self.used:,} images used, {times} an epoch, "
            f"in {self.batches_per_epoch:,} batches",
            "  buckets: " + ", ".join(f"{size} ({count:,})" for size, count in self.buckets.items()),
        ]
        if self.upsampled:
            lines.append(f"  {self.upsampled:,} are smaller than their bucket and are enlarged: "
                         "minimum_image_size leaves such images out")
        if self.left_out:
            lines.append(f"  {len(self.left_out):,} left out:")
            lines += [f"    {_in_words(entry)}" for entry in self.left_out[:NAMED]]
            if len(self.left_out) > NAMED:
                more = len(self.left_out) - NAMED
                lines.append(f"    ... and {more:,} more, all listed in left_out.json of the output folder")
        return "\n".join(lines)


@dataclass(frozen=True)
class Dataset:
    """The usable images of one dataset; `plans[i]` are those of `records[i]`.

    `repeats` is how often an image is seen again in an epoch, `probability` weighs this dataset among others.
    """

    id: str
    folder: Path
    rules: Rules
    records: Sequence[Record]
    plans: Plans
    repeats: int = 0
    probability: float = 1.0
    left_out: tuple[LeftOut, ...] = ()

    def pixel_jobs(self, method: str) -> Iterator[PixelJob]:
        """What the pixel cache has to hold: each image at each size that it is cropped from."""
        for record, choices in zip(self.records, self.plans):
            for size in dict.fromkeys(plan.intermediate for plan in choices):
                yield PixelJob(record.path, record.content, size, method)

    def control_jobs(self, method: str) -> Iterator[PixelJob]:
        """The same for its conditioning images, which are brought to the sizes of their images."""
        for record, choices in zip(self.records, self.plans):
            for size in dict.fromkeys(plan.intermediate for plan in choices) if record.control else ():
                yield PixelJob(record.control.path, record.control.content, size, method)

    def latent_jobs(self, method: str) -> Iterator[LatentJob]:
        """What the latent cache has to hold: the settled crops of each image in each of its plans."""
        for record, choices in zip(self.records, self.plans):
            for plan in choices:
                boxes = (self.settled_box(record, plan, number) for number in range(min(self.repeats + 1, MOST_CROPS)))
                for box in dict.fromkeys(boxes):
                    yield LatentJob(record.path, record.content, plan.intermediate, method, box)

    def settled_box(self, record: Record, plan: Plan, repeat: int = 0) -> tuple[int, int, int, int]:
        """The crop that an image keeps in all epochs, of each of its repeats another: up to `MOST_CROPS`.

        It is drawn from the content and the plan, whatever the run's seed.
        """
        words = f"{record.content} {(*plan.intermediate, *plan.target)}"
        words += f" {number}" if (number := repeat % MOST_CROPS) else ""
        digest = blake2b(words.encode(), digest_size=16).digest()
        u, v = (int.from_bytes(part, "little") / 2**64 for part in (digest[:8], digest[8:]))
        return crop_box(plan.intermediate, plan.target, self.rules.box_style, u, v)

    def captions(self) -> list[str]:
        """Every caption that may be drawn, each once."""
        return list(dict.fromkeys(caption for some in records.captions(self.records) for caption in some))

    def relative(self, record: Record) -> str:
        """Where an image is inside the dataset, which may be moved as a whole."""
        return record.file.removeprefix(str(self.folder))

    def digest(self) -> str:
        """A short hash of all that the batches of this dataset depend on, which a resumed run must find again.

        That is, in order: each image's content, place in the folder, captions, plans, and its conditioning image's
        content; repeats, probability and the style of the crops. 100,000 images take a quarter of a second.
        """
        planned = cache(_digested)  # images share few plans
        settings = (self.id, self.repeats, float(self.probability), self.rules.box_style)
        digest = blake2b(repr(settings).encode(), digest_size=16)
        for record, choices in zip(self.records, self.plans):
            digest.update(repr((record.content, self.relative(record), record.captions)).encode() + planned(choices))
            if record.control:
                digest.update(record.control.content.encode())
        return digest.hexdigest()

    def without(self, failures: Mapping[Path, str]) -> Dataset:
        """The same dataset without the files that could not be used, which are added to what is left out."""
        if not failures:
            return self
        files = {str(path): reason for path, reason in failures.items()}
        lost = {i: files[file] for i, file in enumerate(records.files(self.records)) if file in files}
        left_out = tuple(LeftOut(self.records[i].path, reason) for i, reason in lost.items())
        kept = self.taken([i for i in range(len(self.records)) if i not in lost])
        return replace(kept, left_out=self.left_out + left_out)

    def taken(self, indices: Sequence[int]) -> Dataset:
        """The same dataset of these images only, in this order."""
        return replace(self, records=records.taken(self.records, indices), plans=self.plans.taken(indices))

    def require_images(self) -> None:
        """Raise DatasetError, with the reasons, if no image is left to train on."""
        if self.records:
            return
        found = f"none of its {len(self.left_out)} files can be used" if self.left_out else "there are no images in it"
        first = {entry.reason: entry for entry in reversed(self.left_out)}
        shown = sorted(self.left_out, key=lambda entry: first[entry.reason] is not entry)[:EXAMPLES]  # other reasons first
        examples = "; ".join(map(_in_words, shown))
        raise DatasetError(
            f"dataset {self.id!r}: instance_data_dir is {printable(self.folder)}, but {found}"
            f"{f', for example {examples}' if examples else ''}; name a folder "
            'with images that fit, or switch this dataset off with "disabled": true'
        )

    def report(self, batches_per_epoch: int) -> Report:
        targets: Counter[Size] = Counter()
        upsampled = 0
        for choices, count in self.plans.counted():
            targets.update(dict.fromkeys({plan.target for plan in choices}, count))
            upsampled += count * any(plan.upsampled for plan in choices)
        return Report(
            dataset_id=self.id,
            found=len(self.records) + len(self.left_out),
            used=len(self.records),
            upsampled=upsampled,
            repeats=self.repeats,
            batches_per_epoch=batches_per_epoch,
            buckets=dict(sorted(targets.items())),
            left_out=self.left_out,
        )


def rules_for(
    backend: ImageBackend, alignment: int, enlarge: bool = True, smallest: int = 1, crops_once: bool = False
) -> Rules:
    """The geometry of a dataset; what is not in `backend` is the model's."""
    return Rules(
        resolution=backend.resolution,
        resolution_type=backend.resolution_type,
        alignment=alignment,
        crop=backend.crop,
        crop_aspect=backend.crop_aspect,
        crop_style=backend.crop_style,
        crop_aspect_buckets=tuple((bucket.aspect, bucket.weight) for bucket in backend.crop_aspect_buckets),
        aspect_bucket_rounding=backend.aspect_bucket_rounding,
        minimum_image_size=backend.minimum_image_size,
        maximum_image_size=backend.maximum_image_size,
        target_downsample_size=backend.target_downsample_size,
        enlarge=enlarge,
        smallest=smallest,
        crops_once=crops_once,
    )


def plan_dataset(
    backend: ImageBackend,
    found: Scan,
    alignment: int,
    enlarge: bool = True,
    smallest: int = 1,
    crops_once: bool = False,
) -> Dataset:
    """The dataset of one entry of the dataloader JSON, from the scan of its folder."""
    rules = rules_for(backend, alignment, enlarge, smallest, crops_once)
    return plan_images(backend.id, backend.instance_data_dir, rules, found, backend.repeats, backend.probability)


def plan_images(
    dataset_id: str, folder: Path, rules: Rules, found: Scan, repeats: int = 0, probability: float = 1.0
) -> Dataset:
    """Plan every image of a scan; those that the rules refuse are left out with the reason.

    Raises:
        DatasetError: an epoch would have more samples than can be dealt.
    """
    edges = records.sizes(found.records).astype(np.int64)
    distinct, numbers = np.unique(edges[:, 0] << 32 | edges[:, 1], return_inverse=True)
    choices = [_plans_or_refusal(Size(edge >> 32, edge & 0xFFFFFFFF), rules) for edge in distinct.tolist()]
    is_used = np.array([not isinstance(some, str) for some in choices], bool)[numbers]
    used = np.flatnonzero(is_used)
    refused = tuple(LeftOut(found.records[i].path, choices[numbers[i]]) for i in np.flatnonzero(~is_used).tolist())
    if len(used) * (repeats + 1) > MOST_SAMPLES:
        raise DatasetError(
            f"dataset {dataset_id!r}: found {repeats:,} repeats, with which an epoch sees {len(used):,} images"
            f" {len(used) * (repeats + 1):,} times, more than {MOST_SAMPLES:,}: type fewer, and train for more epochs"
        )
    return Dataset(
        id=dataset_id,
        folder=folder,
        rules=rules,
        records=records.taken(found.records, used) if refused else found.records,
        plans=Plans([() if isinstance(some, str) else some for some in choices], numbers[used]),
        repeats=repeats,
        probability=probability,
        left_out=found.left_out + refused,
    )


def _plans_or_refusal(size: Size, rules: Rules) -> tuple[Plan, ...] | str:
    return refusal(size, rules) or plans(size, rules)


def _digested(choices: tuple[Plan, ...]) -> bytes:
    numbers = [(*plan.source, *plan.intermediate, *plan.target, float(plan.weight)) for plan in choices]
    return repr(numbers).encode()


def _in_words(entry: LeftOut) -> str:
    return f"{printable(entry.path)}: {entry.reason}"
