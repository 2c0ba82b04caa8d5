"""Validation: the same pictures again and again while a model is trained."""

from __future__ import annotations

import gc
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from helpers.files import telling_if_full, write_whole
from helpers.images.recipes import save_png
from helpers.models.precision import AsFloat32
from helpers.models.schedulers import sampler
from helpers.sizes import Size
from helpers.training.loop import Run
from helpers.validation.recipe import IMAGES, Recipe, Shown, made_with, picture_name
from helpers.validation.sheet import Cell, sheet

SHEET, BEFORE_AND_AFTER = "sheet.png", "before_and_after.png"
BATCH_PIXELS = 16 * 64 * 64
"""How much is made at a time: 16 pictures of stage I, one of stage II. Guidance doubles that inside the UNet."""
LARGEST_WHOLE = 1024 * 1024
"""Pixels of the largest picture that a VAE decodes as a whole, which takes 3 GB; larger ones come out of tiles."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are made.

    Attributes:
        base: the folder with the model's own components.
        guidance_rescale: 0..1, of pipelines that have it.
        noise_scheduler: a key of `schedulers.SAMPLERS`.
        sizes: every picture is made at each of them.
        embed: gives a prompt's embedding `[length, D]`, anew at each validation: its encoder may be in training.
        negative: the negative prompt.
        scheduler_changes: keys of the scheduler's configuration to set otherwise.
        variant: that of the weight files.
        origin: what a `Recipe` tells of the training, besides its step.
    """

    base: Path
    sizes: tuple[Size, ...]
    embed: Callable[[str], Tensor]
    negative: str
    inference_steps: int
    guidance: float
    seed: int
    guidance_rescale: float = 0.0
    noise_scheduler: str = "ddpm"
    scheduler_changes: Mapping[str, object] = field(default_factory=dict)
    variant: str | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def pipeline(self, run: Run) -> DiffusionPipeline:
        """The family's pipeline around the UNet in training."""
        spec = run.parts.spec
        kind, low_res = getattr(diffusers, spec.pipeline), spec.conditioning.scheduler
        # DDIM and DDPM clip x_0 unless they are told not to, and only some pipelines tell them.
        unclipped = {"clip_sample": False} if spec.space.component else {}
        components = {
            "unet": run.parts.unet,
            "scheduler": sampler(self.noise_scheduler, self.base, {**self.scheduler_changes, **unclipped}),
            "requires_safety_checker": False,
        }
        if run.parts.denoiser.controlnet is not None:
            components["controlnet"] = run.parts.denoiser.controlnet
        if low_res:
            components[low_res] = DDPMScheduler.from_pretrained(self.base / low_res)
        if spec.space.component:
            components[spec.space.component] = spec.space.load(self.base, run.accelerator.device, self.variant)
        takes = inspect.signature(kind).parameters
        if run.parts.low_res_schedule:
            components["max_noise_level"] = run.parts.low_res_schedule.timesteps
        # The text is encoded already, and pictures of one's own training are not censored.
        absent = dict.fromkeys(takes)
        pipeline = kind(**{name: value for name, value in {**absent, **components}.items() if name in takes})
        pipeline.unet = AsFloat32(run.parts.unet)
        pipeline.set_progress_bar_config(leave=False, desc="  sampling")
        return pipeline

    def images(
        self,
        pipeline: DiffusionPipeline,
        size: Size,
        embeds: Sequence[Tensor],
        each: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        **shared: Any,
    ) -> list[Image.Image]:
        """One picture for each embedding `[length, D]`, all from the same seed.

        Args:
            each: arguments of the pipeline of which each picture has its own.
            shared: those that all have in common.
        """
        sized = {"width": size.width, "height": size.height}
        if "width" not in inspect.signature(pipeline.__call__).parameters:  # an upscaler whose image gives the size
            sized = {}
        pictures, negative, vae = [], self.embed(self.negative), pipeline.components.get("vae")
        for part in _batches(size, len(embeds)):
            # Cast before they are joined: float16's autocast joins no bfloat16, which cached ones are.
            prompts = torch.stack([own.to(pipeline.unet.device, pipeline.unet.dtype) for own in embeds[part]])
            made = pipeline(
                prompt_embeds=prompts,
                negative_prompt_embeds=negative.to(prompts).expand_as(prompts),
                **sized,
                num_inference_steps=self.inference_steps,
                guidance_scale=self.guidance,
                generator=[torch.Generator().manual_seed(self.seed) for _ in prompts],
                **({"guidance_rescale": self.guidance_rescale} if self.guidance_rescale else {}),
                **{name: list(values[part]) for name, values in each.items()},
                output_type="latent" if vae else "pil",
                **shared,
            ).images
            pictures += self._decoded(pipeline, vae, made, in_tiles(size)) if vae else made
        return pictures

    def save(
        self,
        run: Run,
        folder: Path,
        size: Size,
        shown: Sequence[Shown],
        pictures: Sequence[Image.Image],
        noise_level: int | None = None,
    ) -> None:
        """Write what `images` made, each picture with its recipe into its own file."""
        alike = {
            "step": run.step,
            "negative_prompt": self.negative,
            "width": size.width,
            "height": size.height,
            "seed": self.seed,
            "inference_steps": self.inference_steps,
            "guidance": self.guidance,
            "guidance_rescale": self.guidance_rescale,
            "scheduler": self.noise_scheduler,
            "scheduler_changes": dict(self.scheduler_changes),
            "noise_level": noise_level,
            "averaged": run.ema is not None,
            "device": run.accelerator.device.type,
            "versions": made_with(),
            **self.origin,
        }
        for part in _batches(size, len(pictures)):
            for own, picture in zip(shown[part], pictures[part]):
                name = picture_name(own.name, size)
                recipe = Recipe(picture=name, prompt=own.prompt, together=list(shown[part]), **alike)
                save_png(picture, folder / f"{name}.png", recipe.model_dump(exclude_none=True))

    @staticmethod
    def _decoded(pipeline: DiffusionPipeline, vae: AutoencoderKL, latents: Tensor, tiled: bool) -> list[Image.Image]:
        """Pictures from latents, in the VAE's own float32 whatever the UNet computes in: bfloat16 leaves bands."""
        vae.enable_tiling() if tiled else vae.disable_tiling()
        with torch.autocast(latents.device.type, enabled=False), torch.inference_mode():
            decoded = vae.decode(latents.float() / vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(decoded, output_type="pil")


def at_once(size: Size) -> int:
    """How many pictures of a size are made at a time."""
    return max(1, BATCH_PIXELS // (size.width * size.height))


def in_tiles(size: Size) -> bool:
    """Whether the VAE decodes pictures of a size in tiles."""
    return size.width * size.height > LARGEST_WHOLE


def _batches(size: Size, count: int) -> list[slice]:
    """Which of so many pictures are made at a time."""
    return [slice(start, start + at_once(size)) for start in range(0, count, at_once(size))]


@contextmanager
def as_it_samples(run: Run) -> Iterator[None]:
    """Within it the model is as pictures are made with it: averaged, in its mode and dtype. Then as it was before."""
    was_training = run.denoiser.training
    devices = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), run.autocast(), run.averaged_weights():
            run.denoiser.eval()
            yield
    finally:
        run.denoiser.train(was_training)


@dataclass(frozen=True)
class Rendered:
    """What one validation made: the rows of its sheet, and numbers by the names of their curves."""

    rows: Sequence[Sequence[Cell]]
    curves: Mapping[str, float] = field(default_factory=dict)


class Pictures(Protocol):
    """What is rendered at each validation."""

    @property
    def titles(self) -> Mapping[str, str]:
        """The name of each picture's file, without its suffix, and what the picture is."""

    def render(self, run: Run, folder: Path) -> Rendered:
        """Make the pictures and write each into its file in the folder."""


@dataclass(frozen=True)
class Validation:
    """Renders, writes and logs."""

    output: Path
    pictures: Pictures

    def __call__(self, run: Run) -> None:
        """Render each picture into its own file, and all of them onto one sheet.

        Training is afterwards as it was before: mode, weights, gradients, random numbers and memory. An error is
        reported and does not end the training, which may have run for days. A run that is asked to stop does not wait
        for the pictures, which are made where it goes on.
        """
        def heed(*_: object) -> None:
            run.requests.look(self.output)
            if run.requests.stop is not None:
                raise _LeftOff

        heeding = run.parts.unet.register_forward_pre_hook(heed)
        failure = None
        try:
            with as_it_samples(run), telling_if_full("validation images", self.output):
                self._render_and_log(run, self.output / IMAGES / f"step_{run.step}")
        except _LeftOff:
            tqdm.write(f"Validation at step {run.step} is left off: the run was asked to stop.")
        except Exception as error:  # whatever it is, training goes on without these pictures
            failure = f"Validation at step {run.step} failed, training goes on: {type(error).__name__}: {error}"
        finally:
            heeding.remove()
        if failure:  # only here, where nothing holds the error any more, and with it all that was made before it
            _give_back_memory(run.accelerator.device)
            tqdm.write(failure)

    def _render_and_log(self, run: Run, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rendered = self.pictures.render(run, folder)
        page = sheet(rendered.rows)
        if rendered.curves:
            run.accelerator.log(dict(rendered.curves), step=run.step)
        for tracker in run.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(page)[None]}, step=run.step, **layout)
        file = io.BytesIO()
        page.save(file, "PNG")
        write_whole(folder / SHEET, file.getvalue())  # the last thing, by which `is_done` knows that all is there

    def is_done(self, step: int) -> bool:
        """Whether the validation of this step was written, all of it."""
        return (self.output / IMAGES / f"step_{step}" / SHEET).exists()

    def before_and_after(self) -> Path | None:
        """Set the first and the last of each picture side by side in one sheet; None if there are no two of any.

        An error is reported: the training that is done is not lost for it.
        """
        try:
            return self._before_and_after()
        except Exception as error:
            tqdm.write(f"The pictures before and after cannot be set side by side: {type(error).__name__}: {error}")
            return None

    def _before_and_after(self) -> Path | None:
        steps = (self.output / IMAGES).glob("step_*")
        folders = sorted(steps, key=lambda folder: int(folder.name.removeprefix("step_")))
        rows = []
        for name, title in self.pictures.titles.items():
            files = [file for folder in folders if (file := folder / f"{name}.png").exists()]
            if len(files) > 1:
                rows.append([_labelled(file, title) for file in (files[0], files[-1])])
        if not rows:
            return None
        path = self.output / IMAGES / BEFORE_AND_AFTER
        sheet(rows).save(path)
        return path


class _LeftOff(Exception):
    """The run was asked to stop in the middle of a validation."""


def _give_back_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _labelled(file: Path, title: str) -> Cell:
    return Cell(Image.open(file), f"{file.parent.name.replace('_', ' ')}: {title}")
