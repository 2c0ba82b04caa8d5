"""From what was typed after `inference.py` to one checked request, all problems in one list. Without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from helpers.config.docs import inference_help
from helpers.config.families import FAMILIES, PICKLED, SINGLE_FILE, Family, local_or_hub
from helpers.config.inference_options import INFERENCE_ROWS, InferenceOptions
from helpers.config.jsonfile import MAX_BYTES, read_json
from helpers.config.load import read_flags
from helpers.config.options import LONGEST_TEXT
from helpers.config.paths import ROOT, from_root
from helpers.config.problems import ConfigError, did_you_mean, invalid_values
from helpers.files import printable

STAGES = ("stage1", "stage2", "upscaler")
"""The options that name models, in the order in which these work."""

NONE = "none"
X4 = "x4"
"""What is typed for the published upscaler."""

PIPELINE = "pipeline"  # below a training's output folder

DEMO: Mapping[str, str] = MappingProxyType({
    "stage1": "examples/demo/model",
    "stage2": "examples/demo/stage2",
    "upscaler": "examples/demo/stage3",
    "steps": "25,12,12",
    "guidance": "1.5,1,1",
    "output": "output/demo/pictures",
    "cache_dir": "output/demo/cache",
})
KNOWN_PROMPT, LEARNED_PROMPT = "a photo of a red circle", "a photo of a purple heart"
"""What the demo draws, and what it draws with the adapter that `./train.sh --demo` trains."""


@dataclass(frozen=True)
class Request:
    """What was asked for, each option right by itself.

    Attributes:
        flags: the names of the options that the user typed.
        said: these, and those that a recipe or the demo say.
    """

    options: InferenceOptions
    flags: frozenset[str]
    said: frozenset[str]

    def chain(self, bases: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """The models by the options that name them, in order: hub ids, or absolute paths of folders or files.

        Args:
            bases: of options that were not typed, the models that their adapters were trained on.

        Raises:
            ConfigError: they make no cascade, or other options do not fit it.
        """
        problems: list[str] = []
        named = self._named(bases, problems)
        if not problems:
            problems += _chain_problems(self.options, self.said, named)
        if problems:
            raise ConfigError(problems)
        return named

    def _named(self, bases: Mapping[str, str], problems: list[str]) -> dict[str, str]:
        named: dict[str, str] = {}
        for stage in STAGES:
            said, base = getattr(self.options, stage), bases.get(stage)
            try:
                model = model_name(stage, said or base or self._default(stage, named))
            except ValueError as error:
                why = f"--{stage}_lora was trained on it, but " if base and not said else ""
                problems.append(f"{INFERENCE_ROWS[stage].label}: {why}{error}")
            else:
                named |= {stage: model} if model else {}
        return named

    def _default(self, stage: str, named: Mapping[str, str]) -> str:
        """What does a stage's work where nothing is said."""
        if self.options.image is not None:
            # An image is upscaled by what is named, or else by the stage that takes any.
            is_last = stage == STAGES[-1] and not named and not self.options.stage2_lora
            return _default_of(stage) if is_last or getattr(self.options, f"{stage}_lora") else NONE
        if getattr(self.options, f"{stage}_lora") or stage == STAGES[0]:
            return _default_of(stage)
        if STAGES[0] in named and in_latents(named[STAGES[0]]):  # Stable Diffusion draws large pictures by itself
            return NONE
        return _default_of(stage)


def _default_of(stage: str) -> str:
    return next((family.default_flavour for family in FAMILIES if fits(family, stage)), NONE)


def fits(family: Family, stage: str) -> bool:
    """Whether a family can do the work of a stage: draw, upscale in pixels, or upscale in latents."""
    if stage == STAGES[0] or not family.upscales:
        return (stage == STAGES[0]) == (not family.upscales)
    return (stage == STAGES[2]) == (family.pixels_per_latent is not None)


def known_family(name: str) -> Family | None:
    """The family of a hub id that is a flavour's."""
    return next((one for one in FAMILIES if name in one.flavours.values() or name in one.former_names), None)


def in_latents(name: str) -> bool:
    """Whether a model has a VAE between it and its pictures, as far as that can be told without a download."""
    family = known_family(name)
    if name.lower().endswith(SINGLE_FILE) and Path(name).is_file():
        return True
    return family.pixels_per_latent is not None if family else (Path(name) / "vae").is_dir()


def model_name(stage: str, typed: str) -> str | None:
    """The hub id or the absolute path of the folder or file that was meant; None for "none".

    Raises:
        ValueError: in words.
    """
    if typed.lower() == NONE:
        return None
    flavours = {flavour: (family, hub_id) for family in FAMILIES for flavour, hub_id in family.flavours.items()}
    own = [flavour for flavour, (family, _) in flavours.items() if fits(family, stage)]
    typed = _default_of(stage) if typed.lower() == X4 and stage == STAGES[-1] else typed
    if typed in flavours or known_family(typed):
        family = flavours[typed][0] if typed in flavours else known_family(typed)
        if not fits(family, stage):
            other = next(one for one in STAGES if fits(family, one))
            instead = f"type it after --{other}, or type {_or(own)} here"
            raise ValueError(f"found {typed!r}, which is {family.name}: {instead}")
        return flavours[typed][1] if typed in flavours else typed
    if typed.lower().endswith((*PICKLED, SINGLE_FILE)) and not Path(from_root(typed)).is_dir():
        return _single_file(stage, typed)
    name = local_or_hub(typed)
    folder = Path(name)
    if folder.is_absolute():
        return str(_pipeline_in(folder))
    if typed.count("/") != 1:
        raise ValueError(f"found {typed!r}, which is no folder here, needs {_or(own)}, a hub id, a local folder or none"
                         + did_you_mean(typed, [*own, NONE]))
    return name


