"""What is to be made, and all that is settled about it before any weights load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from helpers.config.inference import STAGES, Request, read_prompts
from helpers.config.options import ROWS
from helpers.config.paths import from_root
from helpers.config.problems import ConfigError
from helpers.files import printable
from helpers.images import loading as images
from helpers.inference.placement import GB, MOST, Budget, Place, budget_of, place
from helpers.inference.recipe import Recipe
from helpers.inference.sizes import Extent, Impossible, stage_sizes, upscaled_sizes
from helpers.inference.stages import Adapted, Stage, noise_level_problem
from helpers.inference.texts import readers
from helpers.models import bases, footprint, single_file
from helpers.models.bases import Base
from helpers.models.errors import OPTION, WeightsError
from helpers.models.fingerprints import fingerprint_file, fingerprint_unet
from helpers.models.results import AdapterError, read_adapter, require_fits
from helpers.models.single_file import CONFIG_OPTION, is_single_file
from helpers.sizes import Size, parse_sizes
from helpers.validation.prompts import named_prompts, safe_name

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIG_FLAG = "--single_file_config"
CAPTIONS = 8
"""Captions encoded at a time, at the most."""

UNKNOWN = Place(by_groups=False, batch=1, tiled=False, bytes=0)
"""How a component works of which nothing is known before a download."""


@dataclass(frozen=True)
class Picture:
    """A picture to make.

    Attributes:
        name: how its files' names begin.
        image: what it is made of, where that is the user's own.
        content: a fingerprint of that image's file.
    """

    name: str
    prompt: str
    seed: int
    image: Path | None = None
    content: str | None = None


@dataclass(frozen=True)
class Batch:
    """How a stage works through the pictures of a group."""

    unet: Place
    vae: Place | None


@dataclass(frozen=True)
class Group:
    """Pictures of one size, with the stages that make them.

    Attributes:
        start: the size that the user's own images are brought to; None where stage I draws.
    """

    stages: tuple[Stage, ...]
    batches: tuple[Batch, ...]
    pictures: tuple[Picture, ...]
    start: Size | None


@dataclass(frozen=True)
class Plan:
    """All of it.

    Attributes:
        notes: what the user should be told.
    """

    request: Request
    groups: tuple[Group, ...]
    device: torch.device
    dtype: torch.dtype
    budget: Budget
    notes: tuple[str, ...]


@contextmanager
def told_as(option: str) -> Iterator[None]:
    """Within it, what is wrong with a model is said of the option by which it was named here."""
    try:
        yield
    except WeightsError as error:
        words = str(error).replace(OPTION, f"--{option}").replace("export MODEL_NAME=", f"--{option} ")
        words = words.replace(CONFIG_OPTION, CONFIG_FLAG).replace("export MODEL_CONFIG=", f"{CONFIG_FLAG} ")
        words = words.replace(ROWS["revision"].label, "--revision").replace("MODEL_VARIANT (--variant)", "--variant")
        raise WeightsError(words) from error
    except AdapterError as error:
        flag = f"--{option}_lora"
        raise AdapterError(str(error) if flag in str(error) else f"{flag}: {error}") from error


def plan(request: Request, again: Recipe | None = None) -> Plan:
    """Find the models and the adapters, and settle sizes, steps, and what fits into memory.

    Args:
        again: the recipe of a picture to make again: its pictures, in the batches that they were made in.

    Raises:
        ConfigError, WeightsError, AdapterError: something of it cannot be used.
    """
    options = request.options
    adapters = {option: _adapters(request, option) for option in STAGES}
    named = request.chain({option: base for option in STAGES if (base := _base_of(adapters[option]))})
    found_bases = {}
    for option, name in named.items():
        with told_as(option):
            found_bases[option] = _find(name, request, adapters[option])
            _require_place(option, found_bases[option])
    device = _device(options.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    # A dry run may ask for a GPU that is elsewhere.
    kind = "cuda" if options.dry_run and options.vram not in ("auto", "max") else device.type
    usual = torch.bfloat16 if kind == "cuda" else torch.float32
    dtype = DTYPES.get(options.dtype, usual)
    budget = budget_of(options.vram, kind, free)
    notes = [note for base in found_bases.values() for note in base.notes]
    notes += _fitting(request, found_bases, adapters)
    pictures, start_sizes = _recipes_pictures(again, request) if again else _pictures(request)
    groups = []
    for start in dict.fromkeys(start_sizes):
        own = tuple(picture for picture, size in zip(pictures, start_sizes) if size == start)
        sizes = _sizes(request, found_bases, start)
        begin, following = (None, sizes) if start is None else (sizes[0], sizes[1:])
        stages = _stages(request, found_bases, adapters, following)
        batches = _batches(stages, budget, dtype, len(own))
        groups.append(Group(stages, _as_before(again, stages, batches) if again else batches, own, begin))
    wanted = options.size
    last = groups[0].stages[-1].size
    if wanted is not None and not wanted.is_ratio and start_sizes[0] is None and last != wanted[:2]:
        notes.append(f"--size {wanted}: the pictures will have {last}, the nearest that all stages can make.")
    return Plan(request, tuple(groups), device, dtype, budget, tuple(notes))


def _adapters(request: Request, option: str) -> tuple[Adapted, ...]:
    options = request.options
    found_adapters = []
    with told_as(option):
        for path, scale in getattr(options, f"{option}_lora") or ():
            file = read_adapter(path)
            scale = getattr(options, f"{option}_lora_scale") if scale is None else scale
            if file.content is None and scale != 1:
                raise AdapterError(f"{printable(file.path)} is a BitFit, whose biases have no scale: leave it out.")
            found_adapters.append(Adapted(file, scale))
    return tuple(found_adapters)


def _find(name: str, request: Request, adapters: Sequence[Adapted]) -> Base:
    options = request.options
    if not is_single_file(name):
        return bases.find(name, download=not options.dry_run)
    told = (one.file.facts.prediction_type for one in adapters if one.file.facts)
    predicted = options.prediction_type or next(told, None)
    conversion = single_file.plan(Path(name), options.cache_dir, options.single_file_config, predicted)
    return bases.find_single_file(conversion, make=not options.dry_run)


def _base_of(adapters: Sequence[Adapted]) -> str | None:
    return next((one.file.base for one in adapters if one.file.base), None)


def _require_place(option: str, base: Base) -> None:
    """See that a model does the work of the stage that it was named for."""
    upscales, in_latents = base.family.upscales, base.spec.space.component is not None
    right = "stage1" if not upscales else "upscaler" if in_latents else "stage2"
    if option != right:
        raise WeightsError(f"--{option}: {base.name} is {base.family.name}: type it after --{right}.")


def _device(name: str) -> torch.device:
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    is_there = {"cpu": True, "mps": torch.backends.mps.is_available()}.get(
        device.type, (device.index or 0) < torch.cuda.device_count()
    )
    if not is_there:
        raise ConfigError([f"--device: found {name!r}, which PyTorch does not see here: type auto"])
    return device


def _fitting(
    request: Request, found_bases: Mapping[str, Base], adapters: Mapping[str, Sequence[Adapted]]
) -> Iterator[str]:
    """See that the adapters are of these models; what to tell of them."""
    for option, base in found_bases.items():
        if base.architecture is None:
            continue
        variant = bases.variant_of(base, request.options.variant)
        has_weights = base.configs is not None and any((base.configs / "unet").glob("*.safetensors"))
        fingerprint = fingerprint_unet(base.configs, variant) if has_weights else None
        with told_as(option):
            for adapted in adapters[option]:
                yield from adapted.file.repairs
                any_base, flag = request.options.any_base, f"--{option}_lora"
                yield from require_fits(
                    adapted.file, base.family.key, base.name, base.unet, fingerprint, any_base, flag
                )


def _recipes_pictures(again: Recipe, request: Request) -> tuple[list[Picture], list[Size | None]]:
    """The pictures that were made together, and the size that those they were made of were brought to."""
    pictures = [
        Picture(safe_name(one.name), one.prompt, one.seed, one.image and from_root(one.image), one.content)
        for one in again.pictures
    ]
    if again.picture.image and "image" in request.flags:
        pictures[again.index] = replace(pictures[again.index], image=request.options.image)
    [start] = parse_sizes(again.start) if again.start else [None]
    return pictures, [start] * len(pictures)


def _as_before(again: Recipe, stages: Sequence[Stage], batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The batches that a recipe's pictures were made in, on which their last bits may hang."""
    former = {one.stage: one for one in again.stages}
    return tuple(
        Batch(
            replace(batch.unet, batch=before.batch) if before else batch.unet,
            replace(batch.vae, tiled=before.tiled) if before and batch.vae else batch.vae,
        )
        for batch, before in zip(batches, (former.get(stage.option) for stage in stages))
    )


