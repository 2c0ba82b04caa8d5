"""What is rendered while a model trains: the prompts of the options, or eval images of the datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from helpers.caching.embeds import EmbedCache
from helpers.caching.tokens import Tokens
from helpers.config.backends import ImageBackend
from helpers.config.paths import portable, portable_model
from helpers.data.dataset import Dataset
from helpers.data.preparation import TextCaches
from helpers.data.records import Record
from helpers.files import content_hash, on_one_line, printable
from helpers.models.denoiser import Denoiser
from helpers.planning import Job
from helpers.validation.eval_images import Controlled, EvalImage, Upscales, choose, file_name
from helpers.validation.prompts import Prompt, PromptPictures
from helpers.validation.recipe import File, NotReplayable, Recipe
from helpers.validation.render import Pictures, Sampling, Validation


def validation_of(
    job: Job, denoiser: Denoiser, texts: TextCaches, model: Path, datasets: Sequence[Dataset]
) -> Validation | None:
    """What to render; None where there is nothing to.

    Args:
        denoiser: in training; its text encoder, if it has one, reads the prompts as it is at each validation.
    """
    sampling = _sampling(job, denoiser, texts, model)
    if job.config.shows_eval_images:
        pictures = _of_eval_images(job, _eval_images(job, texts, datasets, sampling), sampling)
    else:
        pictures = PromptPictures(sampling, tuple(Prompt(name, text) for name, text in job.prompts.items()))
    if pictures.titles:
        return Validation(job.config.run.output_dir, pictures)
    if not job.config.shows_eval_images:
        lacking = "VALIDATION_PROMPT (--validation_prompt) is not set"
    elif not job.config.validation.num_eval_images:
        lacking = "NUM_EVAL_IMAGES (--num_eval_images) is 0"
    else:
        lacking = "No image fills any size of VALIDATION_RESOLUTION (--validation_resolution)"
    print(f"{lacking}: no validation images will be made.")
    return None


def pictures_again(job: Job, denoiser: Denoiser, texts: TextCaches, model: Path, recipe: Recipe) -> Pictures:
    """What was made together with a picture, to be rendered once more.

    Args:
        job: with the recipe's options.

    Raises:
        NotReplayable: an image of a dataset is gone, or another one by now.
    """
    sampling = _sampling(job, denoiser, texts, model)
    sampling = replace(sampling, origin={**sampling.origin, "output_dir": recipe.output_dir})
    if not job.config.shows_eval_images:
        return PromptPictures(sampling, tuple(Prompt(shown.name, shown.prompt) for shown in recipe.together))
    backends = {backend.id: backend for backend in job.backends.images}
    images = []
    for shown in recipe.together:
        backend = backends.get(shown.image.dataset) if shown.image else None
        conditioning = job.backends.conditioning_of(backend) if backend else None
        if backend is None or bool(conditioning) != bool(shown.control):
            raise NotReplayable(f"{shown.name} was made of an image of a dataset that the run does not have any more.")
        images.append(EvalImage(
            name=shown.name,
            path=_unchanged(shown.image, backend.instance_data_dir),
            caption=shown.prompt,
            embeds=_read(texts, texts.by_id[backend.text_embeds], shown.prompt),
            sizes=sampling.sizes,
            control=_unchanged(shown.control, conditioning.instance_data_dir) if conditioning else None,
            file=shown.image,
            control_file=shown.control,
        ))
    return _of_eval_images(job, tuple(images), sampling)


def _unchanged(file: File, folder: Path) -> Path:
    path = folder / file.path
    try:
        what = None if content_hash(path) == file.content else "is another image by now"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    if what:
        words = f"{printable(path)} {what}: put back what the picture was made of."
        raise NotReplayable(f"dataset {on_one_line(repr(file.dataset))}: {words}")
    return path


def _sampling(job: Job, denoiser: Denoiser, texts: TextCaches, model: Path) -> Sampling:
    options, training = job.config.validation, job.config.training
    return Sampling(
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
        origin={
            "model_type": job.config.model.model_type,
            "base_model": portable_model(job.config.model.pretrained_model_name_or_path),
            "base_fingerprint": job.base,
            "pipeline": job.spec.pipeline,
            "output_dir": portable(job.config.run.output_dir),
            "precision": "pure bf16" if training.pure_bf16 else training.mixed_precision,
        },
    )


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
            file=_file(record, dataset.id, dataset.folder),
            control_file=_control_file(job, backend, record),
        )
        for backend, dataset in zip(job.backends.images, datasets)
        for record, sizes in choice.images[dataset.id].items()
    )


def _control_file(job: Job, backend: ImageBackend, record: Record) -> File | None:
    conditioning = job.backends.conditioning_of(backend)
    if conditioning is None or record.control is None:
        return None
    return _file(record.control, conditioning.id, conditioning.instance_data_dir)


def _file(record: Record, dataset: str, folder: Path) -> File:
    return File(dataset=dataset, path=str(record.path.relative_to(folder)), content=record.content)


@torch.no_grad()
def _embed(denoiser: Denoiser, texts: TextCaches, caption: str) -> torch.Tensor:
    """A caption's embedding `[length, D]`: the cached one, or by the text encoder in training."""
    text = _read(texts, texts.default, caption)
    if denoiser.text_encoder is None:
        return text
    return denoiser.embed(text[None].to(denoiser.text_encoder.device))[0]


def _read(texts: TextCaches, cache: EmbedCache | Tokens, caption: str) -> torch.Tensor:
    return cache.read([texts.prepared[caption]])[0]
