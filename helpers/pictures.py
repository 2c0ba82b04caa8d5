"""What is rendered while a model trains: the prompts of the options, or eval images of the datasets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from helpers.caching.embeds import EmbedCache
from helpers.caching.tokens import Tokens
from helpers.data.dataset import Dataset
from helpers.data.preparation import TextCaches
from helpers.models.denoiser import Denoiser
from helpers.planning import Job
from helpers.validation.eval_images import Controlled, EvalImage, Upscales, choose, file_name
from helpers.validation.prompts import Prompt, PromptPictures
from helpers.validation.render import Sampling, Validation


def validation_of(
    job: Job, denoiser: Denoiser, texts: TextCaches, model: Path, datasets: Sequence[Dataset]
) -> Validation | None:
    """What to render; None where there is nothing to.

    Args:
        denoiser: in training; its text encoder, if it has one, reads the prompts as it is at each validation.
    """
    options = job.config.validation
    sampling = Sampling(
        base=model,
        sizes=options.validation_resolution,
        embed=partial(_embed, denoiser, texts),
        negative=options.validation_negative_prompt,
        inference_steps=options.validation_num_inference_steps,
        guidance=options.validation_guidance,
        seed=options.validation_seed,
        guidance_rescale=options.validation_guidance_rescale,
        noise_scheduler=options.validation_noise_scheduler,
        scheduler_changes=job.adapter.origin.scheduler_changes,
        variant=job.config.model.variant,
    )
    if job.config.shows_eval_images:
        pictures = _of_eval_images(job, _eval_images(job, texts, datasets, sampling), sampling)
    else:
        pictures = PromptPictures(sampling, tuple(Prompt(name, text) for name, text in job.prompts.items()))
    if pictures.titles:
        return Validation(job.config.run.output_dir, pictures)
    if not job.config.shows_eval_images:
        lacking = "VALIDATION_PROMPT (--validation_prompt) is not set"
    elif not options.num_eval_images:
        lacking = "NUM_EVAL_IMAGES (--num_eval_images) is 0"
    else:
        lacking = "No image fills any size of VALIDATION_RESOLUTION (--validation_resolution)"
    print(f"{lacking}: no validation images will be made.")
    return None


def _of_eval_images(job: Job, images: tuple[EvalImage, ...], sampling: Sampling) -> Upscales | Controlled:
    method = job.config.data.downsample_method
    if job.config.training.controlnet:
        return Controlled(sampling, images, method)
    return Upscales(sampling, images, job.spec.conditioning.scale, job.config.validation.validation_noise_level, method)


def _eval_images(
    job: Job, texts: TextCaches, datasets: Sequence[Dataset], sampling: Sampling
) -> tuple[EvalImage, ...]:
    options = job.config.validation
    if options.validation_prompt or options.validation_prompt_library:
        what = f"{job.config.family.name} upscales eval images"
        what = "A ControlNet is shown conditioning images of the datasets" if job.config.training.controlnet else what
        print(f"{what}, each by its own caption: validation prompts are not drawn.")
    output, seed = job.config.run.output_dir, options.validation_seed
    choice = choose(datasets, sampling.sizes, options.num_eval_images, seed, output)
    for note in choice.notes:
        print(note)
    return tuple(
        EvalImage(
            name=file_name(dataset, record),
            path=record.path,
            caption=record.captions[0],
            embeds=_read(texts, texts.by_id[backend.text_embeds], record.captions[0]),
            sizes=sizes,
            control=record.control.path if record.control else None,
        )
        for backend, dataset in zip(job.backends.images, datasets)
        for record, sizes in choice.images[dataset.id].items()
    )


@torch.no_grad()
def _embed(denoiser: Denoiser, texts: TextCaches, caption: str) -> torch.Tensor:
    """A caption's embedding `[length, D]`: the cached one, or by the text encoder in training."""
    text = _read(texts, texts.default, caption)
    if denoiser.text_encoder is None:
        return text
    return denoiser.embed(text[None].to(denoiser.text_encoder.device))[0]


def _read(texts: TextCaches, cache: EmbedCache | Tokens, caption: str) -> torch.Tensor:
    return cache.read([texts.prepared[caption]])[0]
