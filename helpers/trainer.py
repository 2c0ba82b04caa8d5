"""From checked options to a trained model: the one module that knows all packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from helpers import planning
from helpers.caching.embeds import NonFiniteEmbedding
from helpers.caching.latents import NonFiniteLatent
from helpers.caching.store import DamagedShard
from helpers.config.backends import Backends, ImageBackend
from helpers.config.load import Resolved
from helpers.config.options import ROWS
from helpers.config.paths import shown
from helpers.config.problems import ConfigError
from helpers.data import preparation
from helpers.data.collate import Batch, CachedMoments, CachedPixels, Collator
from helpers.data.dataset import Dataset
from helpers.data.preparation import NULL_CAPTION, TextCaches
from helpers.data.sampler import Position
from helpers.data.scan import DatasetError, write_left_out
from helpers.models.loading import WeightsError
from helpers.pictures import validation_of
from helpers.planning import Job, Plan
from helpers.processes import Processes
from helpers.publishing import hub
from helpers.publishing.finish import finish
from helpers.publishing.hub import Hub, Uploads
from helpers.training import assembly, checkpoints, loop, run_json
from helpers.training.accounts import require_account, require_repository
from helpers.training.assembly import Ending
from helpers.training.checkpoints import CheckpointError
from helpers.training.loop import Every, Run, require_finite
from helpers.training.requests import Requests, resume_command
from helpers.validation.render import Validation

REFUSALS = (ConfigError, DatasetError, WeightsError, CheckpointError, NonFiniteEmbedding, NonFiniteLatent, DamagedShard)
"""What the user's input can be wrong in: each says in words what to change."""


def train(resolved: Resolved, backends: Backends, requests: Requests, processes: Processes) -> int:
    """Plan the data, check the weights, fill the caches, train, export. Returns the exit code.

    Raises:
        one of `REFUSALS`: before the UNet's weights load.
        Interrupted: before there was anything to save.
        NonFiniteLoss: training broke down; the checkpoints so far are intact.
        PeerLost: another process ended; the checkpoints so far are intact.
    """
    planning.quieten_libraries()
    job = planning.job_of(resolved, backends, processes)
    planning.require_writable(job)
    if job.config.run.dry_run:
        looked_at = "The options, the data and the weights fit together." if planning.plan(job).configs else (
            f"The weights of {job.config.model.pretrained_model_name_or_path} were not looked at."
        )
        print(f"Dry run: nothing was downloaded or trained. {looked_at}")
        return 0
    if processes.is_first:
        require_account(job.config.run.report_to)
        job = replace(job, hub=require_repository(job.config.run))
    with checkpoints.only_run_in(job.config.run.output_dir) if processes.is_first else nullcontext():
        return _prepare_and_train(planning.plan(job), requests)


def _prepare_and_train(plan: Plan, requests: Requests) -> int:
    job, processes = plan.job, plan.job.processes
    accelerator = assembly.create_accelerator(job.config)
    fetched = cache(lambda: planning.fetch(job))
    datasets, images, controls = _cache_images(job, plan.datasets, fetched, accelerator.device)
    model = fetched()
    job = planning.on_weights(job, model)
    if plan.checkpoint:
        checkpoints.require_base(plan.checkpoint, job.base, job.adapter.origin.prediction_type)
    sampler = job.sampler(datasets)
    ending = job.ending(sampler)
    processes.first_does(lambda: _open_output(job))
    texts = cache_texts(job, [dataset.captions() for dataset in datasets], plan.prepared, model, accelerator.device)
    run = assembly.create_run(job.config, job.spec, model, job.adapter, accelerator, ending.steps, processes)
    run.requests = requests
    run.utilisation = planning.utilisation(job, model / "unet" / "config.json", datasets, accelerator.device)
    if plan.checkpoint:
        _resume(run, job, plan.checkpoint, ending)
    assembly.start_tracker(accelerator, job.config, job.options["options"])
    validation = validation_of(job, run.parts.denoiser, texts, model, datasets) if processes.is_first else None
    collator = _collator(job, texts, images, controls, pin_memory=accelerator.device.type == "cuda")
    parts = ((after, batch.part(processes)) for after, batch in sampler.batches(run.position))
    return _train_and_export(run, job, model, validation, collator.stream(parts), datasets, plan.data)