def _single_file(stage: str, typed: str) -> str:
    path = from_root(typed)
    if not typed.lower().endswith(SINGLE_FILE):
        raise ValueError(f"found {typed!r}, a pickled file, which is not opened: type the same model's {SINGLE_FILE}")
    if not any(family.single_file and fits(family, stage) for family in FAMILIES):
        raise ValueError(f"found {typed!r}, a single file: type the path of a folder in the diffusers layout")
    if not path.is_file():
        raise ValueError(f"there is no file {printable(path)} (relative paths count from {printable(ROOT)})")
    return str(path)


def _or(names: Sequence[str]) -> str:
    return " or ".join(names) if names else NONE


def _pipeline_in(folder: Path) -> Path:
    """The folder of a pipeline: that one, or the one that a full training wrote below it.

    Raises:
        ValueError: in words.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {printable(folder)} (relative paths count from {printable(ROOT)})")
    if (folder / "model_index.json").is_file():
        return folder
    if (folder / PIPELINE / "model_index.json").is_file():
        return folder / PIPELINE
    adapters = [path.name for path in folder.glob("*.safetensors")]
    if adapters:
        raise ValueError(
            f"{printable(folder)} holds an adapter ({adapters[0]}), not a model: type it after --stage1_lora,"
            " --stage2_lora or --upscaler_lora"
        )
    raise ValueError(f"{printable(folder)} has no model_index.json: it is no pipeline in the diffusers layout")


def read_request(argv: Sequence[str], said: Mapping[str, Any] = MappingProxyType({})) -> Request:
    """Read flags.

    Args:
        said: what a recipe says, by the options' names; flags win.

    Raises:
        ConfigError: with all problems.
        SystemExit: after printing the options, if --help is among the flags.
    """
    if {"--help", "-h"} & set(argv):
        print(inference_help())
        raise SystemExit(0)
    flags, problems = read_flags(argv, INFERENCE_ROWS)
    problems += [f"--{name}: not an option of inference.py" for name in said if name not in INFERENCE_ROWS]
    values = {name: value for name, value in said.items() if name in INFERENCE_ROWS} | flags
    options, refused = _options(values, problems)
    if options.demo and not refused:
        values = _demo(values, options) | values
        options, _ = _options(values, problems)
    request = Request(options, frozenset(flags), frozenset(values))
    problems += _problems(options, refused, request.flags)
    if not problems and not (options.replay and not said):
        waiting = {stage for stage in STAGES if getattr(options, f"{stage}_lora") and not getattr(options, stage)}
        # Where an adapter's base is still to be read, only what was typed can be looked at.
        request.chain() if not waiting else request._named({}, problems)
    if problems:
        raise ConfigError(problems)
    return request


def _demo(values: Mapping[str, Any], options: InferenceOptions) -> dict[str, str]:
    demo = dict(DEMO)
    if options.image is None and not {"prompt", "prompts"} & set(values):
        demo["prompt"] = LEARNED_PROMPT if options.stage1_lora else KNOWN_PROMPT
    if options.image is not None:
        demo |= {"stage1": NONE, "steps": "12", "guidance": "1"}
    count = sum(values.get(stage, demo.get(stage)) != NONE for stage in STAGES)
    return demo | {name: ",".join(demo[name].split(",")[:count]) for name in ("steps", "guidance")}


def _options(values: Mapping[str, Any], problems: list[str]) -> tuple[InferenceOptions, set[str]]:
    """The options, with those that are wrong at their defaults; these are named, and the words go to `problems`."""
    try:
        return InferenceOptions.model_validate(dict(values)), set()
    except ValidationError as error:
        wrong = invalid_values(error, InferenceOptions.model_fields)
        problems += [f"{INFERENCE_ROWS[name].label}: {words}" for name, words in wrong.items()]
        right = {name: value for name, value in values.items() if name not in wrong}
        return InferenceOptions.model_validate(right), set(wrong)


def _problems(options: InferenceOptions, refused: set[str], flags: frozenset[str]) -> Iterator[str]:
    """What can be told without knowing the models."""
    if options.replay is not None:
        if options.demo:
            yield "--demo: found true beside --replay: the recipe names its own models, so leave --demo out"
        for name in sorted(flags & {"prompt", "prompts", "seed", "num_images"}):
            yield f"--{name}: found beside --replay, whose recipe says what is drawn: leave it out"
        if not options.replay.is_file():
            yield f"--replay: there is no file {printable(options.replay)}"
    elif not options.prompt and options.prompts is None and options.image is None and "prompt" not in refused:
        yield '--prompt: is not set: type --prompt "a photo of ...", or --prompts with a file of them, or --demo'
    if options.prompts is not None:
        try:
            read_prompts(options.prompts)
        except ConfigError as error:
            yield from error.problems
        if options.image is not None:
            yield "--prompts: found beside --image: type one --prompt that says what the images show, or leave it out"
    if options.image is not None and not options.image.exists():
        yield f"--image: there is no file or folder {printable(options.image)}"
    for stage in STAGES:
        for path, _ in getattr(options, f"{stage}_lora") or ():
            if not os.path.exists(path):
                yield f"--{stage}_lora: there is no file or folder {printable(path)}"
        if getattr(options, f"{stage}_lora_scale") != 1 and not getattr(options, f"{stage}_lora"):
            yield f"--{stage}_lora_scale: found a scale, but no --{stage}_lora that it would be of: remove it"
    if is_file(options.output):
        if options.output.exists():
            yield f"--output: {printable(options.output)} exists already: type another name, or remove it"
        if options.num_images > 1 or options.prompts is not None or options.save_stages:
            yield "--output: found one .png for several pictures: type a folder"
    elif options.output.exists() and not options.output.is_dir():
        yield f"--output: {printable(options.output)} is a file: type a folder, or a name that ends in .png"


def _chain_problems(options: InferenceOptions, said: frozenset[str], named: Mapping[str, str]) -> Iterator[str]:
    """What does not fit the models that are to work."""
    if not named:
        yield "--stage1: found none, and no other stage either: name at least one model"
        return
    for stage in STAGES:
        if getattr(options, f"{stage}_lora") and stage not in named:
            yield f"--{stage}_lora: found an adapter beside --{stage} none: name its model, or leave the adapter out"
    if options.image is not None and "stage1" in named:
        yield "--image: found beside a stage I, which draws by words alone: type --stage1 none, or leave --image out"
    elif options.image is None and "stage1" not in named:
        yield f"--stage1: found none, so that --{next(iter(named))} has nothing to upscale: type --image too"
    upscaling = [stage for stage in named if stage != STAGES[0]]
    for name, stages in (("steps", list(named)), ("guidance", list(named)), ("noise_level", upscaling)):
        values = getattr(options, name)
        if values and len(values) > max(1, len(stages)):
            yield f"--{name}: found {len(values)} values for {len(stages)} stages ({', '.join(stages) or NONE})"
        elif values and 1 < len(values) < len(stages):
            yield f"--{name}: found {len(values)} values for {len(stages)} stages: type one for all, or one for each"
    if "noise_level" in said and not upscaling:
        yield "--noise_level: found a level, but nothing is upscaled: remove it"
    if not named.get(STAGES[0], "").lower().endswith(SINGLE_FILE):
        for name in ("single_file_config", "prediction_type"):
            if getattr(options, name) is not None:
                yield f"--{name}: found it, but --{STAGES[0]} is no single {SINGLE_FILE} file: remove it"
    if options.steps and options.scheduler not in (None, "ddpm"):
        for step in (step for step in options.steps if isinstance(step, str)):
            yield f"--steps: found {step!r}, which is for ddpm, beside --scheduler {options.scheduler}: type 25"


def is_file(output: Path) -> bool:
    """Whether `--output` names one picture's file."""
    return output.suffix.lower() == ".png"


