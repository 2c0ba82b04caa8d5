"""The model card: `README.md` beside what was trained. It names no path of its user's, and no file of a dataset."""

from __future__ import annotations

import html
import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image

from helpers.config.options import ROWS
from helpers.config.paths import ROOT, portable
from helpers.data.dataset import Dataset
from helpers.files import write_whole
from helpers.images.recipes import NoRecipe, read_recipe, save_png
from helpers.models.facts import Origin
from helpers.models.full import Full
from helpers.models.licences import LICENCES, Licence
from helpers.models.single_file import is_single_file
from helpers.planning import Job
from helpers.publishing.snippets import FULL, Use, quoted, snippet
from helpers.sizes import Size
from helpers.validation.recipe import IMAGES
from helpers.validation.render import BEFORE_AND_AFTER

README = "README.md"
SAMPLES = "sample_images"
MARK = "<!-- FloydTuner's card: each training in this folder writes it anew. Without this line it is yours. -->"
MOST_SAMPLES = 8

KINDS: Mapping[str, str] = {
    "lora": "A LoRA", "dora": "A DoRA", "bitfit": "The biases (BitFit)", "controlnet": "A ControlNet",
    FULL: "All weights of the UNet",
}  # fmt: skip
TOLD = ("data", "training", "loss", "lora", "optimizer")
"""The groups of options that a card tells."""

ALWAYS_TOLD = (
    "resolution", "train_batch_size", "gradient_accumulation_steps", "mixed_precision", "pure_bf16", "seed",
    "optimizer", "learning_rate", "lr_scheduler",
)  # fmt: skip
"""Those that it tells also where they have their defaults."""

OF_A_LORA = ("lora_rank", "lora_alpha", "lora_targets")
PUBLIC = (
    "version", "kind", "model_type", "pipeline", "step", "prompt", "negative_prompt", "width", "height", "seed",
    "inference_steps", "guidance", "guidance_rescale", "scheduler", "scheduler_changes", "precision", "averaged",
    "versions",
)  # fmt: skip
"""What the recipe of a sample keeps: nothing of where anything lies."""


@dataclass(frozen=True)
class Sample:
    """A picture of the last validation.

    Attributes:
        file: its place beside the card.
        prompt: None where that is the caption of an image of a dataset.
    """

    file: str
    prompt: str | None


def write(job: Job, datasets: Sequence[Dataset], step: int, titles: Sequence[str]) -> list[Path]:
    """Write the card of a training that is finished, with sample images, beside its result; returns the cards.

    A full type has one in its pipeline's folder too, which may go elsewhere alone. A card that its user wrote stays.

    Args:
        job: on its weights.
        titles: the names of the pictures of a validation, without their suffixes.
    """
    home, cards = folder_of(job), []
    folders = [folder for folder in dict.fromkeys((home, job.config.run.output_dir)) if is_ours(folder / README)]
    samples = _copy_samples(job, home / SAMPLES, step, titles) if folders else []
    for folder in folders:
        place = home.relative_to(folder).as_posix()
        shown = [Sample((Path(place) / sample.file).as_posix(), sample.prompt) for sample in samples]
        write_whole(folder / README, text_of(job, datasets, step, folder, place, shown).encode("utf-8", "replace"))
        cards.append(folder / README)
    return cards


def folder_of(job: Job) -> Path:
    """Where what was trained lies, whole."""
    output = job.config.run.output_dir
    return output / "pipeline" if isinstance(job.adapter, Full) else output


def is_ours(card: Path) -> bool:
    """Whether a card may be written, for there is none, or one that was written here."""
    return not card.exists() or MARK in card.read_text("utf-8", "replace")


def _copy_samples(job: Job, folder: Path, step: int, titles: Sequence[str]) -> list[Sample]:
    """Copy pictures of the last validation, under names that tell nothing.

    Those that were made of images of the datasets stay where they are if the card is to be uploaded.
    """
    if (folder.parent / README).exists() and is_ours(folder.parent / README):
        shutil.rmtree(folder, ignore_errors=True)
    of_dataset = job.config.shows_eval_images
    if of_dataset and job.hub:
        return []
    validations = job.config.run.output_dir / IMAGES
    found = [path for title in titles if (path := validations / f"step_{step}" / f"{title}.png").is_file()]
    samples = []
    for number, path in enumerate(found[:MOST_SAMPLES], 1):
        recipe = _recipe(path)
        try:
            picture = Image.open(path).convert("RGB")
        except (OSError, SyntaxError):  # damaged: Pillow raises either
            continue
        folder.mkdir(parents=True, exist_ok=True)
        told = [key for key in PUBLIC if key in recipe and not (of_dataset and key == "prompt")]  # a caption is private
        save_png(picture, folder / f"{number}.png", {key: recipe[key] for key in told})
        samples.append(Sample(f"{SAMPLES}/{number}.png", None if of_dataset else recipe.get("prompt")))
    if samples and (validations / BEFORE_AND_AFTER).is_file():
        shutil.copy(validations / BEFORE_AND_AFTER, folder)
        samples.append(Sample(f"{SAMPLES}/{BEFORE_AND_AFTER}", None))
    return samples


