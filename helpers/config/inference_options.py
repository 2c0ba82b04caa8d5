"""The table of options of `inference.py`, in the rows of `options.py`: each is stated here once, and is a flag."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator

from helpers.config.options import (
    FolderName,
    FolderOrHub,
    FromRoot,
    Group,
    ModelName,
    Real,
    Row,
    Switch,
    Text,
    Whole,
    option,
    row_of,
)
from helpers.config.paths import from_root
from helpers.sizes import Size, parse_sizes

SCHEDULES: Mapping[str, int] = MappingProxyType({
    "fast27": 27, "smart27": 27, "smart50": 50, "smart100": 100, "smart185": 185,
    "super27": 27, "super40": 40, "super100": 100,
})
"""The step schedules that DeepFloyd IF was published with, and how many steps each has."""

MOST_STEPS = 1000
LARGEST_GUIDANCE = 100.0
LARGEST_SCALE = 10.0
LARGEST_EDGE = 16384


class Shape(NamedTuple):
    """A size in pixels, or the ratio of its edges."""

    width: int
    height: int
    is_ratio: bool = False

    def __str__(self) -> str:
        return f"{self.width}:{self.height}" if self.is_ratio else str(Size(self.width, self.height))


class Weighed(NamedTuple):
    """An adapter's file or folder, and how strongly it acts; None where `--stage1_lora_scale` and its like say it."""

    path: str
    scale: float | None = None

    def __str__(self) -> str:
        return self.path if self.scale is None else f"{self.path}:{self.scale:g}"


def _entries(value: object) -> list[str]:
    if isinstance(value, bool):
        raise ValueError("needs a value, or several with commas between them")
    entries = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return [str(entry).strip() for entry in entries]


def _to_shape(value: object) -> Shape:
    text = str(value).strip()
    ratio = re.fullmatch(r"(\d{1,4})\s*:\s*(\d{1,4})", text)
    if ratio:
        shape = Shape(int(ratio[1]), int(ratio[2]), is_ratio=True)
        if not all(shape[:2]) or not 1 / 4 <= shape.width / shape.height <= 4:
            raise ValueError("needs a ratio from 1:4 to 4:1, such as 3:2")
        return shape
    try:
        [size] = parse_sizes(text)
    except ValueError:
        raise ValueError("needs one size like 1024x768 or 1024, or a ratio like 3:2") from None
    if max(size) > LARGEST_EDGE:
        raise ValueError(f"needs edges of at most {LARGEST_EDGE:,} pixels")
    return Shape(*size)


def _to_steps(value: object) -> tuple[int | str, ...]:
    steps = tuple(int(entry) if re.fullmatch(r"\d{1,4}", entry) else entry.lower() for entry in _entries(value))
    if any(step not in SCHEDULES if isinstance(step, str) else not 1 <= step <= MOST_STEPS for step in steps):
        raise ValueError(
            f"needs a number from 1 to {MOST_STEPS}, or one of {', '.join(SCHEDULES)}; or one for each stage"
        )
    return steps


def _to_guidance(value: object) -> tuple[float, ...]:
    try:
        scales = tuple(float(entry) for entry in _entries(value))
    except ValueError:
        scales = (0.0,)
    if not all(1 <= scale <= LARGEST_GUIDANCE for scale in scales):
        raise ValueError(f"needs a number from 1 to {LARGEST_GUIDANCE:g}, or one for each stage, with commas")
    return scales


def _to_levels(value: object) -> tuple[int, ...]:
    entries = _entries(value)
    if not all(re.fullmatch(r"\d{1,3}", entry) for entry in entries):
        raise ValueError("needs a whole number from 0 to 999, or one for each stage that upscales, with commas")
    return tuple(int(entry) for entry in entries)


def _to_adapters(value: object) -> tuple[Weighed, ...]:
    found = []
    for entry in _entries(value):
        match = re.fullmatch(r"(.+?)(?::([+-]?\d*\.?\d+))?", entry, re.DOTALL)
        if match is None:
            raise ValueError("needs the path of an adapter, or several with commas, each with :scale behind it or not")
        scale = None if match[2] is None else float(match[2])
        if scale is not None and abs(scale) > LARGEST_SCALE:
            raise ValueError(f"needs scales of at most {LARGEST_SCALE:g}")
        found.append(Weighed(str(from_root(match[1])), scale))
    return tuple(found)


def _to_device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value) is None:
        raise ValueError("needs auto, cpu, cuda, cuda:1 or mps")
    return value


ShapeOption = Annotated[Shape, BeforeValidator(_to_shape)]
Steps = Annotated[tuple[int | str, ...], BeforeValidator(_to_steps)]
Guidance = Annotated[tuple[float, ...], BeforeValidator(_to_guidance)]
Levels = Annotated[tuple[int, ...], BeforeValidator(_to_levels)]
Adapters = Annotated[tuple[Weighed, ...], BeforeValidator(_to_adapters)]
Device = Annotated[Text, AfterValidator(_to_device)]


