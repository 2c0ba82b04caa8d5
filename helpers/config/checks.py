"""Checks that need more than one option, or the family: each gives the problems that it sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from helpers.config.families import LORA_TARGETS, MODEL_TYPES, SINGLE_FILE
from helpers.config.optimizers import ADAM_SETTINGS, OPTIMIZERS
from helpers.config.options import ROWS, TEXT_ENCODER_OPTIONS, Config
from helpers.config.problems import did_you_mean, found, one_of
from helpers.libraries import is_installed

WAVES = ("sine", "cosine", "cosine_with_restarts")
"""The schedules that have cycles."""

BIASED_TIMESTEPS = {
    "timestep_bias_multiplier": ("earlier", "later", "range"),
    "timestep_bias_portion": ("earlier", "later"),
    "timestep_bias_begin": ("range",),
    "timestep_bias_end": ("range",),
}
"""What the strategies of the timestep bias have to do with its other options."""

TIMESTEPS = 1000


class Problem(NamedTuple):
    """`options` are all those that the check looked at, the one to blame first."""

    options: tuple[str, ...]
    words: str

    def __str__(self) -> str:
        return f"{ROWS[self.options[0]].label}: {self.words}"


def problems(config: Config) -> Iterator[Problem]:
    """All that is wrong with a config whose values are right one by one."""
    yield from _an_end(config)
    yield from _resolution(config)
    yield from _validation_sizes(config)
    yield from _precision(config)
    yield from _optimizer(config)
    yield from _released_gradients(config)
    yield from _learning_rate(config)
    yield from _waves(config)
    if config.training.max_train_steps:
        yield from schedule_problems(config, config.training.max_train_steps, ("max_train_steps",))
    yield from _what_is_trained(config)
    yield from _text_encoder(config)
    yield from _controlnet(config)
    yield from _export(config)
    yield from _single_file(config)
    yield from _loss(config)
    yield from _timestep_bias(config)
    yield from _eval_images(config)
    yield from _tracker(config)
    if config.run.push_checkpoints_to_hub and not config.run.push_to_hub:
        words = "found true without push_to_hub: set that to true, or this to false"
        yield Problem(("push_checkpoints_to_hub", "push_to_hub"), words)
    if config.run.strict and config.run.check == "none":
        yield Problem(("strict", "check"), "found true without a check, whose exit code it sets: type --check beside it")
    yield from _schedulers(config)
    vae_batch_size, usual = config.data.vae_batch_size, ROWS["vae_batch_size"].field.default
    if vae_batch_size not in (1, usual) and not config.family.pixels_per_latent:
        words = f"found {vae_batch_size}, but {config.family.name} has no VAE: remove it"
        yield Problem(("vae_batch_size", "model_type"), words)
    yield from _guidance_rescale(config)


def nearest_multiples(value: float, alignment: int, least: int) -> str:
    """ "64 or 72": the multiples of at least `least` on both sides of `value`, or the one next to it."""
    smallest = math.ceil(least / alignment) * alignment
    near = {math.floor(value / alignment) * alignment, math.ceil(value / alignment) * alignment}
    return " or ".join(str(edge) for edge in sorted({max(edge, smallest) for edge in near}))


def smallest_edge(config: Config) -> int:
    """The least edge of an image in pixels: any for most families; for those that upscale, what the weights are for.

    That is the family's resolution, unless a local folder says otherwise.
    """
    if not config.family.upscales:
        return config.family.alignment
    edge = config.family.edge_of(config.model.pretrained_model_name_or_path)
    return edge if isinstance(edge, int) else config.family.resolution  # the weights' own checks say what is wrong


def _trained_edge(resolution: float, resolution_type: str, config: Config) -> float:
    """The edge in pixels of a square image in training; those of an area become multiples of the alignment."""
    if resolution_type == "pixel":
        return resolution
    alignment = config.family.alignment
    return alignment * math.floor(math.sqrt(resolution * 1e6) / alignment + 0.5)


def resolution_problem(resolution: float, resolution_type: str, config: Config) -> str | None:
    """What is wrong with a training size for the config's model, in words; None if nothing is."""
    family, smallest = config.family, smallest_edge(config)
    edge = _trained_edge(resolution, resolution_type, config)
    if resolution_type == "pixel" and resolution % family.alignment:
        return (
            f"found {resolution:g}, {family.name} needs a multiple of {family.alignment} pixels: "
            f"type {nearest_multiples(resolution, family.alignment, smallest)}"
        )
    if edge < smallest:
        makes = f"makes images of {smallest} pixels and more"
        makes += " out of a quarter of that" if family.upscales else ""
        instead = smallest if family.upscales else family.resolution
        return f"found {resolution:g}, {family.name} {makes}: type {instead}, with resolution_type pixel"
    largest = family.resolution * family.largest_factor
    if edge > largest:
        megapixels = f" (that is {edge:,.0f} pixels an edge)" if resolution_type == "area" else ""
        return (
            f"found {resolution:g}{megapixels}, {family.name} was trained at {family.resolution} pixels "
            f"and needs at most {largest}: type {family.resolution}, with resolution_type pixel"
        )
    return None


