"""Checks that need more than one option, or the family: each gives the problems that it sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from helpers.config.families import Family
from helpers.config.options import ROWS, Config


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
    yield from _learning_rate(config)
    yield from _loss(config)
    yield from _tracker(config)
    if config.validation.validation_guidance_rescale and not config.family.guidance_rescale:
        yield Problem(
            ("validation_guidance_rescale", "model_type"),
            f"found {config.validation.validation_guidance_rescale:g}, "
            f"but the pipeline of {config.family.name} has no guidance rescale: set it to 0.0",
        )


def nearest_multiples(value: float, alignment: int) -> str:
    """ "64 or 72": the multiples on both sides of `value`, or the one next to it."""
    below, above = math.floor(value / alignment) * alignment, math.ceil(value / alignment) * alignment
    return f"{below} or {above}" if below else str(above)


def resolution_problem(resolution: float, resolution_type: str, family: Family) -> str | None:
    """What is wrong with a training size for `family`, in words; None if nothing is."""
    edge = resolution if resolution_type == "pixel" else math.sqrt(resolution * 1e6)
    if resolution_type == "pixel" and resolution % family.alignment:
        return (
            f"found {resolution:g}, {family.name} needs a multiple of {family.alignment} pixels: "
            f"type {nearest_multiples(resolution, family.alignment)}"
        )
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
    words = resolution_problem(config.data.resolution, config.data.resolution_type, config.family)
    if words:
        yield Problem(("resolution", "resolution_type", "model_type"), words)


def _validation_sizes(config: Config) -> Iterator[Problem]:
    family, data = config.family, config.data
    edge = data.resolution if data.resolution_type == "pixel" else math.sqrt(data.resolution * 1e6)
    largest = math.floor(edge * family.largest_factor)
    for size in config.validation.validation_resolution:
        uneven = [edge for edge in size if edge % family.alignment]
        if uneven:
            yield Problem(
                ("validation_resolution", "model_type"),
                f"found {size}, edges of {family.name} need to be multiples of {family.alignment} pixels: "
                f"instead of {uneven[0]} type {nearest_multiples(uneven[0], family.alignment)}",
            )
        if max(size) > largest and not resolution_problem(data.resolution, data.resolution_type, family):
            yield Problem(
                ("validation_resolution", "resolution", "resolution_type", "model_type"),
                f"found {size}, which is more than {family.largest_factor} times the trained resolution "
                f"({data.resolution:g}): type edges of at most {largest} pixels",
            )


def _precision(config: Config) -> Iterator[Problem]:
    precision, optimizer = config.training.mixed_precision, config.optimizer
    if precision not in config.family.mixed_precisions:
        yield Problem(
            ("mixed_precision", "model_type"),
            f"found {precision!r}, {config.family.name} needs one of {', '.join(config.family.mixed_precisions)}",
        )
    if config.training.pure_bf16 and precision == "no":
        yield Problem(
            ("pure_bf16", "mixed_precision"),
            "found true beside mixed_precision no, which is float32: "
            "set mixed_precision to bf16, or pure_bf16 to false",
        )
    if config.training.pure_bf16 and optimizer.optimizer == "adamw":
        yield Problem(
            ("optimizer", "pure_bf16"),
            "found 'adamw' beside pure_bf16, where bf16 weights would round most of its steps away: "
            "type adamw_bf16, or set pure_bf16 to false",
        )


def _learning_rate(config: Config) -> Iterator[Problem]:
    options, steps = config.optimizer, config.training.max_train_steps
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
    if steps and options.lr_warmup_steps >= steps:
        yield Problem(
            ("lr_warmup_steps", "max_train_steps"),
            f"found {options.lr_warmup_steps}, but training ends after the {steps} of "
            f"{ROWS['max_train_steps'].label}, before the learning rate has risen: type a smaller number",
        )
    if options.lr_scheduler == "constant" and options.lr_warmup_steps:
        yield Problem(
            ("lr_scheduler", "lr_warmup_steps"),
            f"found 'constant' beside {options.lr_warmup_steps} warm-up steps: "
            "type constant_with_warmup, or set lr_warmup_steps to 0",
        )


def _loss(config: Config) -> Iterator[Problem]:
    if config.loss.soft_min_snr and not config.loss.snr_gamma:
        words = "found true without a snr_gamma, which it softens: type a snr_gamma such as 5, or set it to false"
        yield Problem(("soft_min_snr", "snr_gamma"), words)


def _tracker(config: Config) -> Iterator[Problem]:
    if config.run.report_to == "wandb" and find_spec("wandb") is None:
        words = "found 'wandb', which is not installed here: run `pip install wandb`, or type tensorboard or none"
        yield Problem(("report_to",), words)