def read_prompts(path: Path) -> dict[str, str]:
    """The prompts of a file by their names: lines, a JSON list, or a JSON object as the trainer's prompt library is.

    Raises:
        ConfigError: it cannot be read, or there are none in it.
    """
    label = "--prompts"
    if path.suffix.lower() == ".json":
        content = read_json(path, label)
        content = {text: text for text in content} if isinstance(content, list) and _are_texts(content) else content
        if not isinstance(content, dict) or not content or not _are_texts(content.values()):
            raise ConfigError([f'{label}: {printable(path)} needs {{"name": "prompt", ...}} or ["prompt", ...]'])
        return _of_fitting_length(content, path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{label}: {printable(path)} cannot be read ({error.strerror})"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{label}: {printable(path)} is no text in UTF-8: save it as that"]) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(raw) > MAX_BYTES or not lines:
        what = f"has more than {MAX_BYTES / 1e6:g} MB" if lines else "has no prompt in it"
        raise ConfigError([f"{label}: {printable(path)} {what}: write one a line"])
    return _of_fitting_length({line: line for line in lines}, path)


def _of_fitting_length(prompts: dict[str, str], path: Path) -> dict[str, str]:
    longest = max(prompts.values(), key=len)
    if len(longest) > LONGEST_TEXT:
        words = f"has a prompt of {len(longest):,} letters, {longest[:40]!r}...: type at most {LONGEST_TEXT:,}"
        raise ConfigError([f"--prompts: {printable(path)} {words}"])
    return prompts


def _are_texts(values: Any) -> bool:
    return all(isinstance(text, str) and text for text in values)