def _an_end(config: Config) -> Iterator[Problem]:
    if config.training.max_train_steps == 0 and config.training.num_train_epochs == 0:
        yield Problem(
            ("max_train_steps", "num_train_epochs"),
            f"found 0, and 0 for {ROWS['num_train_epochs'].label} too: set one of them to say when training ends",
        )


def _resolution(config: Config) -> Iterator[Problem]:
    words = resolution_problem(config.data.resolution, config.data.resolution_type, config)
    if words:
        yield Problem(("resolution", "resolution_type", "model_type"), words)


def _validation_sizes(config: Config) -> Iterator[Problem]:
    family, data, smallest = config.family, config.data, smallest_edge(config)
    largest = math.floor(_trained_edge(data.resolution, data.resolution_type, config) * family.largest_factor)
    for size in config.validation.validation_resolution:
        uneven = [edge for edge in size if edge % family.alignment]
        if max(size) > largest and not resolution_problem(data.resolution, data.resolution_type, config):
            yield Problem(
                ("validation_resolution", "resolution", "resolution_type", "model_type"),
                f"found {size}, which is more than {family.largest_factor} times the trained resolution "
                f"({data.resolution:g}): type edges of at most {largest} pixels",
            )
        elif uneven:
            yield Problem(
                ("validation_resolution", "model_type"),
                f"found {size}, edges of {family.name} need to be multiples of {family.alignment} pixels: "
                f"instead of {uneven[0]} type {nearest_multiples(uneven[0], family.alignment, smallest)}",
            )
        elif min(size) < smallest:
            yield Problem(
                ("validation_resolution", "model_type"),
                f"found {size}, {family.name} makes images of {smallest} pixels and more, of which its low-resolution "
                f"input has a quarter: type edges of at least {smallest}",
            )


def _schedulers(config: Config) -> Iterator[Problem]:
    family, name = config.family, config.validation.validation_noise_scheduler
    if name not in family.noise_schedulers:
        yield Problem(
            ("validation_noise_scheduler", "model_type"),
            f"found {name!r}, {family.name} is sampled with {one_of(family.noise_schedulers)}",
        )
    predicted = config.loss.prediction_type
    if predicted not in (None, *family.predictions):
        yield Problem(
            ("prediction_type", "model_type"),
            f"found {predicted!r}, {family.name} predicts {one_of(family.predictions)}: remove it",
        )
    if config.loss.rescale_betas_zero_snr and (predicted == "epsilon" or "v_prediction" not in family.predictions):
        yield Problem(
            ("rescale_betas_zero_snr", "prediction_type", "model_type"),
            "found true for a model that predicts epsilon: where the last timestep is noise alone, the noise tells "
            "nothing of the image, so set it to false, or train weights that predict v",
        )


