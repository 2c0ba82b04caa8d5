"""From checked options to a trained model: the one module that knows all packages."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from helpers.caching.embeds import EmbedCache, NonFiniteEmbedding
from helpers.caching.pixels import PixelCache
from helpers.config.backends import Backends
from helpers.config.checks import schedule_problems, smallest_edge
from helpers.config.load import Resolved, as_json, read_prompt_library
from helpers.config.options import ROWS, Config
from helpers.config.problems import ConfigError
from helpers.data import preparation
from helpers.data.audit import audit_captions, audit_images, text_side
from helpers.data.audit_report import Audit, as_json_text, as_table
from helpers.data.collate import Batch, Collator
from helpers.data.dataset import Dataset
from helpers.data.preparation import NULL_CAPTION, TextCaches
from helpers.data.sampler import Position, Sampler
from helpers.data.scan import DatasetError, write_left_out
from helpers.files import free_bytes, write_whole
from helpers.models import loading, published
from helpers.models.adapters import Adapter
from helpers.models.bitfit import BIASES_FILE
from helpers.models.facts import origin_of, variance_type_of
from helpers.models.families import SPECS
from helpers.models.loading import WeightsError
from helpers.models.spec import Spec
from helpers.training import assembly, checkpoints, loop, memory_report, space
from helpers.training.assembly import Ending, Since
from helpers.training.checkpoints import CheckpointError
from helpers.training.loop import Every, NonFiniteLoss, Run, require_finite
from helpers.training.requests import Requests, resume_command
from helpers.validation.eval_images import EvalImage, Upscales, choose, file_name
from helpers.validation.prompts import PromptPictures, named_prompts, with_embeds
from helpers.validation.render import Sampling, Validation

REFUSALS = (ConfigError, DatasetError, WeightsError, CheckpointError, NonFiniteEmbedding)
"""What the user's input can be wrong in: each says in words what to change."""

REPORTED_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")


@dataclass(frozen=True)
class Job:
    """What a run is asked to do, checked as far as that goes before any weights load."""

    config: Config
    options: Mapping[str, Any]  # as run.json holds them
    backends: Backends
    spec: Spec
    adapter: Adapter
    prompts: Mapping[str, str]
    since: Since = Since()


def train(resolved: Resolved, backends: Backends, requests: Requests) -> int:
    """Plan the data, check the weights, fill the caches, train, export. Returns the exit code.

    Raises:
        one of `REFUSALS`: before the UNet's weights load.
        Interrupted: before there was anything to save.
        NonFiniteLoss: training broke down; the checkpoints so far are intact.
    """
    _quieten_libraries()
    config = assembly.with_usable_attention(resolved.config)
    spec = SPECS[config.family.key]
    job = Job(config, as_json(resolved), backends, spec, assembly.adapter_of(config), _prompts(config))
    _require_writable(job)
    configs = _check_model(job)
    checkpoint = checkpoints.choose(config.run.output_dir, config.run.resume_from_checkpoint)
    if checkpoint:
        with checkpoints.refused_if_other(checkpoint):
            job = replace(job, since=assembly.since(checkpoints.load_plain(checkpoint), config.training))
    datasets, prepared = _plan_data(job)
    data = {dataset.id: dataset.digest() for dataset in datasets}
    if checkpoint:
        _tell_changes(job, checkpoint, data)
    name, revision, variant = config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant
    architecture = configs / "unet" / "config.json" if configs else published.architecture(name)
    _tell_memory(job, architecture, datasets)
    _tell_space(job, architecture, configs, datasets, prepared)
    if config.run.dry_run:
        looked_at = "The options, the data and the weights fit together." if configs else (
            f"The weights of {name} on the hub were not looked at."
        )
        print(f"Dry run: nothing was downloaded or trained. {looked_at}")
        return 0
    datasets, pixels = _cache_pixels(job, datasets)
    model = loading.fetch_weights(name, revision, variant, spec)
    loading.check_weight_files(model, variant)
    origin = origin_of(name, config.family.key, spec, model, config.loss.train_variance)
    job = replace(job, adapter=replace(job.adapter, origin=origin))
    sampler = _sampler(job, datasets)
    ending = _ending(job, sampler)
    _open_output(job)
    accelerator = assembly.create_accelerator(config)
    texts = _cache_texts(job, datasets, prepared, model, accelerator)
    run = assembly.create_run(config, spec, model, job.adapter, accelerator, ending.steps)
    run.requests = requests
    if checkpoint:
        _resume(run, job, checkpoint, ending)
    assembly.start_tracker(accelerator, config, job.options["options"])
    validation = _validation(job, texts, model, datasets)
    collator = _collator(job, texts, pixels, pin_memory=accelerator.device.type == "cuda")
    batches = collator.stream(sampler.batches(run.position))
    return _train_and_export(run, job, model, validation, batches, data)