class InferenceOptions(Group):
    """All options of one call of `inference.py`."""

    prompt: Text | None = option(help="What to draw.")
    prompts: FromRoot | None = option(
        help="A file of prompts to draw: one a line; or JSON: {name: prompt}, as the trainer's library, or a list.")
    negative_prompt: Text = option("", help="What to avoid.")
    image: FromRoot | None = option(
        help="An image, or a folder of images, to upscale in place of stage I's; --prompt says what it shows.")
    stage1: ModelName | None = option(
        help="Stage I: a flavour, a hub id, a local folder, a training's output folder, or none. Stable Diffusion too, also as a"
             " single .safetensors file.",
        default_words="the base of --stage1_lora, or i-medium-400m")
    single_file_config: FolderOrHub | None = option(
        help="The pipeline whose small files fit, where --stage1 is a single .safetensors file.",
        default_words="the published one of its version")
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        help="What a single file predicts.", default_words="as --stage1_lora or the file says")
    stage2: ModelName | None = option(
        help="Stage II, in the same words.", default_words="the base of --stage2_lora, or ii-medium-450m")
    upscaler: ModelName | None = option(
        help="Stage III: x4, a hub id, a local folder, a training's output folder, or none.",
        default_words="the base of --upscaler_lora, or x4")
    stage1_lora: Adapters | None = option(
        help="Adapters of stage I (LoRA, DoRA, BitFit), files or output folders, with commas; `:0.8` behind one is its"
             " scale.")
    stage1_lora_scale: Real = option(
        1.0, ge=-LARGEST_SCALE, le=LARGEST_SCALE, help="The scale of those that say none.")
    stage2_lora: Adapters | None = option(help="Adapters of stage II.")
    stage2_lora_scale: Real = option(
        1.0, ge=-LARGEST_SCALE, le=LARGEST_SCALE, help="The scale of those that say none.")
    upscaler_lora: Adapters | None = option(help="Adapters of stage III.")
    upscaler_lora_scale: Real = option(
        1.0, ge=-LARGEST_SCALE, le=LARGEST_SCALE, help="The scale of those that say none.")
    any_base: Switch = option(
        False, help="Load adapters on another model than their own, if their shapes fit.")
    variant: FolderName | None = option(
        help="Variant of the weight files, such as fp16, of the models that have it.")
    size: ShapeOption | None = option(
        unit="px", default_words="1:1",
        help="Of the last stage's picture: 1024x768, 1024, or a ratio like 3:2, whose shorter edge is what the models"
             " were made for.")
    steps: Steps | None = option(
        default_words="smart50, super27; 50 of other models, 25 with --scheduler",
        help="Denoising steps, one value for all stages or one for each: a number, or a published schedule:"
             f" {', '.join(SCHEDULES)}.")
    guidance: Guidance | None = option(
        default_words="by model, as the trainer's validation", help="Guidance, for all stages or for each; 1: none.")
    noise_level: Levels | None = option(
        default_words="250 for stage II, 20 for x4",
        help="How much noise the image to upscale gets, one value for each stage that upscales.")
    scheduler: Literal["ddpm", "dpm++", "ddim", "unipc"] | None = option(
        default_words="the model's own", help="The sampler of all stages.")
    seed: Whole = option(42, ge=0, help="Seed of a prompt's first picture; the next ones have the seeds after it.")
    num_images: Whole = option(1, ge=1, le=10_000, help="Pictures of each prompt or image.")
    vram: Literal["auto", "6", "16", "24", "max"] = option(
        "auto", unit="GB", help="The GPU's memory to keep to; auto: what is free there.")
    device: Device = option("auto", help="Where to compute: auto, cpu, cuda, cuda:1, mps.")
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto", help="What the UNets compute in; auto: bf16 on a GPU, fp32 elsewhere.")
    safety_checker: Switch = option(
        False, help="Look at pictures with stage I's own safety checker, and black out those that it names.")
    watermark: Switch = option(False, help="Put the watermark of stage I's folder onto the pictures.")
    output: FromRoot = option("output/pictures", help="The folder of the pictures, or one file that ends in .png.")
    save_stages: Switch = option(False, help="Keep the pictures of the stages before the last too.")
    cache_dir: FromRoot = option("cache", help="Where encoded prompts are kept, for the trainer too.")
    replay: FromRoot | None = option(
        help="Make a picture again by the recipe in its file; flags typed beside it win.")
    demo: Switch = option(False, help="Draw with the tiny cascade in examples/demo.")
    dry_run: Switch = option(False, help="Say what would be done, at which sizes and in how much memory, then stop.")


def _row(name: str) -> Row:
    return replace(row_of("inference", name, InferenceOptions.model_fields[name]), exports=())


INFERENCE_ROWS: Mapping[str, Row] = MappingProxyType({name: _row(name) for name in InferenceOptions.model_fields})
"""Every option of `inference.py`, by its name."""


def plain(value: Any) -> Any:
    """An option's value as its flag takes it, and as JSON."""
    if isinstance(value, (Shape, Weighed)) or hasattr(value, "__fspath__"):
        return str(value)
    if isinstance(value, tuple):
        return ",".join(f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in value)
    return value
