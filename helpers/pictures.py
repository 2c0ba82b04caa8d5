"""What is rendered while a model trains: the prompts of the options, or eval images of the datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from helpers.caching.embeds import EmbedCache
from helpers.data.dataset import Dataset
from helpers.data.preparation import TextCaches
from helpers.planning import Job
from helpers.validation.eval_images import EvalImage, Upscales, choose, file_name
from helpers.validation.prompts import PromptPictures, with_embeds
from helpers.validation.render import Sampling, Validation


def validation_of(job: Job, texts: TextCaches, model: Path, datasets: Sequence[Dataset]) -> Validation | None:
    """What to render; None where there is nothing to."""
    options = job.config.validation
    sampling = Sampling(
        base=model,
        sizes=options.validation_resolution,
        negative=_embed(texts, texts.default, options.validation_negative_prompt),
        inference_steps=options.validation_num_inference_steps,
        guidance=options.validation_guidance,
        seed=options.validation_seed,
        guidance_rescale=options.validation_guidance_rescale,
        noise_scheduler=options.validation_noise_scheduler,
        scheduler_changes=job.adapter.origin.scheduler_changes,
        variant=job.config.model.variant,
    )
    if job.config.family.upscales:
        pictures = _upscales(job, texts, datasets, sampling)
    else:
        prompts = with_embeds(job.prompts, lambda text: _embed(texts, texts.default, text))
        pictures = PromptPictures(sampling, prompts)
    if pictures.titles:
        return Validation(job.config.run.output_dir, pictures)
    if not job.config.family.upscales:
        lacking = "VALIDATION_PROMPT (--validation_prompt) is not set"
    elif not options.num_eval_images:
        lacking = "NUM_EVAL_IMAGES (--num_eval_images) is 0"
    else:
        lacking = "No image fills any size of VALIDATION_RESOLUTION (--validation_resolution)"
    print(f"{lacking}: no validation images will be made.")
    return None


def _upscales(job: Job, texts: TextCaches, datasets: Sequence[Dataset], sampling: Sampling) -> Upscales:
    options = job.config.validation
    if options.validation_prompt or options.validation_prompt_library:
        name = job.config.family.name
        print(f"{name} upscales eval images, each by its own caption: validation prompts are not drawn.")
    output, seed = job.config.run.output_dir, options.validation_seed
    choice = choose(datasets, sampling.sizes, options.num_eval_images, seed, output)
    for note in choice.notes:
        print(note)
    eval_images = tuple(
        EvalImage(
            name=file_name(dataset, record),
            path=record.path,
            caption=record.captions[0],
            embeds=_embed(texts, texts.by_id[backend.text_embeds], record.captions[0]),
            sizes=sizes,
        )
        for backend, dataset in zip(job.backends.images, datasets)
        for record, sizes in choice.images[dataset.id].items()
    )
    scale, method = job.spec.conditioning.scale, job.config.data.downsample_method
    return Upscales(sampling, eval_images, scale, options.validation_noise_level, method)


def _embed(texts: TextCaches, cache: EmbedCache, caption: str) -> torch.Tensor:
    return cache.read([texts.prepared[caption]])[0]