def _recipe(path: Path) -> Mapping[str, Any]:
    try:
        return read_recipe(path)
    except NoRecipe:  # of a training of before
        return {}


def text_of(
    job: Job, datasets: Sequence[Dataset], step: int, folder: Path, place: str, samples: Sequence[Sample]
) -> str:
    origin, kind, licence = job.adapter.origin, _kind(job), LICENCES.get(job.adapter.origin.base_model)
    base = f"[{origin.base_model}](https://huggingface.co/{origin.base_model})" if _on_hub(job) else (
        f"the local model `{_code(origin.base_model)}`"
    )
    of = "of" if kind in (FULL, "bitfit") else "for"
    sections = [
        f"---\n{_front_matter(job, kind, licence, samples).to_yaml()}\n---",
        MARK,
        f"# {_text(_name(job))}",
        f"{KINDS[kind]}{_of_rank(job)} {of} {job.config.family.name}, trained for {step:,} steps on {base}.",
        *_pictures(samples),
        "## How to use it",
        _use(job, kind, folder, place),
        "## How it was trained",
        _options(job),
        "## What it was trained on",
        "\n".join(f"- {_dataset(dataset)}" for dataset in datasets),
        "## Licence",
        _licence(licence, origin),
    ]
    return "\n\n".join(sections) + "\n"


def _kind(job: Job) -> str:
    training = job.config.training
    if training.controlnet:
        return "controlnet"
    if training.use_bitfit:
        return "bitfit"
    if job.config.training_kind == "full":
        return FULL
    return "dora" if job.config.lora.use_dora else "lora"


def _name(job: Job) -> str:
    return job.hub.rpartition("/")[2] if job.hub else job.config.run.tracker_run_name or job.config.run.output_dir.name


def _on_hub(job: Job) -> bool:
    """Whether the base is a model of the hub."""
    return not Path(job.config.model.pretrained_model_name_or_path).is_absolute()


def _front_matter(job: Job, kind: str, licence: Licence | None, samples: Sequence[Sample]) -> ModelCardData:
    config = job.config
    known = {"license": licence.key, "license_name": licence.name, "license_link": licence.link} if licence else {}
    if licence and licence.key != "other":
        known = {"license": licence.key}
    widget = [{"text": one.prompt, "output": {"url": one.file}} for one in samples if one.prompt]
    base = {"base_model": job.adapter.origin.base_model} if _on_hub(job) else {}
    if base:
        base["base_model_relation"] = "finetune" if kind == FULL else "adapter"
    prompt = _instance_prompt(job)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image" if config.family.upscales else "text-to-image",
        tags=["floydtuner", config.family.key, kind],
        **known,
        **base,
        **({"instance_prompt": prompt} if prompt else {}),
        **({"widget": widget} if widget else {}),
    )


def _instance_prompt(job: Job) -> str | None:
    """The prompt of all datasets, where they have one."""
    prompts = {
        backend.instance_prompt if uses else None
        for backend in job.backends.images
        for uses in [backend.caption_strategy == "instanceprompt" or backend.only_instance_prompt
                     or backend.prepend_instance_prompt]
    }
    [prompt] = prompts if len(prompts) == 1 else [None]
    return " ".join(prompt.split()) if prompt else None


def _of_rank(job: Job) -> str:
    if _kind(job) not in ("lora", "dora"):
        return ""
    lora = job.config.lora
    alpha = lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha
    both = ", of the UNet and of the text encoder" if lora.train_text_encoder else ""
    return f" of rank {lora.lora_rank} and alpha {alpha:g}, on {lora.lora_targets}{both},"


def _pictures(samples: Sequence[Sample]) -> list[str]:
    if not samples:
        return []
    return ["\n".join(f"![{_text(one.prompt or 'a sample')}]({one.file})" for one in samples)]