def _open_output(job: Job) -> None:
    """Make the output folder and write down what this run is."""
    output = job.config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    run_json.write(output, job.options)
    checkpoints.sweep(output)
    hub.sweep(output)


def cache_texts(
    job: Job, captions: Sequence[Sequence[str]], prepared: Mapping[str, str], model: Path, device: torch.device
) -> TextCaches:
    """The embeddings of each dataset's captions and of the job's prompts; what is not cached yet is encoded."""
    config = job.config
    if config.lora.train_text_encoder:
        return preparation.tokenized_texts(job.spec.text, model, job.backends, prepared)
    variant, storage = config.model.variant, config.data.text_embeds_storage
    texts = preparation.open_text_caches(job.spec.text, model, job.backends, prepared, variant, storage)
    wanted = {cache_id: [NULL_CAPTION] for cache_id in texts.by_id}
    for backend, own in zip(job.backends.images, captions):
        wanted[backend.text_embeds] += own
    wanted[texts.default_id] += [config.validation.validation_negative_prompt, *job.prompts.values()]
    device = device if config.data.text_encoder_device == "auto" else torch.device("cpu")
    batch_size = config.data.text_encoder_batch_size
    try:
        preparation.cache_texts(job.spec.text, model, texts, wanted, batch_size, device, variant, job.processes)
    except torch.OutOfMemoryError as error:
        words = f"the text encoder does not fit on the GPU beside what is there ({error}): type cpu"
        raise ConfigError([f"--text_encoder_device (export TEXT_ENCODER_DEVICE): {words}"]) from error
    return texts


def _cache_images(
    job: Job, datasets: Sequence[Dataset], fetched: Callable[[], Path], device: torch.device
) -> tuple[list[Dataset], list[CachedPixels | CachedMoments], list[CachedPixels | None]]:
    """The datasets without what could not be decoded, the cache of each and that of its conditioning images.

    What is left out is written down.

    Args:
        fetched: the weights, which may have to be downloaded: asked for only where images are encoded by them.
    """
    pairs = zip(datasets, job.backends.images)
    if job.spec.space.component:
        cached = _cache_latents(job, pairs, fetched(), device)
    else:
        cached = [preparation.cache_pixels(dataset, backend, job.processes) for dataset, backend in pairs]
    controlled = [_cache_controls(job, *pair) for pair in zip((dataset for dataset, _ in cached), job.backends.images)]
    kept = [dataset for dataset, _ in controlled]
    for before, after in zip(datasets, kept):
        if len(after.records) < len(before.records):
            lost = len(before.records) - len(after.records)
            images = "1 image" if lost == 1 else f"{lost} images"
            print(f"dataset {after.id!r}: {images} could not be decoded, left out: see left_out.json")
    # Already here: where no image of a dataset is left, the run ends before it opens its output.
    left_out = job.config.run.output_dir / "left_out.json"
    job.processes.first_does(lambda: write_left_out(left_out, {dataset.id: dataset.left_out for dataset in kept}))
    return kept, [images for _, images in cached], [controls for _, controls in controlled]


def _cache_controls(job: Job, dataset: Dataset, backend: ImageBackend) -> tuple[Dataset, CachedPixels | None]:
    conditioning = job.backends.conditioning_of(backend)
    if conditioning is None:
        return dataset, None
    return preparation.cache_controls(dataset, backend, conditioning, job.processes)


def _cache_latents(
    job: Job, pairs: Iterable[tuple[Dataset, ImageBackend]], model: Path, device: torch.device
) -> list[tuple[Dataset, CachedMoments]]:
    batch_size = job.config.data.vae_batch_size
    vae = preparation.VAE(job.spec.space, model, device, job.config.model.variant)
    try:
        return [preparation.cache_latents(*pair, vae, batch_size, job.processes) for pair in pairs]
    except torch.OutOfMemoryError as error:
        words = f"found {batch_size}, at which the VAE does not fit on the GPU ({error}): type 1, or a lower RESOLUTION"
        raise ConfigError([f"{ROWS['vae_batch_size'].label}: {words}"]) from error
    finally:
        vae.close()


