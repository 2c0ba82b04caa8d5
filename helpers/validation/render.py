"""Validation: pictures of fixed prompts, sizes and seeds while a model is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from helpers.sizes import Size
from helpers.training.loop import Run
from helpers.validation.prompts import Prompt
from helpers.validation.sheet import Cell, sheet

IMAGES = "validation_images"
SHEET = "sheet.png"
BATCH = 16
"""How many pictures are made at a time; guidance doubles that inside the UNet."""


@dataclass(frozen=True)
class Validation:
    """What is rendered at each validation, and how.

    Attributes:
        base: the folder with the model's own scheduler.
        scheduler_changes: keys of its configuration to set otherwise.
        negative: the negative prompt's embedding `[length, D]`.
    """

    base: Path
    output: Path
    prompts: tuple[Prompt, ...]
    negative: Tensor
    sizes: tuple[Size, ...]
    inference_steps: int
    guidance: float
    seed: int
    scheduler_changes: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, run: Run) -> None:
        """Render each prompt at each size into its own file, and all of them onto one sheet.

        Training is afterwards as it was before: mode, gradients and random numbers. An error is reported and does not
        end the training, which may have run for days.
        """
        was_training = run.unet.training
        devices = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), run.accelerator.autocast():
                run.unet.eval()
                self._render_and_write(run, self.output / IMAGES / f"step_{run.step}")
        except (RuntimeError, ValueError, OSError) as error:
            tqdm.write(f"Validation at step {run.step} failed, training goes on: {type(error).__name__}: {error}")
        finally:
            run.unet.train(was_training)

    def _render_and_write(self, run: Run, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        page = sheet(self._render(run, folder))
        page.save(folder / SHEET)
        for tracker in run.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(page)[None]}, step=run.step, **layout)

    def is_done(self, step: int) -> bool:
        """Whether the validation of this step was written, all of it."""
        return (self.output / IMAGES / f"step_{step}" / SHEET).exists()

    def _render(self, run: Run, folder: Path) -> list[list[Cell]]:
        pipeline = self._pipeline(run)
        columns = []
        for size in tqdm(self.sizes, desc=f"Validation at step {run.step}", unit="size", leave=False):
            images = [
                image
                for start in range(0, len(self.prompts), BATCH)
                for image in self._images(pipeline, run.parts.unet, size, self.prompts[start : start + BATCH])
            ]
            for prompt, image in zip(self.prompts, images):
                image.save(folder / f"{prompt.name}_{size}.png")
            columns.append([Cell(image, f"{prompt.text} ({size})") for prompt, image in zip(self.prompts, images)])
        return [list(row) for row in zip(*columns)]

    def _pipeline(self, run: Run) -> diffusers.DiffusionPipeline:
        pipeline = getattr(diffusers, run.parts.spec.pipeline)(
            tokenizer=None,
            text_encoder=None,
            unet=run.parts.unet,
            scheduler=DDPMScheduler.from_pretrained(self.base / "scheduler", **self.scheduler_changes),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(leave=False, desc="  sampling")
        return pipeline

    def _images(
        self, pipeline: diffusers.DiffusionPipeline, unet: torch.nn.Module, size: Size, prompts: Sequence[Prompt]
    ) -> list[Image.Image]:
        """One picture of each prompt, all from the same seed, as one batch."""
        embeds = torch.stack([prompt.embeds for prompt in prompts]).to(unet.device, unet.dtype)
        return pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=self.negative.to(embeds).expand_as(embeds),
            width=size.width,
            height=size.height,
            num_inference_steps=self.inference_steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(self.seed) for _ in prompts],
        ).images


def before_and_after(output: Path, prompts: Sequence[Prompt], sizes: Sequence[Size]) -> Path | None:
    """Set the first and the last picture of each prompt and size side by side in one sheet; None if there are no two."""
    folders = sorted((output / IMAGES).glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))
    rows = []
    for prompt in prompts:
        for size in sizes:
            files = [folder / f"{prompt.name}_{size}.png" for folder in folders]
            files = [file for file in files if file.exists()]
            if len(files) > 1:
                rows.append([_labelled(file, f"{prompt.text} ({size})") for file in (files[0], files[-1])])
    if not rows:
        return None
    path = output / IMAGES / "before_and_after.png"
    sheet(rows).save(path)
    return path


def _labelled(file: Path, text: str) -> Cell:
    return Cell(Image.open(file), f"{file.parent.name.replace('_', ' ')}: {text}")