def _use(job: Job, kind: str, folder: Path, place: str) -> str:
    """The code, what to edit in it, and the command that does the same."""
    name = job.config.model.pretrained_model_name_or_path
    base, note, edit = name, "", ""
    if not _on_hub(job):
        base, is_near = _near(Path(name), folder) if not job.hub else (Path(name).name, False)
        note = "" if is_near else "edit this: the path of that model"
        edit = f"\n\nThe line `base = {_code(quoted(base))}` names a local model by its name alone: put its path there."
        edit = "" if is_near or kind == FULL else edit
    validation, size = job.config.validation, job.config.validation.validation_resolution[0]
    negative, rescale = validation.validation_negative_prompt, validation.validation_guidance_rescale
    scale = job.spec.conditioning.scale if job.config.family.upscales else 1
    loading = {"revision": job.config.model.revision, "variant": job.config.model.variant}
    prompt = next(iter(job.prompts.values()), None) or _instance_prompt(job) or "a photo"
    use = Use(
        kind=kind,
        pipeline=job.adapter.origin.pipeline,
        base=base,
        base_note=note,
        from_file=is_single_file(name),
        place=job.hub or place,
        place_note=f"or {quoted(place)}, from the folder of this card" if job.hub else "from the folder of this card",
        on_hub=bool(job.hub),
        loading={key: value for key, value in loading.items() if value},
        scheduler_changes=job.adapter.origin.scheduler_changes,
        picture=Size(size.width // scale, size.height // scale) if job.config.shows_eval_images else None,
        sampling={
            "prompt": prompt,
            **({"negative_prompt": negative} if negative else {}),
            "width": size.width,
            "height": size.height,
            "num_inference_steps": validation.validation_num_inference_steps,
            "guidance_scale": validation.validation_guidance,
            **({"guidance_rescale": rescale} if rescale else {}),
            "noise_level": validation.validation_noise_level,
        },
    )
    return f"```py\n{snippet(use)}\n```{edit}{_command(job, kind, prompt)}"


def _near(model: Path, folder: Path) -> tuple[str, bool]:
    """The way from a folder to a model, if both lie in the project, else the model's name; and whether it is a way."""
    if model.is_relative_to(ROOT) and folder.is_relative_to(ROOT):
        return os.path.relpath(model, folder), True
    return model.name, False


def _command(job: Job, kind: str, prompt: str) -> str:
    """How FloydTuner itself samples it."""
    if kind == "controlnet":
        return ""
    stage = "stage1"
    if job.config.family.upscales:
        stage = "upscaler" if job.spec.space.component else "stage2"
    folder = _name(job) if job.hub else portable(folder_of(job))
    flag = f"--{stage}" if kind == FULL else f"--{stage}_lora"
    words = ["./inference.py", "--prompt", prompt, flag, folder]
    words[1:1] = ["--image", "your-picture.png"] if job.config.family.upscales else []
    words = " ".join(shlex.quote("".join(" " if letter.isspace() else letter for letter in word)) for word in words)
    return f"\n\nWith FloydTuner, where `{_code(folder)}` is its folder:\n\n```bash\n{words}\n```"


def _options(job: Job) -> str:
    """The options that were set, and those that everybody asks for, with their values; paths are none of it."""
    rows = ["| option | value |", "|---|---|"]
    sources, is_adapter = job.options["sources"], _kind(job) in ("lora", "dora")
    for name, value in job.options["options"].items():
        typed = getattr(getattr(job.config, ROWS[name].group), name)
        always = name in ALWAYS_TOLD or name in OF_A_LORA
        was_set = sources.get(name, "default") != "default"
        told = ROWS[name].group in TOLD and (is_adapter or ROWS[name].group != "lora")
        if told and (always or was_set) and value is not None and not isinstance(typed, Path):
            rows.append(f"| `{name}` | {_cell(value)} |")
    return "\n".join(rows)


def _dataset(dataset: Dataset) -> str:
    """What it holds, without its name or any of a file."""
    sizes = sorted((plans[0].source for plans, _ in dataset.plans.counted()), key=lambda size: size.width * size.height)
    extent = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    targets = sorted({plan.target for plans, _ in dataset.plans.counted() for plan in plans})
    trained = ", ".join(map(str, targets[:MOST_SAMPLES])) + (", ..." if len(targets) > MOST_SAMPLES else "")
    count, times = len(dataset.captions()), dataset.repeats + 1
    captions = "1 caption" if count == 1 else f"{count:,} different captions"
    images = "1 image" if len(dataset.records) == 1 else f"{len(dataset.records):,} images"
    often = "once" if times == 1 else f"{times} times"
    shown = f"trained at {trained}, each {often} an epoch"
    return f"{images} of {extent} pixels with {captions}, {shown}"


def _licence(licence: Licence | None, origin: Origin) -> str:
    if licence is None:
        return "What was trained on a model has that model's licence."
    return f"As that of {origin.base_model}: [{licence.name}]({licence.link})."


def _cell(value: object) -> str:
    return _text(value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|")


def _text(text: str) -> str:
    """A text of the user's as it stands in Markdown, on one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]#~" else letter for letter in plain)


def _code(text: str) -> str:
    """The same between backticks."""
    return " ".join(text.split()).replace("`", "'")
