"""What a run is asked to do, and all that is settled about it before any weights load."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from helpers.config.backends import Backends
from helpers.config.checks import schedule_problems, smallest_edge
from helpers.config.load import Resolved, as_json, read_prompt_library
from helpers.config.options import ROWS, Config
from helpers.config.problems import ConfigError
from helpers.data import preparation
from helpers.data.dataset import Dataset
from helpers.data.sampler import Sampler
from helpers.data.scan import DatasetError
from helpers.models import loading, published, single_file
from helpers.models.adapters import Adapter
from helpers.models.facts import origin_of
from helpers.models.families import SPECS
from helpers.models.fingerprints import fingerprint_unet
from helpers.models.single_file import Conversion
from helpers.models.spec import Spec
from helpers.processes import Processes
from helpers.sizes import Size
from helpers.training import assembly, checkpoints, memory_report, space
from helpers.training.assembly import Ending, Since
from helpers.training.utilisation import Utilisation, utilisation_of
from helpers.validation.memory import sampling_bytes
from helpers.validation.prompts import named_prompts


@dataclass(frozen=True)
class Job:
    """What a run is asked to do, checked as far as that goes before any weights load."""

    config: Config
    options: Mapping[str, Any]  # as run.json holds them
    backends: Backends
    spec: Spec
    adapter: Adapter
    prompts: Mapping[str, str]
    processes: Processes
    base: str = ""  # a fingerprint of the UNet's files, once they are at hand
    since: Since = Since()
    hub: str | None = None  # the repository to upload the result to, as owner/name

    @property
    def batch_size(self) -> int:
        """Images of a batch, of all processes."""
        return self.config.training.train_batch_size * self.processes.count

    def sampler(self, datasets: Sequence[Dataset]) -> Sampler:
        dealt = {self.since.epoch: self.since.dealt}
        seed, dropout = self.config.training.seed, self.config.data.caption_dropout_probability
        return Sampler(datasets, self.batch_size, seed, dropout, dealt)

    def ending(self, sampler: Sampler) -> Ending:
        """When the run ends, which is known once its images are.

        Raises:
            ConfigError: the learning rate's schedule needs more steps.
        """
        ending = assembly.ending(self.config.training, sampler.batches_in_epoch, self.since)
        problems = [str(problem) for problem in schedule_problems(self.config, *ending)]
        if problems:
            raise ConfigError(problems)
        return ending


@dataclass(frozen=True)
class Plan:
    """What will be trained on, and from where on.

    Attributes:
        configs: the folder with the model's small files; None where a dry run has no such folder.
        checkpoint: the one to go on from.
        prepared: every caption and prompt with the text that is encoded.
        data: the datasets' digests.
    """

    job: Job
    configs: Path | None
    checkpoint: Path | None
    datasets: Sequence[Dataset]
    prepared: Mapping[str, str]
    data: Mapping[str, str]


def job_of(resolved: Resolved, backends: Backends, processes: Processes) -> Job:
    config = assembly.with_usable_attention(resolved.config)
    spec, adapter = SPECS[config.family.key], assembly.adapter_of(config)
    spec = spec.with_controlnet if config.training.controlnet else spec
    return Job(config, as_json(resolved), backends, spec, adapter, prompts(config), processes)


def plan(job: Job) -> Plan:
    """Check the weights by their small files, plan the data, choose the checkpoint, and print what all that comes to.

    Raises:
        ConfigError, DatasetError, WeightsError, CheckpointError: something of it cannot be used.
        DiskFull: not even one checkpoint has room.
    """
    with job.processes.first_before_others():
        configs = check_model(job)
    checkpoint = choose_checkpoint(job)
    if checkpoint:
        with checkpoints.refused_if_other(checkpoint):
            saved = checkpoints.load_plain(checkpoint)
            job = replace(job, since=assembly.since(saved, job.config.training, job.processes.count))
            former = int(saved["processes"])
    with job.processes.first_before_others():
        datasets, prepared = plan_data(job)
    data = {dataset.id: dataset.digest() for dataset in datasets}
    require_same_data(job.processes.gather(data))
    if checkpoint:
        tell_changes(job, checkpoint, former, data)
    architecture = configs / "unet" / "config.json" if configs else published.architecture(small_files_of(job))
    tell_memory(job, architecture, datasets)
    tell_space(job, architecture, configs, datasets, prepared)
    return Plan(job, configs, checkpoint, datasets, prepared, data)


def require_same_data(found: Sequence[Mapping[str, str]]) -> None:
    """See that all processes found the same; `found` has the datasets' digests, as each of them has.

    Raises:
        DatasetError: they would train batches that do not belong together.
    """
    changing = [repr(name) for name, digest in found[0].items() if any(other[name] != digest for other in found)]
    if changing:
        raise DatasetError(
            f"dataset {', '.join(changing)}: its files changed while they were looked at, so that the processes found"
            " different ones. Start again once they stay as they are."
        )


def choose_checkpoint(job: Job) -> Path | None:
    """The checkpoint to go on from, verified once for all processes."""
    output, wanted = job.config.run.output_dir, job.config.run.resume_from_checkpoint

    def name() -> str | None:
        chosen = checkpoints.choose(output, wanted)
        return chosen.name if chosen else None

    chosen = job.processes.from_first(name)
    return output / chosen if chosen else None


def require_writable(job: Job) -> None:
    """See that results and caches can be written, without making a folder yet."""
    folders = {"--output_dir (export OUTPUT_DIR)": job.config.run.output_dir}
    for entry in (*job.backends.images, *job.backends.conditioning, *job.backends.text_embeds):
        folders[f"--cache_dir (export CACHE_DIR), or the cache folder of entry {entry.id!r}"] = entry.cache_dir
    problems = []
    for option, folder in folders.items():
        if folder == job.config.run.output_dir and "cache" in option:
            problems.append(f"{option}: found {folder}, which is OUTPUT_DIR (--output_dir) too: name another folder")
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            problems.append(f"{option}: {folder} cannot be written to ({error.strerror}): name another folder")
    if problems:
        raise ConfigError(problems)


def check_model(job: Job) -> Path | None:
    """See that the weights are of the right family, by their small files: before images are read, which takes long.

    Returns:
        the folder with these files; None in a dry run of a model on the hub, which downloads nothing, and where the
        small files of a single file would come from there.
    """
    options = job.config.model
    conversion = conversion_of(job)
    for line in conversion.told() if conversion and job.processes.is_first else ():
        print(line)
    name = small_files_of(job) if job.config.run.dry_run else source_of(job)
    is_local = Path(name).is_dir()
    if job.config.run.dry_run and not is_local:
        return None
    configs = loading.fetch_configs(name, options.revision, job.spec)
    loading.check(job.config.family, job.spec, configs, job.config.loss)
    require_known_level(job, configs)
    if is_local and (conversion is None or conversion.is_made):
        loading.check_weight_files(configs, options.variant, job.spec)
    tell_size(job, configs)
    return configs


def require_known_level(job: Job, configs: Path) -> None:
    """See that eval images are upscaled with a noise level that this model's pipeline takes.

    Raises:
        ConfigError: it takes fewer.
    """
    levels, level = loading.noise_levels(job.spec, configs), job.config.validation.validation_noise_level
    if levels and level > levels:
        words = f"found {level}, but the model in {configs} has {levels} noise levels: type {levels} or less"
        raise ConfigError([f"{ROWS['validation_noise_level'].label}: {words}"])


def tell_size(job: Job, configs: Path) -> None:
    """Say so where a model is trained at another size than it was made for: a single file does not tell its own."""
    data, edge = job.config.data, loading.trained_edge(job.spec, configs)
    if edge and data.resolution_type == "pixel" and data.resolution != edge and job.processes.is_first:
        print(
            f"{ROWS['resolution'].label}: the weights were trained at {edge} pixels, and are trained at"
            f" {data.resolution:g} here."
        )


def fetch(job: Job) -> Path:
    """The folder with the model's weights, which one process downloads, or makes of a single file.

    Raises:
        WeightsError: they cannot be had, or are not whole.
        DiskFull: there is no room for them.
    """
    options = job.config.model
    with job.processes.first_before_others():
        model = loading.fetch_weights(source_of(job), options.revision, options.variant, job.spec)
    loading.check_weight_files(model, options.variant, job.spec)
    return model


def on_weights(job: Job, model: Path) -> Job:
    """The job with what is known of its weights once they are at hand, in the folder `model`."""
    config = job.config
    base = unet = fingerprint_unet(model, config.model.variant)
    if config.lora.train_text_encoder:  # else what it gives is cached by a fingerprint of its own
        base += job.spec.text.fingerprint(model, config.model.variant)["text_encoder"]
    name, loss = config.model.pretrained_model_name_or_path, assembly.loss_settings(config.loss)
    origin = origin_of(name, config.family.key, job.spec, model, loss, unet)
    return replace(job, adapter=replace(job.adapter, origin=origin), base=base)


def conversion_of(job: Job) -> Conversion | None:
    """What is made of MODEL_NAME where that is a single file.

    Raises:
        WeightsError: it is a file that cannot be used.
    """
    options = job.config.model
    name = options.pretrained_model_name_or_path
    if not single_file.is_single_file(name):
        return None
    predicted = job.config.loss.prediction_type
    return single_file.plan(Path(name), job.config.data.cache_dir, options.single_file_config, predicted)


def source_of(job: Job) -> str:
    """The hub id, or the folder, that weights are read from; of a single file a folder is made first, once.

    Each process comes to it after the first one.

    Raises:
        WeightsError: it is a file that cannot be used.
        DiskFull: the folder has no room.
    """
    conversion = conversion_of(job)
    return str(single_file.make(conversion)) if conversion else job.config.model.pretrained_model_name_or_path


def small_files_of(job: Job) -> str:
    """The hub id, or the folder, with the model's small files; nothing is made of a single file.

    Raises:
        WeightsError: it is a file that cannot be used.
    """
    conversion = conversion_of(job)
    if conversion is None:
        return job.config.model.pretrained_model_name_or_path
    return str(conversion.folder) if conversion.is_made else conversion.configs


def prompts(config: Config) -> dict[str, str]:
    """What is drawn at each validation, by name; nothing where eval images are shown instead."""
    if config.shows_eval_images:
        return {}
    library = config.validation.validation_prompt_library
    return named_prompts(config.validation.validation_prompt, read_prompt_library(library) if library else {})


def plan_data(job: Job) -> tuple[list[Dataset], dict[str, str]]:
    """Scan and plan each dataset, and print what will be trained on; also every caption with its prepared text."""
    family, datasets = job.config.family, []
    for backend in job.backends.images:
        dataset, notes = preparation.scan_and_plan(
            backend,
            family.alignment,
            enlarge=not family.upscales,
            smallest=smallest_edge(job.config),
            crops_once=job.spec.space.crops_once,
            conditioning=job.backends.conditioning_of(backend),
        )
        datasets.append(dataset)
        for note in notes:
            print(note)
    captions = [caption for dataset in datasets for caption in dataset.captions()]
    prompts = [job.config.validation.validation_negative_prompt, *job.prompts.values()]
    prepared = preparation.prepare_captions(job.spec.text, captions + prompts)
    for note in [note for dataset in datasets for note in preparation.caption_notes(dataset, prepared)]:
        print(note)
    sampler = job.sampler(datasets)
    for dataset, batches in zip(datasets, sampler.batches_by_dataset(0).values()):
        print(dataset.report(batches).describe())
    steps = job.ending(sampler).steps
    batch_size = job.batch_size * job.config.training.gradient_accumulation_steps
    print(f"{sampler.batches_in_epoch(0):,} batches an epoch; {steps:,} steps of up to {batch_size:,} images in all")
    return datasets, prepared


def tell_memory(job: Job, architecture: Path | None, datasets: Sequence[Dataset]) -> None:
    """Print what training will need; a real run only where there is a GPU to hold that against."""
    free = memory_report.free_on_gpu()
    if architecture is None:
        print("The memory needed is not known: the model's architecture is not at hand, and a dry run fetches nothing.")
    elif free is not None or job.config.run.dry_run:
        largest = largest_target(datasets)
        validating = _validating(job, architecture, largest)
        processes = job.processes.count
        print(memory_report.report(job.config, job.spec, architecture, largest, free, validating, processes))


def largest_target(datasets: Sequence[Dataset]) -> Size:
    """The size of the most pixels that images are cropped to."""
    targets = {plan.target for dataset in datasets for plans, _ in dataset.plans.counted() for plan in plans}
    return max(targets, key=lambda size: size.width * size.height)


def utilisation(job: Job, architecture: Path, datasets: Sequence[Dataset], device: torch.device) -> Utilisation | None:
    """How much of the GPU's arithmetic the run uses, to be told while it trains."""
    largest = largest_target(datasets)
    return utilisation_of(memory_report.setup_of(job.config, job.spec, architecture, largest), largest, device)


