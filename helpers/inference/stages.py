"""One stage of a cascade: its model with its adapters, and what it makes of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

from helpers.inference.schedules import timesteps_of
from helpers.models import loading
from helpers.models.bases import Base, load_unet
from helpers.models.errors import unfit
from helpers.models.offloading import in_groups
from helpers.models.precision import AsFloat32
from helpers.models.results import AdapterFile, load_adapter, scheduler_changes
from helpers.models.schedulers import sampler
from helpers.models.text import bare_text_encoder
from helpers.sizes import Size


@dataclass(frozen=True)
class Adapted:
    """An adapter and how strongly it acts."""

    file: AdapterFile
    scale: float

    @property
    def of_text(self) -> bool:
        """Whether it changes the text encoder too."""
        return self.file.content is not None and bool(self.file.content.of("text_encoder"))


@dataclass(frozen=True)
class Stage:
    """What a stage does, settled before its weights load.

    Attributes:
        option: that names its model: "stage1".
        size: of its pictures.
        steps: a number, or the name of a schedule.
        noise_level: of the low-resolution image; None where there is none.
        scheduler: a key of `schedulers.SAMPLERS`; None: the model's own.
        variant: of its weight files.
    """

    option: str
    base: Base
    adapters: tuple[Adapted, ...]
    size: Size
    steps: int | str
    guidance: float
    noise_level: int | None
    scheduler: str | None
    variant: str | None


def open_stage(
    stage: Stage, folder: Path, device: torch.device, dtype: torch.dtype, by_groups: bool
) -> DiffusionPipeline:
    """The pipeline of a stage, of which only the UNet is loaded, with its adapters.

    Args:
        folder: with its weights.
        by_groups: the UNet comes to the device layer by layer.

    Raises:
        WeightsError, AdapterError: in words.
    """
    spec = stage.base.spec
    kind, low_res = getattr(diffusers, spec.pipeline), spec.conditioning.scheduler
    changes = scheduler_changes(adapted.file for adapted in stage.adapters)
    # DDIM and DDPM clip x_0 unless they are told not to, and only some pipelines tell them.
    changes |= {"clip_sample": False} if spec.space.component else {}
    # What knows of no zero terminal SNR would leave it out without a word.
    name = "ddim" if changes.get("rescale_betas_zero_snr") and stage.scheduler is None else stage.scheduler
    try:
        scheduler = sampler(name, folder, changes)
        components = {low_res: DDPMScheduler.from_pretrained(folder / low_res)} if low_res else {}
    except Exception as error:  # whatever a config of any content makes diffusers raise
        raise unfit("a scheduler", folder, error) from error
    takes = inspect.signature(kind).parameters
    others = {"requires_safety_checker": False, "max_noise_level": loading.noise_levels(spec, folder)}
    components |= {name: value for name, value in others.items() if name in takes}
    unet = load_unet(folder, dtype, stage.variant)
    pipeline = kind(**dict.fromkeys(takes) | components | {"unet": unet, "scheduler": scheduler})
    _adapt(pipeline, stage, folder)
    pipeline.scheduler = scheduler
    unet = in_groups(unet, device) if by_groups else unet.to(device)
    pipeline.unet = AsFloat32(unet)
    if spec.space.component:
        pipeline.vae = _Unloaded(spec.space.channels)
        pipeline.vae_scale_factor = spec.space.factor
    return pipeline


class _Unloaded:
    """What a pipeline asks of its VAE where that is not loaded, as it decodes nothing."""

    def __init__(self, channels: int) -> None:
        self.config = SimpleNamespace(latent_channels=channels)


def _adapt(pipeline: DiffusionPipeline, stage: Stage, folder: Path) -> None:
    """Load the adapters: biases first, which no LoRA may stand before."""
    if any(adapted.of_text for adapted in stage.adapters):  # only its layers' places are needed here
        pipeline.text_encoder = bare_text_encoder(folder)
    load_adapters(pipeline, stage.adapters)
    if pipeline.text_encoder is not None:
        pipeline.text_encoder = None


def load_adapters(pipeline: DiffusionPipeline, adapters: Sequence[Adapted]) -> None:
    """Load adapters into a pipeline, each with its scale.

    Raises:
        AdapterError: see `results.load_adapter`.
    """
    ordered = sorted(adapters, key=lambda adapted: adapted.file.content is not None)
    scales = {}
    for number, adapted in enumerate(ordered):
        load_adapter(pipeline, adapted.file, f"adapter_{number}")
        if adapted.file.content is not None:
            scales[f"adapter_{number}"] = adapted.scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))


def sample(
    pipeline: DiffusionPipeline,
    stage: Stage,
    prompts: Tensor,
    negative: Tensor,
    seeds: Sequence[int],
    images: Sequence[Image.Image] | None,
) -> Tensor:
    """What a stage makes of a batch: pixels in [-1, 1] or latents, float32 `[B, C, h, w]` on the CPU.

    Args:
        prompts, negative: embeddings `[B, length, D]`.
        seeds: one for each picture.
        images: in low resolution, for a stage that upscales.
    """
    call = inspect.signature(pipeline.__call__).parameters
    sized = {"width": stage.size.width, "height": stage.size.height} if "width" in call else {}
    steps = {"timesteps": timesteps_of(stage.steps)} if isinstance(stage.steps, str) else {
        "num_inference_steps": stage.steps
    }
    shown = {"image": list(images), "noise_level": stage.noise_level} if images is not None else {}
    # In float32, so that nothing is drawn or noised in less.
    prompts, negative = (embeds.to(pipeline.unet.device, torch.float32) for embeds in (prompts, negative))
    with torch.inference_mode():
        made = pipeline(
            prompt_embeds=prompts,
            negative_prompt_embeds=negative,
            guidance_scale=stage.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent" if stage.base.spec.space.component else "pt",
            **sized,
            **steps,
            **shown,
        ).images
    return made.float().cpu()


def decode(vae: diffusers.AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels `[1, 3, H, W]` of one picture's latents `[C, h, w]`, in the VAE's own float32: bfloat16 leaves bands."""
    device = next(vae.parameters()).device
    with torch.inference_mode():
        return vae.decode(latents[None].to(device) / vae.config.scaling_factor).sample.float().cpu()


def to_images(x: Tensor) -> list[Image.Image]:
    """8-bit pictures from pixels in [-1, 1], `[B, 3, H, W]`."""
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(each.contiguous().numpy()) for each in pixels]


def noise_level_problem(base: Base, level: int) -> str | None:
    """What is wrong with a noise level for a model, in words."""
    levels = getattr(base.spec.conditioning, "levels", None)
    most = (loading.noise_levels(base.spec, base.configs) or levels) if base.configs and levels else levels
    if most is not None and level > most:
        return f"found {level}, but {base.family.name} knows noise levels up to {most}: type 20"
    return None