def check(resolved: Resolved, backends: Backends) -> int:
    """Print what is wrong with the data, and what a run with it would take; no weights are read.

    Returns:
        how many things were found.

    Raises:
        ConfigError: a folder for caches, where the index of the images goes, or for results cannot be written to.
    """
    _quieten_libraries()
    config, spec = resolved.config, SPECS[resolved.config.family.key]
    job = Job(config, as_json(resolved), backends, spec, assembly.adapter_of(config), _prompts(config))
    _require_writable(job)
    family, smallest = config.family, smallest_edge(config)
    audited = [audit_images(entry, family.alignment, not family.upscales, smallest) for entry in backends.images]
    captions = [caption for one in audited for caption in one.dataset.captions()]
    prepared = preparation.prepare_captions(spec.text, captions)
    text = text_side(spec.text, config.model.pretrained_model_name_or_path, config.model.revision)
    findings = [finding for one in audited for finding in one.findings]
    for one, entry in zip(audited, backends.images):
        findings += audit_captions(one, entry, prepared, text)
    usable = all(one.dataset.records for one in audited)
    sampler = _sampler(job, [one.dataset for one in audited]) if usable else None
    audit = Audit(
        datasets=tuple(audited),
        findings=tuple(findings),
        batches=sampler.batches_by_dataset(0) if sampler else {},
        steps=assembly.ending(config.training, sampler.batches_in_epoch).steps if sampler else None,
        batches_per_step=config.training.gradient_accumulation_steps,
        captions=len(set(captions)),
        embed_bytes=text.embed_bytes(prepared.values()),
        free_bytes=free_bytes(config.data.cache_dir),
        not_looked_at=text.not_looked_at,
    )
    print(as_json_text(audit) if config.run.check == "json" else as_table(audit))
    return len(audit.findings)


def _require_writable(job: Job) -> None:
    """See that results and caches can be written, without making a folder yet."""
    folders = {"--output_dir (export OUTPUT_DIR)": job.config.run.output_dir}
    for entry in (*job.backends.images, *job.backends.text_embeds):
        folders[f"--cache_dir (export CACHE_DIR), or the cache folder of entry {entry.id!r}"] = entry.cache_dir
    problems = []
    for option, folder in folders.items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            problems.append(f"{option}: {folder} cannot be written to ({error.strerror}): name another folder")
    if problems:
        raise ConfigError(problems)


def _check_model(job: Job) -> Path | None:
    """See that the weights are of the right family, by their small files: before images are read, which takes long.

    Returns:
        the folder with these files; None in a dry run of a model on the hub, which downloads nothing.
    """
    options = job.config.model
    name, is_local = options.pretrained_model_name_or_path, Path(options.pretrained_model_name_or_path).is_dir()
    if job.config.run.dry_run and not is_local:
        return None
    configs = loading.fetch_configs(name, options.revision, job.spec)
    loading.check(job.config.family, job.spec, configs)
    if is_local:
        loading.check_weight_files(configs, options.variant)
    return configs


def _quieten_libraries() -> None:
    """Keep the loading bars of small files off the screen: the bars that matter are our own."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _prompts(config: Config) -> dict[str, str]:
    """What is drawn at each validation, by name; nothing where images are upscaled instead."""
    if config.family.upscales:
        return {}
    library = config.validation.validation_prompt_library
    return named_prompts(config.validation.validation_prompt, read_prompt_library(library) if library else {})


def _plan_data(job: Job) -> tuple[list[Dataset], dict[str, str]]:
    """Scan and plan each dataset, and print what will be trained on; also every caption with its prepared text."""
    family, datasets = job.config.family, []
    for backend in job.backends.images:
        dataset, notes = preparation.scan_and_plan(
            backend, family.alignment, enlarge=not family.upscales, smallest=smallest_edge(job.config)
        )
        datasets.append(dataset)
        for note in notes:
            print(note)
    captions = [caption for dataset in datasets for caption in dataset.captions()]
    prompts = [job.config.validation.validation_negative_prompt, *job.prompts.values()]
    prepared = preparation.prepare_captions(job.spec.text, captions + prompts)
    for note in [note for dataset in datasets for note in preparation.caption_notes(dataset, prepared)]:
        print(note)
    sampler = _sampler(job, datasets)
    for dataset, batches in zip(datasets, sampler.batches_by_dataset(0).values()):
        print(dataset.report(batches).describe())
    steps = _ending(job, sampler).steps
    batch_size = job.config.training.train_batch_size * job.config.training.gradient_accumulation_steps
    print(f"{sampler.batches_in_epoch(0):,} batches an epoch; {steps:,} steps of up to {batch_size:,} images in all")
    return datasets, prepared


def _tell_memory(job: Job, architecture: Path | None, datasets: Sequence[Dataset]) -> None:
    """Print what training will need; a real run only where there is a GPU to hold that against."""
    free = memory_report.free_on_gpu()
    if architecture is None:
        print("The memory needed is not known: the model's architecture is on the hub, where a dry run does not look.")
    elif free is not None or job.config.run.dry_run:
        targets = {plan.target for dataset in datasets for plans in dataset.plans for plan in plans}
        largest = max(targets, key=lambda size: size.width * size.height)
        print(memory_report.report(job.config, job.spec, architecture, largest, free))


def _tell_space(
    job: Job, architecture: Path | None, base: Path | None, datasets: Sequence[Dataset], prepared: Mapping[str, str]
) -> None:
    """Print what the run will write: all of it in a dry run, else what there is no room for.

    Raises:
        DiskFull: not even one checkpoint has room.
    """
    needs = space.cache_needs(job.backends, datasets, prepared, space.embed_size(job.spec.text, architecture))
    if architecture:
        needs += space.output_needs(job.config, job.spec, architecture, base)
    for line in space.describe(needs) if job.config.run.dry_run else space.shortages(needs):
        print(line)
    if architecture is None:
        print("What checkpoints take is not known: the model's architecture is on the hub.")


def _sampler(job: Job, datasets: Sequence[Dataset]) -> Sampler:
    training, dropout = job.config.training, job.config.data.caption_dropout_probability
    dealt = {job.since.epoch: job.since.dealt}
    return Sampler(datasets, training.train_batch_size, training.seed, dropout, dealt)


def _ending(job: Job, sampler: Sampler) -> Ending:
    """When the run ends, which is known once its images are.

    Raises:
        ConfigError: the learning rate's schedule needs more steps.
    """
    ending = assembly.ending(job.config.training, sampler.batches_in_epoch, job.since)
    problems = [str(problem) for problem in schedule_problems(job.config, *ending)]
    if problems:
        raise ConfigError(problems)
    return ending


def _tell_changes(job: Job, checkpoint: Path, data: Mapping[str, str]) -> None:
    """Print what changed since a checkpoint, or refuse it; `data` has the datasets' digests."""
    changed = checkpoints.changes(checkpoint, job.options["options"], assembly.IDENTITY, data)
    for name, (old, new) in changed.items():
        if name not in assembly.UNTOLD:
            print(f"Changed since {checkpoint.name}: {name}: {old} -> {new}")
    if "train_batch_size" in changed and job.since.dealt:
        print(f"Epoch {job.since.epoch + 1} goes on with the images that it has not seen, in batches of the new size.")


def _open_output(job: Job) -> None:
    """Make the output folder and write down what this run is."""
    output = job.config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version()} | {name: version(name) for name in REPORTED_PACKAGES}
    write_whole(output / "run.json", (json.dumps({**job.options, "versions": versions}, indent=2) + "\n").encode())
    checkpoints.sweep(output)


def _cache_texts(
    job: Job, datasets: Sequence[Dataset], prepared: Mapping[str, str], model: Path, accelerator: Accelerator
) -> TextCaches:
    config = job.config
    texts = preparation.open_text_caches(job.spec.text, model, job.backends, prepared, config.model.variant)
    wanted = {cache_id: [NULL_CAPTION] for cache_id in texts.by_id}
    for backend, dataset in zip(job.backends.images, datasets):
        wanted[backend.text_embeds] += dataset.captions()
    wanted[texts.default_id] += [config.validation.validation_negative_prompt, *job.prompts.values()]
    device = accelerator.device if config.data.text_encoder_device == "auto" else torch.device("cpu")
    batch_size, variant = config.data.text_encoder_batch_size, config.model.variant
    try:
        preparation.cache_texts(job.spec.text, model, texts, wanted, batch_size, device, variant)
    except torch.OutOfMemoryError as error:
        words = f"the text encoder does not fit on the GPU beside what is there ({error}): type cpu"
        raise ConfigError([f"--text_encoder_device (export TEXT_ENCODER_DEVICE): {words}"]) from error
    return texts


def _cache_pixels(job: Job, datasets: Sequence[Dataset]) -> tuple[list[Dataset], list[PixelCache]]:
    """The datasets without what could not be decoded, and the cache of each; what is left out is written down."""
    cached = [preparation.cache_pixels(dataset, backend) for dataset, backend in zip(datasets, job.backends.images)]
    kept = [dataset for dataset, _ in cached]
    for before, after in zip(datasets, kept):
        if len(after.records) < len(before.records):
            lost = len(before.records) - len(after.records)
            images = "1 image" if lost == 1 else f"{lost} images"
            print(f"dataset {after.id!r}: {images} could not be decoded, left out: see left_out.json")
    # Already here: where no image of a dataset is left, the run ends before it opens its output.
    left_out = job.config.run.output_dir / "left_out.json"
    write_left_out(left_out, {dataset.id: dataset.left_out for dataset in kept})
    return kept, [pixels for _, pixels in cached]


def _collator(job: Job, texts: TextCaches, pixels: Sequence[PixelCache], pin_memory: bool) -> Collator:
    sources = {
        backend.id: preparation.source_of(backend, cache, texts) for backend, cache in zip(job.backends.images, pixels)
    }
    return Collator(sources, texts.prepared, pin_memory=pin_memory)


def _validation(job: Job, texts: TextCaches, model: Path, datasets: Sequence[Dataset]) -> Validation | None:
    """What to render; None where there is nothing to."""
    options = job.config.validation
    sampling = Sampling(
        base=model,
        sizes=options.validation_resolution,
        negative=_embed(texts, texts.default, options.validation_negative_prompt),
        inference_steps=options.validation_num_inference_steps,
        guidance=options.validation_guidance,
        seed=options.validation_seed,
        scheduler_changes={"variance_type": job.adapter.origin.variance_type},
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


def _resume(run: Run, job: Job, checkpoint: Path, ending: Ending) -> None:
    with checkpoints.refused_if_other(checkpoint):
        job.adapter.load_weights(run.parts.unet, checkpoint)
        run.restore(checkpoints.load_state(checkpoint)["run"])
    if run.step == job.since.step:  # its batches were cut anew here
        run.position = Position(job.since.epoch, job.since.batch)
    for abandoned in checkpoints.set_aside_later(job.config.run.output_dir, checkpoint):
        print(f"Going back to {checkpoint.name}: a later checkpoint was moved to {_shown(abandoned)}.")
    if run.finished:
        raised = " and ".join(f"{ROWS[name].exports[0]} (--{name})" for name in ending.options)
        print(f"{checkpoint.name} is the last of its {ending.steps:,} steps: to train on, raise {raised}.")
    else:
        print(f"Resumed from {checkpoint.name}, to go on to step {run.total_steps:,}.")


def _train_and_export(
    run: Run,
    job: Job,
    model: Path,
    validation: Validation | None,
    batches: Iterator[tuple[Position, Batch]],
    data: Mapping[str, str],
) -> int:
    output, options = job.config.run.output_dir, job.config

    def save(run: Run) -> None:
        require_finite(run)
        # What broke a streak of skipped steps may be in the weights already: then no older checkpoint goes.
        keep = 0 if run.skipped_in_a_row else options.run.checkpoints_total_limit
        state = {"options": job.options["options"], "since": job.since.state(), "data": data, "run": run.state()}
        checkpoints.save(output, run.step, job.adapter, run.parts.unet, state, keep)

    def answer(run: Run) -> None:
        run.requests.look(output)
        if run.requests.save:
            run.requests.save = False
            save(run)
            tqdm.write(f"Saved at step {run.step}, as SIGUSR1 asked.", file=sys.stderr)

    periodic = [answer, Every(options.run.checkpointing_steps, save)]
    with run.requests.deferred():
        if validation:
            often = Every(options.validation.validation_steps, validation)
            periodic.append(often)
            # The baseline; and what is missing where a run ended between a checkpoint and the pictures of its step.
            if run.step == 0 or (often.is_due(run) and not validation.is_done(run.step)):
                validation(run)
        run.requests.look(output)
        try:
            loop.train(run, batches, periodic)
        finally:
            with loop.curves(run):
                run.accelerator.end_training()  # however it ends: an open tracker loses what it has not written yet
        if run.finished:
            _finish(run, job, model, validation)
            return 0
        save(run)
    print(f"\nSaved at step {run.step}. To go on:\n  {resume_command(output)}", file=sys.stderr)
    return 128 + run.requests.stop


def _finish(run: Run, job: Job, model: Path, validation: Validation | None) -> None:
    """Export, and tell where everything is."""
    output = job.config.run.output_dir
    with run.averaged_weights():
        result = job.adapter.export(run.parts.unet, model, output)
    lines = [f"  {_shown(result)}    the result, for diffusers" + (", of averaged weights" if run.ema else "")]
    if job.config.training.use_bitfit:
        lines.append(f"  {_shown(output / BIASES_FILE)}    its biases alone, for pipeline.unet.load_state_dict")
    variance, base_variance = job.adapter.origin.variance_type, variance_type_of(model)
    if variance != base_variance and (job.config.training_kind == "lora" or job.config.training.use_bitfit):
        needed = f'variance_type="{variance}", not the base\'s {base_variance}'
        lines.append(f"    sample it with a scheduler of {needed}")
    comparison = validation.before_and_after() if validation else None
    if comparison:
        lines.append(f"  {_shown(comparison)}    before and after")
    if job.config.run.report_to == "tensorboard":
        lines.append(f"  {_shown(output / 'logs')}    curves: tensorboard --logdir {_shown(output / 'logs')}")
    print("\n".join([f"\nFinished after {run.step:,} steps.", *lines]))


def _shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
