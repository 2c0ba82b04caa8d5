"""Validation by upscaling: images of the datasets are made small, and the model makes them large again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from helpers.data.dataset import Dataset
from helpers.data.scan import Record
from helpers.files import write_whole
from helpers.images import loading
from helpers.images.geometry import covering, crop_box
from helpers.models.conditioning import reduce
from helpers.sizes import Size
from helpers.training.loop import Run
from helpers.validation.prompts import safe_name
from helpers.validation.render import Rendered, Sampling
from helpers.validation.sheet import Cell

REMEMBERED = "eval_images.json"
CURVE = "validation/psnr"


@dataclass(frozen=True)
class EvalImage:
    """An image to upscale, with the name that its files have, its caption and the caption's embedding `[length, D]`."""

    name: str
    path: Path
    caption: str
    embeds: Tensor


def choose(datasets: Sequence[Dataset], count: int, seed: int, output: Path) -> dict[str, list[Record]]:
    """`count` images of each dataset, without replacement, by the seed; all of them where there are fewer.

    They are remembered in the output folder and stay the same in every later run, as long as their files are there.
    """
    path = output / REMEMBERED
    remembered = json.loads(path.read_text("utf-8")) if path.exists() else {}
    chosen = {}
    for dataset in datasets:
        records = {dataset.relative(record): record for record in dataset.records}
        drawn = sorted(records)
        random.Random(f"{seed} {dataset.id}").shuffle(drawn)
        kept = [name for name in remembered.get(dataset.id, []) if name in records]
        names = list(dict.fromkeys(kept + drawn))[:count]
        chosen[dataset.id] = [records[name] for name in names]
        remembered[dataset.id] = names
    write_whole(path, (json.dumps(remembered, indent=2) + "\n").encode())
    return chosen


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
        return {
            f"{image.name}_{size}": f"{image.caption} ({size})"
            for image in self.eval_images
            for size in self.sampling.sizes
        }

    def render(self, run: Run, folder: Path) -> Rendered:
        """A row per picture: low resolution, bicubic, the model's, the original; their PSNR in `psnr.json` as well."""
        pipeline = self.sampling.pipeline(run)
        rows, psnrs = [], {}
        for size in tqdm(self.sampling.sizes, desc=f"Validation at step {run.step}", unit="size", leave=False):
            originals = [self._original(image, size) for image in self.eval_images]
            low = [low_resolution(original, self.scale) for original in originals]
            outputs = self.sampling.images(
                pipeline,
                size,
                [image.embeds for image in self.eval_images],
                each={"image": low},
                noise_level=self.noise_level,
            )
            for image, small, output, original in zip(self.eval_images, low, outputs, originals):
                name = f"{image.name}_{size}"
                output.save(folder / f"{name}.png")
                bicubic = small.resize(size, Image.Resampling.BICUBIC)
                psnrs[name] = {"output": psnr(output, original), "bicubic": psnr(bicubic, original)}
                rows.append([
                    Cell(small.resize(size, Image.Resampling.NEAREST), f"{image.caption} (low resolution)"),
                    Cell(bicubic, f"bicubic, {psnrs[name]['bicubic']:.2f} dB"),
                    Cell(output, f"step {run.step}, {psnrs[name]['output']:.2f} dB"),
                    Cell(original, f"original ({size})"),
                ])
        write_whole(folder / "psnr.json", (json.dumps(psnrs, indent=2) + "\n").encode())
        mean = {kind: float(np.mean([entry[kind] for entry in psnrs.values()])) for kind in ("output", "bicubic")}
        tqdm.write(f"Validation at step {run.step}: {mean['output']:.2f} dB, bicubic {mean['bicubic']:.2f} dB (PSNR)")
        curves = {CURVE: mean["output"], f"{CURVE}_bicubic": mean["bicubic"]}
        return Rendered(rows, curves | {f"{CURVE}/{name}": entry["output"] for name, entry in psnrs.items()})

    def _original(self, image: EvalImage, size: Size) -> Image.Image:
        """The image at this size, its excess cut off evenly."""
        with_excess = covering(loading.inspect(image.path).size, size)
        pixels = loading.load(image.path, with_excess, self.method)
        return Image.fromarray(pixels).crop(crop_box(with_excess, size, "center"))


def low_resolution(image: Image.Image, scale: int) -> Image.Image:
    """The image as training makes it small."""
    pixels = torch.from_numpy(np.array(image))[None]
    return Image.fromarray(reduce(pixels, scale)[0].permute(1, 2, 0).contiguous().numpy())


def psnr(image: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio of 8-bit RGB in dB; equal images have infinitely much."""
    error = np.mean((np.asarray(image, dtype=np.float64) - np.asarray(original, dtype=np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf
