"""The end of a training: its result is exported, described, uploaded if that was asked for, and told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from helpers.config.paths import shown
from helpers.data.dataset import Dataset
from helpers.files import write_whole
from helpers.models import kohya
from helpers.models.bitfit import BIASES_FILE
from helpers.models.facts import variance_type_of
from helpers.models.full import Full
from helpers.planning import Job
from helpers.publishing import card
from helpers.publishing.hub import Uploads
from helpers.training import run_json
from helpers.training.loop import Run
from helpers.validation.render import Validation


def finish(
    run: Run, job: Job, model: Path, validation: Validation | None, datasets: Sequence[Dataset], uploads: Uploads | None
) -> None:
    """Export, upload if there is a way, and tell where everything is."""
    output = job.config.run.output_dir
    lines, made = _exported(run, job, model)
    comparison = validation.before_and_after() if validation else None
    if comparison:
        lines.append(f"  {shown(comparison)}    before and after")
    lines += _described(job, datasets, run.step, validation)
    if uploads and _uploaded(run, job, uploads, made):
        lines.append(f"  https://huggingface.co/{job.hub}    the same on the hub" + _for_whom(job))
    if job.config.run.report_to == "tensorboard":
        lines.append(f"  {shown(output / 'logs')}    curves: tensorboard --logdir {shown(output / 'logs')}")
    print("\n".join([f"\nFinished after {run.step:,} steps.", *lines]))


def _exported(run: Run, job: Job, model: Path) -> tuple[list[str], list[str]]:
    """Write the result; returns what to tell of it, and its files as patterns in `card.folder_of`.

    Results of earlier trainings may lie beside it.
    """
    output, own_card = job.config.run.output_dir, card.folder_of(job) / card.README
    kept = own_card.read_bytes() if own_card.is_file() and not card.is_ours(own_card) else None
    with run.averaged_weights():
        result = job.adapter.export(run.parts.denoiser, model, output)
    if kept is not None:  # a pipeline's folder was made anew
        write_whole(own_card, kept)
    run_json.write(output, job.options, run.step)
    lines = [f"  {shown(result)}    the result, for diffusers" + (", of averaged weights" if run.ema else "")]
    made = ["*" if isinstance(job.adapter, Full) else f"{result.name}/*" if result.is_dir() else result.name]
    if job.config.run.export == "kohya":
        exported = kohya.export(result, output / kohya.KOHYA_FILE)
        lines.append(f"  {shown(exported)}    the same, {kohya.readers(exported)}")
        made.append(kohya.KOHYA_FILE)
    if job.config.training.use_bitfit:
        made = [BIASES_FILE]
        lines.append(f"  {shown(output / BIASES_FILE)}    its biases alone, for pipeline.unet.load_state_dict")
    variance, base_variance = job.adapter.origin.variance_type, variance_type_of(model)
    if variance != base_variance and (job.config.training_kind == "lora" or job.config.training.use_bitfit):
        needed = f'variance_type="{variance}", not the base\'s {base_variance}'
        lines.append(f"    sample it with a scheduler of {needed}")
    return lines, made


def _described(job: Job, datasets: Sequence[Dataset], step: int, validation: Validation | None) -> list[str]:
    try:
        cards = card.write(job, datasets, step, list(validation.pictures.titles) if validation else [])
    except OSError as error:  # such as a full disk: the result is there
        tqdm.write(f"The model card cannot be written: {error}")
        return []
    if not cards:
        return [f"  {shown(card.folder_of(job) / card.README)}    your own model card, which stays"]
    return [f"  {shown(cards[0])}    its model card, with code to use it"]


def _uploaded(run: Run, job: Job, uploads: Uploads, made: Sequence[str]) -> bool:
    def stopped() -> bool:
        run.requests.look(job.config.run.output_dir)
        return run.requests.stop is not None

    # Those of eval images show the datasets' own.
    samples = [] if job.config.shows_eval_images else [f"{card.SAMPLES}/*"]
    return uploads.finish(card.folder_of(job), (*made, card.README, *samples), run.step, stopped)


def _for_whom(job: Job) -> str:
    return ", for your account alone" if job.config.run.hub_private else ", for everybody to see"
