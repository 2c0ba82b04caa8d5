"""What a run is told of the memory that it will need, and what to change where that is more than there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from helpers.config.optimizers import OPTIMIZERS
from helpers.config.options import TEXT_ENCODER_OPTIONS, Config
from helpers.models import published
from helpers.models.spaces import Latents
from helpers.models.spec import Spec
from helpers.sizes import Size
from helpers.training import assembly
from helpers.training.memory import Memory, Setup, estimate

GB, MB = 1e9, 1e6
RELEASED = (
    "OPTIMIZER_RELEASE_GRADIENTS=true (--optimizer_release_gradients) with MAX_GRAD_NORM=0 (--max_grad_norm), so"
    " without clipping"
)
SMALL_STATE = "adamw8bit"  # the smallest that steps as AdamW does

def shown(count: int) -> str:
    """So many bytes in words: of a tiny model, 0.00 GB says nothing."""
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / MB:.1f} MB"


def setup_of(config: Config, spec: Spec, architecture: Path, size: Size) -> Setup:
    """What the options say of a run whose largest images have this size, in pixels."""
    training, adapter = config.training, assembly.adapter_of(config)
    precision = assembly.precision_of(training)
    dtype = assembly.loaded_dtype(adapter, precision)
    return Setup(
        architecture=architecture,
        adapter=adapter,
        weights=torch.bfloat16 if dtype == torch.float16 else dtype,  # takes as much
        trained=precision.trained,
        autocast=precision.autocast != "no",
        optimizer=config.optimizer.optimizer,
        ema=config.optimizer.use_ema,
        checkpointing=training.gradient_checkpointing,
        batch_size=training.train_batch_size,
        size=spec.space.size(size),
        tokens=spec.text.length,
        accumulates=training.gradient_accumulation_steps > 1,
        trains_variance=config.loss.train_variance,
        channels=spec.space.channels,
        text_encoder=published.text_encoder_of(architecture) if config.lora.train_text_encoder else None,
        releases=config.optimizer.optimizer_release_gradients,
    )


def report(
    config: Config,
    spec: Spec,
    architecture: Path,
    size: Size,
    free: int | None,
    validating: int | None = None,
    processes: int = 1,
) -> str:
    """All parts for a dry run, a line for a real one; and a warning where the GPU has fewer bytes `free`.

    Args:
        validating: bytes that a validation takes besides what stays of the training; None where there is none.
    """
    memory, batch = estimate(setup_of(config, spec, architecture, size)), config.training.train_batch_size
    lines = [describe(memory, batch, size) if config.run.dry_run else in_a_line(memory, batch, size)]
    if config.run.dry_run and isinstance(spec.space, Latents):
        count = config.data.vae_batch_size
        one, some = (shown(spec.space.encoding_bytes(number, size)) for number in (1, count))
        less = "" if count == 1 else f" (VAE_BATCH_SIZE=1, --vae_batch_size, makes that {one})"
        lines.append(
            f"  before that, for images that are not cached yet, their VAE: a published one takes {some}, {count} at a"
            f" time{less}"
        )
    if config.run.dry_run and config.data.text_encoder_device == "auto" and not config.lora.train_text_encoder:
        lines.append(
            f"  before that, for captions that are not cached yet, their encoder: the published {spec.text.published}"
            " (TEXT_ENCODER_DEVICE=cpu, --text_encoder_device, keeps it off the GPU)"
        )
    if free is not None and free < memory.peak:
        ways = list(savings(config, processes))
        lines.append(warning(ways, config, spec, architecture, size, memory.peak, free))
    if validating is not None:
        needed = memory.weights + memory.optimizer + memory.ema + validating
        sizes = ", ".join(map(str, config.validation.validation_resolution))
        if config.run.dry_run:
            lines.append(f"  at validation, for pictures of {sizes}: {shown(needed)} at one time")
        if free is not None and free < needed:
            lines.append(
                f"The GPU has {shown(free)} free, and pictures of {sizes} need about {shown(needed)}: lower"
                " VALIDATION_RESOLUTION (--validation_resolution), or training goes on without them."
            )
    return "\n".join(lines)


def describe(memory: Memory, batch_size: int, size: Size) -> str:
    """What takes how much, line by line."""
    lines = [f"Memory needed for a batch of {batch_size} at {size}, besides what kernels take for themselves:"]
    for name, taken in memory.parts.items():
        lines.append(f"  {name:<12}{shown(taken):>11}{'  (the largest)' if name == memory.largest else ''}")
    lines.append(f"  {'at the most':<12}{shown(memory.peak):>11} at one time: gradients come as activations go")
    return "\n".join(lines)


def in_a_line(memory: Memory, batch_size: int, size: Size) -> str:
    largest = f"{shown(memory.parts[memory.largest])} of it for {memory.largest}"
    return f"Training will need about {shown(memory.peak)} for a batch of {batch_size} at {size}, {largest}."


def warning(
    ways: Sequence[tuple[str, Config]],
    config: Config,
    spec: Spec,
    architecture: Path,
    size: Size,
    needed: int,
    free: int,
) -> str:
    """That `needed` bytes are more than the GPU has, and what each of the `ways` to save memory would bring it to."""
    words = f"The GPU has {shown(free)} free, and training needs about {shown(needed)}. "
    peaks = [(estimate(setup_of(changed, spec, architecture, size)).peak, name) for name, changed in ways]
    helpful = sorted(way for way in peaks if way[0] < needed)
    if not helpful:
        edge = config.family.resolution
        images = "on smaller images (RESOLUTION, --resolution), " if size.width * size.height > edge * edge else ""
        return f"{words}No option that saves memory lowers that: train {images}a smaller model, or on a larger GPU."
    lines = [f"  to {shown(peak)}: {name}" for peak, name in helpful]
    return "\n".join([f"{words}Each of these lowers that:", *lines])


def savings(config: Config, processes: int = 1) -> Iterator[tuple[str, Config]]:
    """Each option that saves memory and is not used yet, in words, with the config that it makes."""
    training, optimizer, all_weights = config.training, config.optimizer.optimizer, config.training_kind == "full"
    if not training.gradient_checkpointing:
        changed = _changed(config, "training", gradient_checkpointing=True)
        yield "USE_GRADIENT_CHECKPOINTING=true (--gradient_checkpointing)", changed
    if training.train_batch_size > 1 and not config.optimizer.optimizer_release_gradients:
        batches = training.train_batch_size * training.gradient_accumulation_steps
        changed = _changed(config, "training", train_batch_size=1, gradient_accumulation_steps=batches)
        accumulation = f"GRADIENT_ACCUMULATION_STEPS={batches} (--gradient_accumulation_steps)"
        yield f"TRAIN_BATCH_SIZE=1 (--train_batch_size) with {accumulation}, which learn the same", changed
    if not training.pure_bf16 and training.mixed_precision != "fp16":  # chosen for lack of bf16
        fitting = "adamw_bf16" if OPTIMIZERS[optimizer].lost_in_bf16 else optimizer
        changed = _changed(config, "training", mixed_precision="bf16", pure_bf16=True)
        precision = "PURE_BF16=true (--pure_bf16) with MIXED_PRECISION=bf16 (--mixed_precision)"
        words, changed = _with_optimizer(changed, fitting)
        yield f"{precision} and {words}", changed
    fewer_bits = {"no_change": "int8", "int8": "nf4"}.get(config.lora.base_model_precision)
    if not all_weights and fewer_bits:
        changed = _changed(config, "lora", base_model_precision=fewer_bits)
        learned = ", from which a LoRA learns less exactly" if fewer_bits == "nf4" else ""
        yield f"BASE_MODEL_PRECISION={fewer_bits} (--base_model_precision){learned}", changed
    if all_weights and optimizer != SMALL_STATE:
        yield _with_optimizer(config, SMALL_STATE)
    if processes == 1 and _may_release(config):
        changed = _changed(config, "training", max_grad_norm=0.0)
        changed = _changed(changed, "optimizer", optimizer_release_gradients=True)
        yield RELEASED, changed
    if config.optimizer.use_ema:
        yield "USE_EMA=false (--use_ema)", _changed(config, "optimizer", use_ema=False)
    if config.lora.train_text_encoder:
        alone = dict.fromkeys(TEXT_ENCODER_OPTIONS)
        changed = _changed(config, "lora", **alone, train_text_encoder=False)
        yield "TRAIN_TEXT_ENCODER=false (--train_text_encoder)", changed
    if all_weights and not training.use_bitfit and not training.controlnet:
        changed = _changed(config, "optimizer", optimizer_release_gradients=False)
        yield f"MODEL_TYPE={config.lora_type} (--model_type)", _changed(changed, "model", model_type=config.lora_type)


def _may_release(config: Config) -> bool:
    """Whether gradients could be released, and are not."""
    training, options = config.training, config.optimizer
    whole = config.training_kind == "full" and not training.use_bitfit and training.mixed_precision != "fp16"
    at_once = training.gradient_accumulation_steps == 1 and not OPTIMIZERS[options.optimizer].needs_all
    return whole and at_once and not options.optimizer_release_gradients


def _with_optimizer(config: Config, name: str) -> tuple[str, Config]:
    """In words, with the rate that it needs where the present one's means another thing, and as a config."""
    rate, words = OPTIMIZERS[name].learning_rate, f"OPTIMIZER={name} (--optimizer)"
    if OPTIMIZERS[config.optimizer.optimizer].learning_rate != rate:
        words += f" with LEARNING_RATE={rate:g} (--learning_rate)"
    return words, _changed(config, "optimizer", optimizer=name)


def _changed(config: Config, group: str, **values: object) -> Config:
    return config.model_copy(update={group: getattr(config, group).model_copy(update=values)})


def free_on_gpu() -> int | None:
    """Bytes that are free on the GPU that is trained on; None without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
