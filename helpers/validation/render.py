"""Validation: pictures of fixed prompts, sizes and seeds while a model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Validation:
    """What is rendered at each validation, and how.

    Attributes:
        base: the folder with the model's own scheduler.
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
        page.save(folder / "sheet.png")
        for tracker in run.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(page), run.step, dataformats="HWC")
                tracker.writer.flush()

    def _render(self, run: Run, folder: Path) -> list[list[Cell]]:
        pipeline = self._pipeline(run)
        columns = []
        for size in tqdm(self.sizes, desc=f"Validation at step {run.step}", unit="size", leave=False):
            images = self._images(pipeline, run.parts.unet, size)
            for prompt, image in zip(self.prompts, images):
                image.save(folder / f"{prompt.name}_{size}.png")
            columns.append([Cell(image, f"{prompt.text} ({size})") for prompt, image in zip(self.prompts, images)])
        return [list(row) for row in zip(*columns)]

    def _pipeline(self, run: Run) -> diffusers.DiffusionPipeline:
        pipeline = getattr(diffusers, run.parts.spec.pipeline)(
            tokenizer=None,
            text_encoder=None,
            unet=run.parts.unet,
            scheduler=DDPMScheduler.from_pretrained(self.base / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(leave=False, desc="  sampling")
        return pipeline

    def _images(self, pipeline: diffusers.DiffusionPipeline, unet: torch.nn.Module, size: Size) -> list[Image.Image]:
        """One picture of each prompt, all from the same seed, as one batch."""
        embeds = torch.stack([prompt.embeds for prompt in self.prompts]).to(unet.device, unet.dtype)
        return pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=self.negative.to(embeds).expand_as(embeds),
            width=size.width,
            height=size.height,
            num_inference_steps=self.inference_steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(self.seed) for _ in self.prompts],
        ).images


def before_and_after(output: Path, prompts: Sequence[Prompt], sizes: Sequence[Size]) -> Path | None:
    """Set the first and the last validation side by side in one labelled sheet; None if there were not two."""
    folders = sorted((output / IMAGES).glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))
    if len(folders) < 2:
        return None
    rows = []
    for prompt in prompts:
        for size in sizes:
            file = f"{prompt.name}_{size}.png"
            ends = (folders[0], folders[-1])
            rows.append([Cell(Image.open(folder / file), f"{_step(folder)}: {prompt.text} ({size})") for folder in ends])
    path = output / IMAGES / "before_and_after.png"
    sheet(rows).save(path)
    return path


def _step(folder: Path) -> str:
    return folder.name.replace("_", " ")