def _guidance_rescale(config: Config) -> Iterator[Problem]:
    rescale, controlnet = config.validation.validation_guidance_rescale, config.training.controlnet
    if rescale and (controlnet or not config.family.guidance_rescale):
        lacking = "a ControlNet" if controlnet and config.family.controlnet else config.family.name
        yield Problem(
            ("validation_guidance_rescale", "controlnet" if controlnet else "model_type"),
            f"found {rescale:g}, but the pipeline of {lacking} has no guidance rescale: set it to 0.0",
        )


def _precision(config: Config) -> Iterator[Problem]:
    precision = config.training.mixed_precision
    if precision not in config.family.mixed_precisions:
        yield Problem(
            ("mixed_precision", "model_type"),
            f"found {precision!r}, in which text encoder and UNet of {config.family.name} overflow: type bf16",
        )
    elif config.training.pure_bf16 and precision != "bf16":
        kept = {"no": "is float32", "fp16": "keeps what is trained in float32"}[precision]
        yield Problem(
            ("pure_bf16", "mixed_precision"),
            f"found true beside mixed_precision {precision}, which {kept}: "
            "set mixed_precision to bf16, or pure_bf16 to false",
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    options = config.optimizer
    name, facts = options.optimizer, OPTIMIZERS[options.optimizer]
    if config.training.pure_bf16 and facts.lost_in_bf16:
        yield Problem(
            ("optimizer", "pure_bf16"),
            f"found {name!r} beside pure_bf16, where {facts.lost_in_bf16}: "
            f"type {_with_its_rate('adamw_bf16', name)}, or set pure_bf16 to false",
        )
    if facts.package and not is_installed(facts.package):
        words = f"found {name!r}, whose package is not installed here: run `pip install {facts.package}`"
        other = "adamw_bf16" if config.training.pure_bf16 else "adamw"
        yield Problem(("optimizer",), f"{words}, or type {_with_its_rate(other, name)}")
    for setting in (setting for setting in ADAM_SETTINGS if setting not in facts.settings):
        default = facts.beta2 if setting == "adam_beta2" else ROWS[setting].field.default
        if getattr(options, setting) != default:
            yield Problem(
                (setting, "optimizer"),
                f"found {getattr(options, setting):g} beside optimizer {name!r}, which has no such setting: remove it",
            )


def _released_gradients(config: Config) -> Iterator[Problem]:
    name, training, optimizer = "optimizer_release_gradients", config.training, config.optimizer.optimizer
    if not config.optimizer.optimizer_release_gradients:
        return
    if config.training_kind != "full" or training.use_bitfit:
        option, trained = ("use_bitfit", "biases") if training.use_bitfit else ("model_type", "an adapter")
        words = f"found true, but gradients of {trained} are small, and nothing would be won: set it to false"
        yield Problem((name, option), words)
        return
    if training.max_grad_norm:
        yield Problem(
            (name, "max_grad_norm"),
            f"found true beside max_grad_norm {training.max_grad_norm:g}, which is the norm of all gradients, and they "
            "are never there together: set max_grad_norm to 0, or this to false",
        )
    if training.gradient_accumulation_steps > 1:
        yield Problem(
            (name, "gradient_accumulation_steps"),
            f"found true beside gradient_accumulation_steps {training.gradient_accumulation_steps}, for which "
            "gradients wait until further batches are computed: set gradient_accumulation_steps to 1, or this to false",
        )
    if training.mixed_precision == "fp16":
        yield Problem(
            (name, "mixed_precision"),
            "found true beside mixed_precision fp16, whose loss scale is found by all gradients at once: set "
            "mixed_precision to bf16, or this to false",
        )
    reason = OPTIMIZERS[optimizer].needs_all
    if reason:
        other = "adamw_bf16" if training.pure_bf16 else "adamw"
        yield Problem(
            (name, "optimizer"),
            f"found true beside optimizer {optimizer!r}, which {reason}: type optimizer "
            f"{_with_its_rate(other, optimizer)}, or set this to false",
        )


class Start(NamedTuple):
    """How the trainer is started, as far as options depend on it.

    Attributes:
        backend, mode: of torch.compile, in lower case; "no" and "default" unless asked for.
    """

    processes: int = 1
    backend: str = "no"
    mode: str = "default"

    @property
    def compiles(self) -> bool:
        return self.backend != "no"


def problems_of_start(config: Config, start: Start) -> Iterator[Problem]:
    """What is wrong with options for a trainer that is started so."""
    releases, accumulated = config.optimizer.optimizer_release_gradients, config.training.gradient_accumulation_steps
    if releases and start.processes > 1:
        yield Problem(
            ("optimizer_release_gradients",),
            f"found true beside {start.processes} processes (TRAINING_NUM_PROCESSES), which add up their gradients "
            "first: set it to false, or train with one process",
        )
    if releases and start.compiles:
        yield Problem(
            ("optimizer_release_gradients",),
            f"found true beside TRAINING_DYNAMO_BACKEND={start.backend}, a compiled model, whose gradients all come at "
            "once: set it to false, or do not compile",
        )
    if start.compiles and start.mode != "default" and accumulated > 1:
        yield Problem(
            ("gradient_accumulation_steps",),
            f"found {accumulated} beside TRAINING_DYNAMO_MODE={start.mode}, whose CUDA graphs overwrite the gradients of "
            "the batch before: set it to 1, or TRAINING_DYNAMO_MODE to default",
        )


def _learning_rate(config: Config) -> Iterator[Problem]:
    options = config.optimizer
    facts = OPTIMIZERS[options.optimizer]
    if options.learning_rate < facts.least_rate:
        yield Problem(
            ("learning_rate", "optimizer"),
            f"found {options.learning_rate:g} beside optimizer {options.optimizer!r}, which finds its own rate and "
            f"multiplies it by this: type {facts.learning_rate:g}",
        )
    if options.learning_rate > facts.greatest_rate:
        yield Problem(
            ("learning_rate", "optimizer"),
            f"found {options.learning_rate:g} beside optimizer {options.optimizer!r}, with which a rate above "
            f"{facts.greatest_rate:g} breaks any model: type a rate near {facts.learning_rate:g}",
        )
    decays = not options.lr_scheduler.startswith("constant")
    if decays and options.lr_end > options.learning_rate:
        yield Problem(
            ("lr_end", "learning_rate", "lr_scheduler"),
            f"found {options.lr_end:g}, above the learning_rate of {options.learning_rate:g} "
            "that it is reached from: type a smaller one",
        )
    if not decays and options.lr_end:
        yield Problem(
            ("lr_end", "lr_scheduler"),
            f"found {options.lr_end:g} beside lr_scheduler {options.lr_scheduler!r}, which never goes there: "
            "remove it, or type cosine or another schedule that decays",
        )
    if options.lr_scheduler == "constant" and options.lr_warmup_steps:
        yield Problem(
            ("lr_scheduler", "lr_warmup_steps"),
            f"found 'constant' beside {options.lr_warmup_steps} warm-up steps: "
            "type constant_with_warmup, or set lr_warmup_steps to 0",
        )


def _with_its_rate(optimizer: str, instead_of: str) -> str:
    """An optimizer to change to, with a learning rate where that of the present one would not do."""
    rate = OPTIMIZERS[optimizer].learning_rate
    return optimizer if OPTIMIZERS[instead_of].learning_rate == rate else f"{optimizer} with learning_rate {rate:g}"


def _waves(config: Config) -> Iterator[Problem]:
    options = config.optimizer
    schedule, cycles = options.lr_scheduler, options.lr_num_cycles
    if options.lr_power != 1 and schedule != "polynomial":
        yield Problem(
            ("lr_power", "lr_scheduler"),
            f"found {options.lr_power:g} beside lr_scheduler {schedule!r}, which has no power: "
            "remove it, or type polynomial",
        )
    if cycles != 1 and schedule not in WAVES:
        words = f"found {cycles:g} beside lr_scheduler {schedule!r}, which has no cycles: remove it, or type cosine"
        yield Problem(("lr_num_cycles", "lr_scheduler"), words)
    elif schedule != "sine" and cycles != round(cycles):
        yield Problem(
            ("lr_num_cycles", "lr_scheduler"),
            f"found {cycles:g}, with which {schedule} would not end at lr_end: type a whole number",
        )
    elif schedule == "sine" and cycles < 0.5:
        yield Problem(
            ("lr_num_cycles", "lr_scheduler"),
            f"found {cycles:g}, with which a sine ends before it is at lr_end: type 0.5 or more",
        )


def schedule_problems(config: Config, steps: int, ended_by: tuple[str, ...]) -> Iterator[Problem]:
    """What of the learning rate's schedule does not fit into a run of so many steps.

    Args:
        ended_by: the options that say so.
    """
    options, end = config.optimizer, " and ".join(ROWS[name].label for name in ended_by)
    left = steps - options.lr_warmup_steps
    if left <= 0:
        yield Problem(
            ("lr_warmup_steps", *ended_by),
            f"found {options.lr_warmup_steps}, but training ends after {steps} steps, as {end} says, before the "
            "learning rate has risen: type a smaller number",
        )
        return
    schedule, cycles = options.lr_scheduler, options.lr_num_cycles
    # Each half wave takes a step, and a sine also the one that it begins at. One decay may be cut as short as a run.
    needed = math.ceil(2 * cycles) + (schedule == "sine")
    if needed > left and schedule in WAVES and (schedule == "sine" or cycles > 1):
        yield Problem(
            ("lr_num_cycles", "lr_scheduler", "lr_warmup_steps", *ended_by),
            f"found {cycles:g}, for which {schedule} needs {needed} steps after the warm-up, and there are {left}, as "
            f"{end} says: type a smaller number, or lr_scheduler linear",
        )


def _what_is_trained(config: Config) -> Iterator[Problem]:
    of_kind = {kind: name for name, (family, kind) in MODEL_TYPES.items() if family is config.family}
    lora = [name for name in ("use_dora", "use_rslora") if getattr(config.lora, name)]
    if lora and config.training.use_bitfit:
        yield Problem(
            ("use_bitfit", *lora, "model_type"),
            f"found true beside {lora[0]}: BitFit trains the model's own biases, for model_type {of_kind['full']}, and "
            f"{lora[0]} is a way to train an adapter, for model_type {of_kind['lora']}: set one of the two to false",
        )
        return
    if config.training_kind == "full":
        yield from _adapter_of_full(config, of_kind)
        return
    layers = [name for name in LORA_TARGETS[config.lora.lora_targets] if name not in config.family.lacks_layers]
    for name in config.lora.ranks:
        if name not in layers:
            yield Problem(
                ("lora_rank_pattern", "lora_targets"),
                f"found the layer {name!r}, with lora_targets {config.lora.lora_targets!r} it needs {one_of(layers)}"
                + did_you_mean(name, layers),
            )
    if config.training.use_bitfit:
        yield Problem(
            ("use_bitfit", "model_type"),
            f"found true beside model_type {of_kind['lora']}, but BitFit trains the model's own biases: "
            f"set it to false, or model_type to {of_kind['full']}",
        )


def _adapter_of_full(config: Config, of_kind: Mapping[str, str]) -> Iterator[Problem]:
    """Options of an adapter where there is none."""
    for name, field in type(config.lora).model_fields.items():
        value = getattr(config.lora, name)
        if value == field.default:
            continue
        away = "set it to false, or" if ROWS[name].is_switch else "remove it, or set"
        yield Problem(
            (name, "model_type"),
            f"found {found(value)} beside model_type {of_kind['full']}, which trains no adapter: "
            f"{away} model_type to {of_kind['lora']}",
        )


def _text_encoder(config: Config) -> Iterator[Problem]:
    lora, optimizer = config.lora, config.optimizer
    if config.training_kind == "full":
        return
    if not lora.train_text_encoder:
        for name in TEXT_ENCODER_OPTIONS:
            if getattr(lora, name) is not None:
                yield Problem(
                    (name, "train_text_encoder"),
                    f"found {getattr(lora, name):g} without train_text_encoder, where it does nothing: remove it, or "
                    "set train_text_encoder to true",
                )
        return
    if not config.family.trains_text_encoder:
        yield Problem(
            ("train_text_encoder", "model_type"),
            f"found true, but {config.family.name} {config.family.why_not['train_text_encoder']}, so set it to false",
        )
        return
    for name in ("text_encoder_device", "text_encoder_batch_size", "text_embeds_storage"):
        value = getattr(config.data, name)
        if value != ROWS[name].field.default:
            yield Problem(
                (name, "train_text_encoder"),
                f"found {found(value)} beside train_text_encoder, with which the captions of each batch are encoded "
                "where it is trained: remove it",
            )
    facts, rate = OPTIMIZERS[optimizer.optimizer], lora.text_encoder_learning_rate
    if rate is None:
        return
    if facts.one_rate and rate != optimizer.learning_rate:
        yield Problem(
            ("text_encoder_learning_rate", "learning_rate", "optimizer"),
            f"found {rate:g} beside optimizer {optimizer.optimizer!r}, which finds one rate for all that is trained: "
            "remove it",
        )
    if rate > facts.greatest_rate:
        yield Problem(
            ("text_encoder_learning_rate", "optimizer"),
            f"found {rate:g} beside optimizer {optimizer.optimizer!r}, with which a rate above "
            f"{facts.greatest_rate:g} breaks any model: type a rate near {facts.learning_rate / 10:g}",
        )


def _controlnet(config: Config) -> Iterator[Problem]:
    if not config.training.controlnet:
        return
    full_type = next(name for name, row in MODEL_TYPES.items() if row == (config.family, "full"))
    if not config.family.controlnet:
        able = next(name for name, (family, kind) in MODEL_TYPES.items() if family.controlnet and kind == "full")
        yield Problem(
            ("controlnet", "model_type"),
            f"found true, but no ControlNet can be made for {config.family.name}:"
            f" {config.family.why_not['controlnet']}: set it to false, or train Stable Diffusion with model_type"
            f" {able}",
        )
    elif config.training_kind == "lora":
        yield Problem(
            ("controlnet", "model_type"),
            f"found true beside model_type {config.model.model_type}, which trains an adapter of the UNet: a ControlNet"
            f" is a model of its own, so set model_type to {full_type}, or controlnet to false",
        )
    elif config.training.use_bitfit:
        yield Problem(
            ("controlnet", "use_bitfit"),
            "found true beside use_bitfit, which trains the UNet's biases: a ControlNet is trained as a whole, beside a"
            " UNet that stays as it is: set one of the two to false",
        )


def _single_file(config: Config) -> Iterator[Problem]:
    name = config.model.pretrained_model_name_or_path
    if config.model.single_file_config is not None and not name.endswith(SINGLE_FILE):
        yield Problem(
            ("single_file_config", "pretrained_model_name_or_path"),
            f"found {found(str(config.model.single_file_config))} beside the model {found(name)}, which brings its own"
            f" configuration: remove it, or name a file that ends in {SINGLE_FILE}",
        )


def _export(config: Config) -> Iterator[Problem]:
    if config.run.export == "diffusers":
        return
    words = f"found {config.run.export!r}"
    if not config.family.kohya:
        words += f", but ComfyUI and A1111 have no {config.family.name}: remove it, or type diffusers"
        yield Problem(("export", "model_type"), words)
    elif config.training_kind == "full":
        words += (
            f" beside model_type {config.model.model_type}, which trains no adapter: type diffusers, "
            f"or set model_type to {config.lora_type}"
        )
        yield Problem(("export", "model_type"), words)


def _loss(config: Config) -> Iterator[Problem]:
    if not config.loss.train_variance and not config.family.predicts_variance:
        words = f"found false, but {config.family.name} predicts no variance that could be trained: remove it"
        yield Problem(("train_variance", "model_type"), words)
    if config.loss.soft_min_snr and not config.loss.snr_gamma:
        words = "found true without a snr_gamma, which it softens: type a snr_gamma such as 5, or set it to false"
        yield Problem(("soft_min_snr", "snr_gamma"), words)


def _timestep_bias(config: Config) -> Iterator[Problem]:
    loss = config.loss
    strategy = loss.timestep_bias_strategy
    for option, strategies in BIASED_TIMESTEPS.items():
        value = getattr(loss, option)
        if value != ROWS[option].field.default and strategy not in strategies:
            yield Problem(
                (option, "timestep_bias_strategy"),
                f"found {value:g} beside timestep_bias_strategy {strategy!r}, where it does nothing: remove it, or "
                f"type timestep_bias_strategy {' or '.join(strategies)}",
            )
    if strategy == "none":
        return
    if loss.timestep_bias_multiplier == 1:
        yield Problem(
            ("timestep_bias_multiplier", "timestep_bias_strategy"),
            "found 1, with which all timesteps come up as often as without a timestep_bias_strategy: type 2, or less "
            "than 1 to make some rarer",
        )
    begin, end = loss.timestep_bias_begin, loss.timestep_bias_end
    if strategy == "range" and begin >= end:
        yield Problem(
            ("timestep_bias_begin", "timestep_bias_end"),
            f"found {begin}, but the range ends before {end}: type a smaller number",
        )
    if strategy == "range" and (begin, end) == (0, TIMESTEPS):
        yield Problem(
            ("timestep_bias_begin", "timestep_bias_end", "timestep_bias_strategy"),
            f"found 0, and {TIMESTEPS} for {ROWS['timestep_bias_end'].label}, which is all timesteps: make the range "
            "smaller",
        )
    count = round(loss.timestep_bias_portion * TIMESTEPS)
    if strategy != "range" and count in (0, TIMESTEPS):
        yield Problem(
            ("timestep_bias_portion", "timestep_bias_strategy"),
            f"found {loss.timestep_bias_portion:g}, which is {'all' if count else 'none'} of the {TIMESTEPS} "
            "timesteps: type a part of them such as 0.25",
        )


def _eval_images(config: Config) -> Iterator[Problem]:
    if config.validation.num_eval_images and not config.shows_eval_images:
        words = f"found {config.validation.num_eval_images}, {config.family.name} is judged by its validation prompts: "
        yield Problem(("num_eval_images", "model_type"), words + "set it to 0")
    level, family = config.validation.validation_noise_level, config.family
    if level and not family.upscales:
        words = f"found {level}, but validation of {family.name} upscales nothing: remove it"
        yield Problem(("validation_noise_level", "model_type"), words)
    elif level > family.largest_noise_level:
        words = f"found {level}, but {family.name} knows noise levels up to {family.largest_noise_level}: type"
        yield Problem(("validation_noise_level", "model_type"), f"{words} {family.validation_noise_level}")


def _tracker(config: Config) -> Iterator[Problem]:
    if config.run.report_to == "wandb" and not is_installed("wandb"):
        words = "found 'wandb', which is not installed here: run `pip install wandb`, or type tensorboard or none"
        yield Problem(("report_to",), words)
