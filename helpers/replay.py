"""A validation picture made again, by its training's own code, options and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers import planning
from helpers.config.load import load_run
from helpers.config.paths import from_root
from helpers.config.problems import found
from helpers.data import preparation
from helpers.files import printable, write_whole
from helpers.models.full import Full
from helpers.pictures import pictures_again
from helpers.planning import Job
from helpers.processes import Processes
from helpers.trainer import REFUSALS as OF_TRAINING
from helpers.trainer import cache_texts
from helpers.training import assembly, checkpoints, run_json
from helpers.training.loop import Run
from helpers.validation import recipe as recipes
from helpers.validation.recipe import IMAGES, NotReplayable, Recipe
from helpers.validation.render import Sampling, as_it_samples

REFUSALS = (*OF_TRAINING, NotReplayable)
"""Why a picture cannot be made again: each says in words what to change."""


def draw_again(image: Path, recipe: Mapping[str, Any], output: Path) -> Path:
    """Make a validation picture again, by its training's own code and files: the same bytes on the same machine.

    Nothing is trained, and nothing is written into the training's folder.

    Args:
        image: found in its training's folder, or anywhere: then the recipe says where that is.
        recipe: of the picture, as `images.recipes.read_recipe` gives it. Anyone may have written it.
        output: the file to write, a PNG.

    Raises:
        one of `REFUSALS`: what was made of it all is not there any more, or something else by now.
    """
    planning.quieten_libraries()
    made = recipes.read(recipe)
    folder = _training_of(image, made)
    resolved, backends = load_run(
        folder / run_json.RUN_JSON, {**made.options, "output_dir": str(folder), "report_to": "none"}
    )
    job = planning.job_of(resolved, backends, Processes())
    if not job.config.shows_eval_images:
        job = replace(job, prompts={shown.name: shown.prompt for shown in made.together})
    weights = _weights_of(job, made)
    planning.check_model(job)
    model = planning.fetch(job)
    job = planning.on_weights(job, model)
    if (job.base, job.config.model.model_type) != (made.base_fingerprint, made.model_type):
        model_type = job.config.model.model_type
        trained = f"{printable(folder)} trained {job.adapter.origin.base_model} ({model_type})"
        raise NotReplayable(f"{trained}, whose weights are others than those that the picture was made with.")
    accelerator = assembly.create_accelerator(job.config)
    captions = [
        [shown.prompt for shown in made.together if shown.image and shown.image.dataset == backend.id]
        for backend in backends.images
    ]
    prompts = [made.negative_prompt, *(shown.prompt for shown in made.together)]
    prepared = preparation.prepare_captions(job.spec.text, prompts)
    texts = cache_texts(job, captions, prepared, model, accelerator.device)
    run = assembly.create_run(job.config, job.spec, model, job.adapter, accelerator, max(1, made.step))
    run.step = made.step
    if weights:
        _take_weights(run, job, weights)
    pictures = pictures_again(job, run.parts.denoiser, texts, model, made)
    for line in _made_otherwise(made, pictures.sampling):
        print(line)
    with tempfile.TemporaryDirectory() as scratch, as_it_samples(run):
        pictures.render(run, Path(scratch))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, (Path(scratch) / f"{made.picture}.png").read_bytes())
    return output


def _training_of(image: Path, made: Recipe) -> Path:
    """The output folder of the training that made a picture."""
    place = image.absolute().parent
    own = [place.parents[1]] if place.parts[-2:] == (IMAGES, f"step_{made.step}") else []
    known = [folder for folder in (*own, from_root(made.output_dir)) if (folder / run_json.RUN_JSON).is_file()]
    if not known:
        words = f"There is no training in {found(made.output_dir)}, which made the picture: put the picture back into"
        raise NotReplayable(f"{words} {IMAGES}/step_{made.step} of that training's OUTPUT_DIR, and name it there.")
    return known[0]


def _weights_of(job: Job, made: Recipe) -> Path | None:
    """Where the weights are that a picture was made with; None for those that a training begins with."""
    output, checkpoint = job.config.run.output_dir, job.config.run.output_dir / f"checkpoint-{made.step}"
    if made.step == 0:
        return None
    damage = checkpoints.damage(checkpoint) if checkpoint.exists() else "not there"
    if damage is None:
        return checkpoint
    if run_json.finished_step(output) == made.step:
        return output / "pipeline" if isinstance(job.adapter, Full) else output
    raise NotReplayable(
        f"The picture was made with {checkpoint.name}, which in {printable(output)} is {damage}: to make such pictures"
        " again, keep the checkpoints of their steps, by CHECKPOINTING_LIMIT=0 and a CHECKPOINTING_STEPS that"
        " VALIDATION_STEPS is a multiple of."
    )


def _take_weights(run: Run, job: Job, weights: Path) -> None:
    """Take those of a checkpoint, or of the result, in which averaged ones are in place of the trained ones."""
    with checkpoints.refused_if_other(weights):
        job.adapter.load_weights(run.parts.denoiser, weights)
        if run.ema and weights.name == f"checkpoint-{run.step}":
            run.restore_average(checkpoints.load_state(weights)["run"]["ema"])
        elif run.ema:
            run.ema.restart()


def _made_otherwise(made: Recipe, sampling: Sampling) -> Iterator[str]:
    """What to tell where other bits may come out, or, where the training had other options then, another picture."""
    for what, there, here in (
        ("precision", made.precision, sampling.origin["precision"]),
        ("the scheduler's", made.scheduler_changes, dict(sampling.scheduler_changes)),
    ):
        if there != here:
            words = f"The picture was made with {what} {found(there)}, and its training has {found(here)} now"
            yield f"{words}: another one may come out."
    for name, here in recipes.made_with().items():
        there = made.versions.get(name)
        if there != here:
            yield f"The picture was made with {name} {found(there)}, and this is {here}: its last bits may be others."
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if made.device != here:
        words = f"The picture was made on the device {found(made.device)}, and this is {here}"
        yield f"{words}: its last bits may be others."