def _pictures(request: Request) -> tuple[list[Picture], list[Size | None]]:
    """What to make, in order, and the size of each one's own image."""
    options = request.options
    seeds = range(options.seed, options.seed + options.num_images)
    if options.image is not None:
        made = []
        for path in _image_files(options.image):
            try:
                size = images.inspect(path).size
            except images.Unreadable as error:
                raise ConfigError([f"--image: {printable(path)} {error.reason}"]) from error
            name, content = safe_name(path.stem), fingerprint_file(path)
            made += [(Picture(name, options.prompt or "", seed, path, content), size) for seed in seeds]
        return [picture for picture, _ in made], [size for _, size in made]
    library = read_prompts(options.prompts) if options.prompts else {}
    prompts = named_prompts(options.prompt, library)
    pictures = [Picture(name, text, seed) for name, text in prompts.items() for seed in seeds]
    return pictures, [None] * len(pictures)


def _image_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(one for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
    readable = []
    for one in files:
        try:
            images.inspect(one)
        except images.NotAnImage:
            continue
        except images.Unreadable as error:
            raise ConfigError([f"--image: {printable(one)} {error.reason}"]) from error
        readable.append(one)
    if not readable:
        raise ConfigError([f"--image: there is no image in {printable(path)}"])
    return readable


def _sizes(request: Request, found_bases: Mapping[str, Base], start: Size | None) -> tuple[Size, ...]:
    extents = [_extent(base) for base in found_bases.values()]
    try:
        if start is None:
            return stage_sizes(extents, request.options.size)
        return upscaled_sizes(extents, start, request.options.size)
    except Impossible as error:
        what = f"found {request.options.size}" if request.options.size else f"an image of {start}"
        raise ConfigError([f"--size: {what}, which {error}"]) from error


def _extent(base: Base) -> Extent:
    family = base.family
    return Extent(base.scale, family.alignment, base.edge, max(family.resolution, base.edge) * family.largest_factor)


def _stages(
    request: Request,
    found_bases: Mapping[str, Base],
    adapters: Mapping[str, tuple[Adapted, ...]],
    sizes: Sequence[Size],
) -> tuple[Stage, ...]:
    options, problems, stages = request.options, [], []
    upscaling = [option for option, base in found_bases.items() if base.family.upscales]
    for number, (option, base) in enumerate(found_bases.items()):
        family = base.family
        steps = _of(options.steps, number, _usual_steps(base, options.scheduler))
        guidance = _of(options.guidance, number, family.validation_guidance)
        level = None
        if family.upscales:
            level = family.validation_noise_level
            levels = options.noise_level or ()
            if option in upscaling[: len(levels)]:
                level = levels[upscaling.index(option)]
            if words := noise_level_problem(base, level):
                problems.append(f"--noise_level: {words}")
        if isinstance(steps, str) and not family.predicts_variance:
            problems.append(f"--steps: found {steps!r}, a schedule of DeepFloyd IF, for {family.name}: type a number")
        variant = bases.variant_of(base, options.variant)
        stages.append(Stage(
            option, base, adapters[option], sizes[number], steps, guidance, level, options.scheduler, variant
        ))
    if problems:
        raise ConfigError(problems)
    return tuple(stages)


def _of(values: Sequence | None, number: int, default: object) -> object:
    if not values:
        return default
    return values[number] if len(values) > 1 else values[0]


def _usual_steps(base: Base, scheduler: str | None) -> int | str:
    """By what is known to look well: the published schedules of what samples with a learned variance."""
    if scheduler not in (None, "ddpm"):
        return 25
    if not base.family.predicts_variance:
        return 50
    return "super27" if base.family.upscales else "smart50"


def _batches(stages: Sequence[Stage], budget: Budget, dtype: torch.dtype, count: int) -> tuple[Batch, ...]:
    """What each stage makes of so many pictures at a time."""
    batches = []
    for stage in stages:
        base, pixels = stage.base, stage.size.width * stage.size.height
        unet, vae = UNKNOWN, None
        if base.architecture:
            need = footprint.of_unet(base.unet, base.spec.space.size(stage.size), dtype, stage.guidance > 1)
            unet = place(need, budget, pixels, min(count, MOST))
        if base.spec.space.component:
            config = base.vae
            vae = _vae_place(config, stage.size, budget) if config else UNKNOWN
        batches.append(Batch(unet, vae))
    return tuple(batches)


def _vae_place(config: Mapping[str, object], size: Size, budget: Budget) -> Place:
    whole, tiled = (footprint.of_vae(config, size, in_tiles) for in_tiles in (False, True))
    return place(whole, budget, size.width * size.height, 1, tiled)


def text_place(base: Base, budget: Budget) -> Place:
    """How a text encoder works within a budget."""
    path = base.text_encoder
    return place(footprint.of_text_encoder(path), budget, most=CAPTIONS) if path else UNKNOWN


def describe(plan: Plan) -> Iterator[str]:
    """The plan in words, a line each."""
    yield f"Memory: {plan.budget.words}."
    stages = plan.groups[0].stages
    for reader in dict.fromkeys(readers(stages)):
        placed = _placed(text_place(reader.base, plan.budget), "captions")
        yield f"text encoder of {printable(reader.base.name)}:{placed}"
    for group in plan.groups:
        for stage, batch in zip(group.stages, group.batches):
            adapters = ", ".join(f"{printable(one.file.path)} at {one.scale:g}" for one in stage.adapters)
            noise = "" if stage.noise_level is None else f", noise level {stage.noise_level}"
            yield (
                f"{stage.option}: {printable(stage.base.name)} ({stage.base.family.name})"
                f"{' with ' + adapters if adapters else ''}: {stage.size}, {stage.steps} steps, guidance"
                f" {stage.guidance:g}{noise},{_placed(batch.unet, 'pictures')}"
            )
            if batch.vae:
                yield f"{stage.option}: its VAE:{_placed(batch.vae, 'pictures')}"
        count = len(group.pictures)
        yield f"{count} picture{'s' if count > 1 else ''} of {group.stages[-1].size}."
    options = plan.request.options
    said = {True: "on", False: "off"}
    yield f"Safety checker: {said[options.safety_checker]}. Watermark: {said[options.watermark]}."


def _placed(place: Place, what: str) -> str:
    """How a component works, in words; nothing of one that is not known yet."""
    if not place.bytes:
        return " as much as turns out to fit"
    how = [f"{place.batch} {what if place.batch > 1 else what[:-1]} at a time", f"about {_shown(place.bytes)}"]
    how += ["its layers come to the GPU one by one"] if place.by_groups else []
    how += ["in tiles"] if place.tiled else []
    return " " + ", ".join(how)


def _shown(count: int) -> str:
    """Bytes in words."""
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
