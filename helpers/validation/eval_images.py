"""Validation by images of the datasets: made small and upscaled again, or drawn from their conditioning images."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from helpers.config.jsonfile import BadJson, load_json
from helpers.data.dataset import Dataset
from helpers.data.records import Record
from helpers.files import printable, write_whole
from helpers.images import loading
from helpers.images.geometry import covering, crop_box
from helpers.models.conditioning import reduce
from helpers.sizes import Size
from helpers.training.loop import Run
from helpers.validation.prompts import safe_name
from helpers.validation.recipe import File, Shown, picture_name
from helpers.validation.render import Rendered, Sampling
from helpers.validation.sheet import Cell

REMEMBERED = "eval_images.json"
CURVE = "validation/psnr"
NAMED = 3
"""How many of the images that are too small a note names."""
NONE_LEFT = "none of the eval images can be read any more"
MOST_DB = 100.0
"""What equal pictures score: more than any that differ (one value of 64x64 pixels off by one: 89 dB), but finite."""


@dataclass(frozen=True)
class EvalImage:
    """An image to compare with.

    Attributes:
        name: what its files are called.
        embeds: the caption's embedding `[length, D]`.
        sizes: what it is made at; it fills each of them.
        control: its conditioning image, where it has one.
        file, control_file: the same images as a recipe tells them.
    """

    name: str
    path: Path
    caption: str
    embeds: Tensor
    sizes: tuple[Size, ...]
    control: Path | None = None
    file: File | None = None
    control_file: File | None = None

    @property
    def shown(self) -> Shown:
        return Shown(name=self.name, prompt=self.caption, image=self.file, control=self.control_file)


def titles_of(images: Sequence[EvalImage]) -> dict[str, str]:
    """The name of each picture's file, and what the picture is."""
    return {picture_name(image.name, size): f"{image.caption} ({size})" for image in images for size in image.sizes}


@dataclass(frozen=True)
class Choice:
    """Of each dataset, by its id, the images to show, each with the sizes that it is made at.

    `notes` are what the user should be told.
    """

    images: Mapping[str, Mapping[Record, tuple[Size, ...]]]
    notes: tuple[str, ...]


def choose(datasets: Sequence[Dataset], sizes: Sequence[Size], count: int, seed: int, output: Path) -> Choice:
    """For each size `count` images of each dataset, without replacement, by the seed; all where there are fewer.

    Only images that fill the size: one that had to be enlarged is no original to compare with. They are remembered in
    the output folder and stay the same in every later run, as long as their files are there.
    """
    path = output / REMEMBERED
    remembered, notes = _remembered(path)
    images = {}
    for dataset in datasets:
        records = {dataset.relative(record): record for record in dataset.records}
        drawn = sorted(records)
        random.Random(f"{seed} {dataset.id}").shuffle(drawn)
        names = list(dict.fromkeys([*remembered.get(dataset.id, []), *drawn]))
        found = [name for name in names if name in records]
        shown = {size: [name for name in found if _fills(records[name].size, size)][:count] for size in sizes}
        chosen = {name: tuple(size for size in sizes if name in shown[size]) for name in found}
        images[dataset.id] = {records[name]: own for name, own in chosen.items() if own}
        # Those of an earlier run stay, though this one may show fewer, or none.
        remembered[dataset.id] = [name for name in names if chosen.get(name) or name in remembered.get(dataset.id, [])]
        notes += [note for size in sizes if (note := _too_few(dataset, size, len(shown[size]), count))]
    write_whole(path, (json.dumps(remembered, indent=2) + "\n").encode())
    return Choice(images, tuple(notes))