def _collator(
    job: Job,
    texts: TextCaches,
    images: Sequence[CachedPixels | CachedMoments],
    controls: Sequence[CachedPixels | None],
    pin_memory: bool,
) -> Collator:
    sources = {
        backend.id: preparation.source_of(backend, own, texts, control)
        for backend, own, control in zip(job.backends.images, images, controls)
    }
    return Collator(sources, texts.prepared, pin_memory=pin_memory)


def _resume(run: Run, job: Job, checkpoint: Path, ending: Ending) -> None:
    with checkpoints.refused_if_other(checkpoint):
        job.adapter.load_weights(run.parts.denoiser, checkpoint)
        run.restore(checkpoints.load_state(checkpoint)["run"])
    if run.step == job.since.step:  # its batches were cut anew here
        run.position = Position(job.since.epoch, job.since.batch)
    job.processes.first_does(lambda: _set_aside_later(job.config.run.output_dir, checkpoint))
    if run.finished:
        raised = " and ".join(f"{ROWS[name].exports[0]} (--{name})" for name in ending.options)
        print(f"{checkpoint.name} is the last of its {ending.steps:,} steps: to train on, raise {raised}.")
    else:
        print(f"Resumed from {checkpoint.name}, to go on to step {run.total_steps:,}.")


def _set_aside_later(output: Path, checkpoint: Path) -> None:
    for abandoned in checkpoints.set_aside_later(output, checkpoint):
        print(f"Going back to {checkpoint.name}: a later checkpoint was moved to {shown(abandoned)}.")


def _train_and_export(
    run: Run,
    job: Job,
    model: Path,
    validation: Validation | None,
    batches: Iterator[tuple[Position, Batch]],
    datasets: Sequence[Dataset],
    data: Mapping[str, str],
) -> int:
    output, options, processes = job.config.run.output_dir, job.config, job.processes
    uploads = Uploads(Hub(job.hub, options.run.hub_private), output) if job.hub else None

    def save(run: Run) -> None:
        require_finite(run)
        # What broke a streak of skipped steps may be in the weights already: then no older checkpoint goes.
        keep = 0 if run.skipped_in_a_row else options.run.checkpoints_total_limit
        made = {"options": job.options["options"], "processes": processes.count, "data": data}
        learned_on = {"base": job.base, "prediction": job.adapter.origin.prediction_type}
        state = {**made, **learned_on, "since": job.since.state(), "run": run.state()}
        processes.first_does(lambda: checkpoints.save(output, run.step, job.adapter, run.parts.denoiser, state, keep))

    def answer(run: Run) -> None:
        run.requests.look(output)
        if processes.highest(run.requests.save):
            run.requests.save = False
            save(run)
            if processes.is_first:
                tqdm.write(f"Saved at step {run.step}, as SIGUSR1 asked.", file=sys.stderr)

    def save_and_upload(run: Run) -> None:
        save(run)
        if uploads and options.run.push_checkpoints_to_hub:
            uploads.add(output / f"checkpoint-{run.step}")

    def validate(run: Run) -> None:
        processes.first_does(lambda: validation and validation(run))

    often = Every(options.validation.validation_steps, validate)
    with run.requests.deferred():
        # The baseline; and what is missing where a run ended between a checkpoint and the pictures of its step.
        lacking = validation is not None and not validation.is_done(run.step)
        if run.step == 0 or (often.is_due(run) and processes.highest(lacking)):
            validate(run)
        run.requests.look(output)
        try:
            loop.train(run, batches, [answer, Every(options.run.checkpointing_steps, save_and_upload), often])
        finally:
            loop.close_curves(run)  # however it ends: an open tracker loses what it has not written yet
        if run.finished:
            processes.first_does(lambda: finish(run, job, model, validation, datasets, uploads))
            return 0
        save(run)
    if processes.is_first:
        print(f"\nSaved at step {run.step}. To go on:\n  {resume_command(output)}", file=sys.stderr)
    return 128 + run.requests.stop