def _validating(job: Job, architecture: Path, largest: Size) -> int | None:
    """Bytes that a validation takes; None where nothing is drawn."""
    options = job.config.validation
    if not (options.num_eval_images if job.config.shows_eval_images else job.prompts):
        return None
    setup = memory_report.setup_of(job.config, job.spec, architecture, largest)
    return sampling_bytes(job.spec, setup, options.validation_resolution, options.validation_guidance > 1)


def tell_space(
    job: Job, architecture: Path | None, base: Path | None, datasets: Sequence[Dataset], prepared: Mapping[str, str]
) -> None:
    """Print what the run will write: all of it in a dry run, else what there is no room for.

    Raises:
        DiskFull: not even one checkpoint has room.
    """
    storage = job.config.data.text_embeds_storage
    embed_size = 0 if job.config.lora.train_text_encoder else space.embed_size(job.spec.text, architecture, storage)
    needs = space.cache_needs(job.backends, datasets, prepared, job.spec.space, embed_size, storage)
    if architecture:
        saved = space.saved_sizes(job.config, job.spec, architecture)
        space.require_one_checkpoint(job.config.run.output_dir, saved)
        needs += space.output_needs(job.config, saved, base)
    for line in space.describe(needs) if job.config.run.dry_run else space.shortages(needs):
        print(line)
    if architecture is None:
        print("What checkpoints take is not known: the model's architecture is not at hand.")


def tell_changes(job: Job, checkpoint: Path, processes: int, data: Mapping[str, str]) -> None:
    """Print what changed since a checkpoint of so many processes, or refuse it; `data` has the datasets' digests."""
    changed = checkpoints.changes(checkpoint, job.options["options"], assembly.IDENTITY, data)
    for name, (old, new) in changed.items():
        if name not in assembly.UNTOLD:
            print(f"Changed since {checkpoint.name}: {name}: {old} -> {new}")
    if processes != job.processes.count:
        print(f"Changed since {checkpoint.name}: processes: {processes} -> {job.processes.count}")
    if job.since.dealt and job.since.dealt[-1].batch_size != job.batch_size:
        print(f"Epoch {job.since.epoch + 1} goes on with the images that it has not seen, in batches of the new size.")


def quieten_libraries() -> None:
    """Keep the loading bars of small files off the screen: the bars that matter are our own."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