def _remembered(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The images of earlier runs by their datasets, and what to tell of the file."""
    if not path.exists():
        return {}, []
    try:
        content = load_json(path)
    except (OSError, BadJson):
        content = None
    if isinstance(content, dict) and all(_are_names(names) for names in content.values()):
        return content, []
    return {}, [f"{path} is damaged: eval images are chosen anew, by VALIDATION_SEED (--validation_seed)."]


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _fills(size: Size, target: Size) -> bool:
    return size.width >= target.width and size.height >= target.height


def _too_few(dataset: Dataset, size: Size, shown: int, count: int) -> str | None:
    """What to tell of images that were passed over, where they are missed."""
    small = [record for record in dataset.records if not _fills(record.size, size)]
    if shown == count or not small:
        return None
    named = ", ".join(f"{printable(record.path.name)} ({record.size})" for record in small[:NAMED])
    return (
        f"dataset {dataset.id!r}: {shown} of {count} eval images at {size} (NUM_EVAL_IMAGES, --num_eval_images): "
        f"{len(small):,} images do not fill it, such as {named}, and enlarged would be no originals to compare with."
    )


def file_name(dataset: Dataset, record: Record) -> str:
    """A name for the files of an image: readable, safe, and no other image's."""
    mark = hashlib.blake2b(os.fsencode(dataset.relative(record)), digest_size=3).hexdigest()
    return f"{safe_name(dataset.id)}_{safe_name(record.path.stem)}_{mark}"


@dataclass(frozen=True)
class Upscales:
    """Each image at each size, made `scale` times larger from its own low-resolution copy.

    Attributes:
        scale: the model's.
        noise_level: how much noise the low-resolution image gets, 0..999.
        method: the downsample_method that brings the originals to size.
    """

    sampling: Sampling
    eval_images: tuple[EvalImage, ...]
    scale: int
    noise_level: int
    method: str

    @property
    def titles(self) -> dict[str, str]:
        return titles_of(self.eval_images)

    def render(self, run: Run, folder: Path) -> Rendered:
        """A row per picture: low resolution, bicubic, the model's, the original; their PSNR in `psnr.json` as well.

        Images whose files cannot be read any more are left out, which is said.

        Raises:
            ValueError: there is no other.
        """
        pipeline = self.sampling.pipeline(run)
        rows, psnrs = [], {}
        for size in tqdm(self.sampling.sizes, desc=f"Validation at step {run.step}", unit="size", leave=False):
            read = readable(self.eval_images, size, self.method)
            images, originals = [image for image, _ in read], [pictures[0] for _, pictures in read]
            low = [low_resolution(original, self.scale) for original in originals]
            outputs = self.sampling.images(
                pipeline,
                size,
                [image.embeds for image in images],
                each={"image": low},
                noise_level=self.noise_level,
            )
            self.sampling.save(run, folder, size, [image.shown for image in images], outputs, self.noise_level)
            for image, small, output, original in zip(images, low, outputs, originals):
                name = picture_name(image.name, size)
                bicubic = small.resize(size, Image.Resampling.BICUBIC)
                psnrs[name] = {"output": psnr(output, original), "bicubic": psnr(bicubic, original)}
                rows.append([
                    Cell(small.resize(size, Image.Resampling.NEAREST), f"{image.caption} (low resolution)"),
                    Cell(bicubic, f"bicubic, {psnrs[name]['bicubic']:.2f} dB"),
                    Cell(output, f"step {run.step}, {psnrs[name]['output']:.2f} dB"),
                    Cell(original, f"original ({size})"),
                ])
        if not rows:
            raise ValueError(NONE_LEFT)
        write_whole(folder / "psnr.json", (json.dumps(psnrs, indent=2) + "\n").encode())
        mean = {kind: float(np.mean([entry[kind] for entry in psnrs.values()])) for kind in ("output", "bicubic")}
        tqdm.write(f"Validation at step {run.step}: {mean['output']:.2f} dB, bicubic {mean['bicubic']:.2f} dB (PSNR)")
        curves = {CURVE: mean["output"], f"{CURVE}_bicubic": mean["bicubic"]}
        return Rendered(rows, curves | {f"{CURVE}/{name}": entry["output"] for name, entry in psnrs.items()})


@dataclass(frozen=True)
class Controlled:
    """Each image at each size, drawn anew by its caption from its conditioning image.

    Attributes:
        method: the downsample_method that brings the originals to size, and their conditioning images.
    """

    sampling: Sampling
    eval_images: tuple[EvalImage, ...]
    method: str

    @property
    def titles(self) -> dict[str, str]:
        return titles_of(self.eval_images)

    def render(self, run: Run, folder: Path) -> Rendered:
        """A row per picture: the conditioning image, the model's picture, the original.

        Images whose files cannot be read any more are left out, which is said.

        Raises:
            ValueError: there is no other.
        """
        pipeline = self.sampling.pipeline(run)
        rows = []
        for size in tqdm(self.sampling.sizes, desc=f"Validation at step {run.step}", unit="size", leave=False):
            read = readable(self.eval_images, size, self.method)
            embeds, controls = [image.embeds for image, _ in read], [control for _, (_, control) in read]
            outputs = self.sampling.images(pipeline, size, embeds, each={"image": controls})
            self.sampling.save(run, folder, size, [image.shown for image, _ in read], outputs)
            for (image, (original, control)), output in zip(read, outputs):
                rows.append([
                    Cell(control, f"{image.caption} (conditioning)"),
                    Cell(output, f"step {run.step}"),
                    Cell(original, f"original ({size})"),
                ])
        if not rows:
            raise ValueError(NONE_LEFT)
        return Rendered(rows)


def readable(
    images: Sequence[EvalImage], size: Size, method: str
) -> list[tuple[EvalImage, tuple[Image.Image, ...]]]:
    """The images to make at this size, each with its original, and its conditioning image if it has one."""
    read = []
    for image in images:
        try:
            read += [(image, _at_size(image, size, method))] if size in image.sizes else []
        except loading.Unreadable as error:
            tqdm.write(f"The eval image {printable(image.path)} {error.reason}: this validation is without it.")
    return read


def _at_size(image: EvalImage, size: Size, method: str) -> tuple[Image.Image, ...]:
    """The image and its conditioning image at this size, their excess cut off evenly."""
    with_excess = covering(loading.inspect(image.path).size, size)
    box = crop_box(with_excess, size, "center")
    paths = (image.path, image.control) if image.control else (image.path,)
    return tuple(Image.fromarray(loading.load(path, with_excess, method)).crop(box) for path in paths)


def low_resolution(image: Image.Image, scale: int) -> Image.Image:
    """The image as training makes it small."""
    pixels = torch.from_numpy(np.array(image))[None]
    return Image.fromarray(reduce(pixels, scale)[0].permute(1, 2, 0).contiguous().numpy())


def psnr(image: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio of 8-bit RGB in dB; `MOST_DB` of equal pictures, which have infinitely much.

    A flat picture is one that bicubic upscaling gets back exactly; JSON and a mean cannot hold its infinity.
    """
    error = np.mean((np.asarray(image, dtype=np.float64) - np.asarray(original, dtype=np.float64)) ** 2)
    return min(MOST_DB, 10 * math.log10(255**2 / error)) if error else MOST_DB
