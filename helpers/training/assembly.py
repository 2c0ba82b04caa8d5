"""From the options to a run that is ready for its first step."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch.amp import GradScaler

from helpers.config.options import ROWS, Config, LossOptions, OptimizerOptions, TrainingOptions
from helpers.data.sampler import Dealt
from helpers.diffusion.timesteps import TimestepBias
from helpers.files import is_full
from helpers.models import loading
from helpers.models.adapters import Adapter, parameter_groups, trainable_parameters
from helpers.models.bitfit import BitFit
from helpers.models.controlnet import ControlNet
from helpers.models.denoiser import Denoiser
from helpers.models.full import Full
from helpers.models.gradient_checkpointing import checkpoint_everything, checkpoint_text_encoder
from helpers.models.lora import LoRA
from helpers.models.parts import LossSettings
from helpers.models.spec import Spec
from helpers.processes import Processes
from helpers.training.ema import EMA
from helpers.training.loop import Run
from helpers.training.optimizers import OPTIMIZERS, RATE_FACTOR, AdamSettings, Trained
from helpers.training.released import Released
from helpers.training.schedules import LearningRate

_SHAPES = "the saved weights are those of another adapter"
_BASE = "the saved weights were learned on top of the other ones"
_STATE = "the saved optimizer's state is of another kind"
_DTYPES = "the saved weights and the optimizer's state were rounded otherwise"

IDENTITY: Mapping[str, str] = MappingProxyType({
    "model_type": "another stage, or another kind of weights, is trained",
    "pretrained_model_name_or_path": _BASE,
    "revision": _BASE,
    "variant": _BASE,
    "single_file_config": _BASE,
    "lora_rank": _SHAPES,
    "lora_rank_pattern": _SHAPES,
    "lora_alpha": "the saved weights were learned at that scale",
    "lora_targets": _SHAPES,
    "use_dora": _SHAPES,
    "use_rslora": "the saved weights were learned at that scale",
    "train_text_encoder": _SHAPES,
    "text_encoder_lora_rank": _SHAPES,
    "text_encoder_lora_alpha": "the saved weights were learned at that scale",
    "base_model_precision": "the saved weights were learned on top of the base as it was rounded then",
    "use_bitfit": _SHAPES,
    "controlnet": _SHAPES,
    "optimizer": _STATE,
    "mixed_precision": _DTYPES,
    "pure_bf16": _DTYPES,
    "train_variance": "the model would have to be sampled otherwise from there on",
    "rescale_betas_zero_snr": "the model would have to be sampled otherwise from there on",
    "seed": "the order of each epoch hangs on it, so that images would come twice, and others never",
})
"""Options that a run cannot change when it goes on from a checkpoint, each with the reason."""

UNTOLD = frozenset({"output_dir", "resume_from_checkpoint", "dry_run"})
"""Options of which a run that goes on need not say that they changed."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of frozen and of trained weights, and the word for the autocast around the forward pass."""

    frozen: torch.dtype
    trained: torch.dtype
    autocast: str


def precision_of(training: TrainingOptions) -> Precision:
    """`pure_bf16` keeps everything in bfloat16; `mixed_precision` alone keeps what is trained in float32."""
    if training.mixed_precision == "no":
        return Precision(torch.float32, torch.float32, "no")
    if training.pure_bf16:
        return Precision(torch.bfloat16, torch.bfloat16, "no")
    if training.mixed_precision == "fp16":
        return Precision(torch.float16, torch.float32, "fp16")
    return Precision(torch.bfloat16, torch.float32, "bf16")


def loaded_dtype(adapter: Adapter, precision: Precision) -> torch.dtype:
    """What the UNet's weights are loaded in, before the adapter is attached."""
    return precision.trained if isinstance(adapter, Full) else precision.frozen


def with_usable_attention(config: Config) -> Config:
    """The config itself; where its xformers cannot be used here, with PyTorch's own attention, which is said."""
    half = torch.float16 if config.training.mixed_precision == "fp16" else torch.bfloat16
    problem = xformers_problem(half) if config.training.attention_mechanism == "xformers" else None
    if problem is None:
        return config
    label = ROWS["attention_mechanism"].label
    print(f"{label}: xformers is not usable here ({problem}); PyTorch's SDPA is used instead, at no more memory.")
    return config.model_copy(update={"training": config.training.model_copy(update={"attention_mechanism": "sdpa"})})


def xformers_problem(half: torch.dtype) -> str | None:
    """Why xformers cannot train here, in float32 and a dtype of two bytes, in a line; None if it can.

    A build for another GPU or another PyTorch can be imported, and fails in its first kernel; some have only the
    forward one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from xformers.ops import memory_efficient_attention

        for dtype in (torch.float32, half):
            x = torch.zeros(1, 2, 40, device=device, dtype=dtype, requires_grad=True)
            memory_efficient_attention(x, x, x).sum().backward()
    except Exception as error:  # whatever it is, there is another attention
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if device == "cuda" else "it needs an NVIDIA GPU"


def create_accelerator(config: Config) -> Accelerator:
    """accelerate's part of a run, with its tracker writing below `output_dir/logs`."""
    training, run = config.training, config.run
    autocast = precision_of(training).autocast
    torch.backends.cuda.matmul.allow_tf32 = training.allow_tf32
    torch.backends.cudnn.allow_tf32 = training.allow_tf32
    return Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision="no" if autocast == "fp16" else autocast,  # fp16 is the run's own: see `Run.scaler`
        # Gradients are summed where they lie, without a second copy of them.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=None if run.report_to == "none" else run.report_to,
        project_config=ProjectConfiguration(str(run.output_dir), str(run.output_dir / "logs")),
    )


def start_tracker(accelerator: Accelerator, config: Config, options: Mapping[str, Any]) -> None:
    """Open the tracker; the options go with it as plain values, where it shows them."""
    project, name = config.run.tracker_project_name, config.run.tracker_run_name
    if config.run.report_to == "tensorboard":
        # TensorBoard knows runs by their folders, and would make a second one of the options, which run.json has.
        _leave_full_disks_to_the_run()
        accelerator.init_trackers(f"{project}/{name}" if name else project)
        return
    values = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in options.items()}
    accelerator.init_trackers(project, values, {"wandb": {"name": name or config.run.output_dir.name}})


def _leave_full_disks_to_the_run() -> None:
    """Keep TensorBoard's thread from printing a traceback: the run hears of a full disk, and tells it in words."""
    told = threading.excepthook

    def tell(error: threading.ExceptHookArgs) -> None:
        if not is_full(error.exc_value):
            told(error)

    threading.excepthook = tell


def adapter_of(config: Config) -> Adapter:
    """What MODEL_TYPE, and the options that narrow it, say is trained."""
    if config.training.controlnet:
        return ControlNet()
    if config.training.use_bitfit:
        return BitFit(config.model.variant)
    if config.training_kind == "full":
        return Full(config.model.variant)
    lora = config.lora
    alpha = lora.lora_alpha if lora.lora_alpha is not None else lora.lora_rank
    return LoRA(
        lora.lora_rank,
        alpha,
        lora.lora_dropout,
        lora.lora_targets,
        lora.use_dora,
        lora.use_rslora,
        lora.ranks,
        (lora.text_encoder_lora_rank or lora.lora_rank) if lora.train_text_encoder else None,
        lora.text_encoder_lora_alpha,
        None if lora.base_model_precision == "no_change" else lora.base_model_precision,
    )


class Ending(NamedTuple):
    """When a run ends: after so many optimizer steps, as these options say."""

    steps: int
    options: tuple[str, ...]


class Since(NamedTuple):
    """From where on a run has its batch size and its accumulation: from its start, unless they were changed.

    `batch` counts the batches of the epoch's images that were not `dealt` before in batches of other sizes.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    dealt: tuple[Dealt, ...] = ()

    def state(self) -> tuple[int, int, int, tuple[tuple[int, int], ...]]:
        """What a checkpoint keeps of it, as `since` reads it."""
        return self.step, self.epoch, self.batch, tuple(map(tuple, self.dealt))


def since(saved: Mapping[str, Any], training: TrainingOptions, processes: int = 1) -> Since:
    """The same for a run that goes on from a checkpoint's state, with these options, in so many processes."""
    step, epoch, batch, dealt = saved["since"]
    before = Since(step, epoch, batch, tuple(Dealt(*part) for part in dealt))
    was, run = saved["options"], saved["run"]
    former_size = was["train_batch_size"] * saved["processes"]
    same_size = former_size == training.train_batch_size * processes
    if same_size and was["gradient_accumulation_steps"] == training.gradient_accumulation_steps:
        return before
    epoch, batch = run["position"]
    dealt = before.dealt if before.epoch == epoch else ()
    if same_size:
        return Since(run["step"], epoch, batch, dealt)
    return Since(run["step"], epoch, 0, (*dealt, Dealt(former_size, batch)) if batch else dealt)


def ending(training: TrainingOptions, batches_in: Callable[[int], int], since: Since = Since()) -> Ending:
    """By steps or by epochs, whichever ends first where both are set.

    Args:
        batches_in: how many an epoch has, by its number.
    """
    whole = batches_in(since.epoch + 1 if since.dealt else since.epoch)
    left = batches_in(since.epoch) - since.batch + (training.num_train_epochs - since.epoch - 1) * whole
    by_epochs = since.step + max(0, math.ceil(left / training.gradient_accumulation_steps))
    by_epochs = by_epochs if training.num_train_epochs else 0
    limits = {"max_train_steps": training.max_train_steps, "num_train_epochs": by_epochs}
    steps = min(limit for limit in limits.values() if limit)
    return Ending(steps, tuple(option for option, limit in limits.items() if limit == steps))


def loss_settings(loss: LossOptions) -> LossSettings:
    bias = TimestepBias(
        loss.timestep_bias_strategy,
        loss.timestep_bias_multiplier,
        loss.timestep_bias_portion,
        loss.timestep_bias_begin,
        loss.timestep_bias_end,
    )
    return LossSettings(
        trains_variance=loss.train_variance,
        snr_gamma=loss.snr_gamma,
        soft_min_snr=loss.soft_min_snr,
        noise_offset=loss.noise_offset,
        zero_terminal_snr=loss.rescale_betas_zero_snr,
        timestep_bias=bias,
    )


def learning_rate_of(optimizer: OptimizerOptions, steps: int) -> LearningRate:
    return LearningRate(
        schedule=optimizer.lr_scheduler,
        highest=optimizer.learning_rate,
        end=optimizer.lr_end,
        warmup_steps=optimizer.lr_warmup_steps,
        total_steps=steps,
        power=optimizer.lr_power,
        cycles=optimizer.lr_num_cycles,
    )


def _trained(denoiser: Denoiser, config: Config) -> Trained:
    """What the optimizer trains: with a text encoder in two groups, each with its own rate."""
    unet, *texts = parameter_groups(denoiser)
    if not texts:
        return unet
    highest, own = config.optimizer.learning_rate, config.lora.text_encoder_learning_rate
    return [{"params": unet}, {"params": texts[0], RATE_FACTOR: (own or highest) / highest}]


def create_run(
    config: Config,
    spec: Spec,
    folder: Path,
    adapter: Adapter,
    accelerator: Accelerator,
    steps: int,
    processes: Processes = Processes(),
) -> Run:
    """Load the UNet, attach what is trained, and make the optimizer: a run at step 0.

    Beside the UNet stands the text encoder where that is trained too.

    Args:
        config: from `with_usable_attention`.
        steps: optimizer steps of the whole run.
    """
    training, precision = config.training, precision_of(config.training)
    torch.manual_seed(training.seed)  # the adapter's first values
    dtype = loaded_dtype(adapter, precision)
    loss, with_text_encoder = loss_settings(config.loss), config.lora.train_text_encoder
    parts = loading.load(spec, folder, dtype, config.model.variant, loss, with_text_encoder)
    adapter.attach(parts.denoiser, precision.trained)
    for net in parts.denoiser.nets:
        if training.gradient_checkpointing:
            checkpoint_everything(net)
        if training.attention_mechanism == "xformers":
            net.enable_xformers_memory_efficient_attention()
    if training.gradient_checkpointing and with_text_encoder:
        checkpoint_text_encoder(parts.denoiser.text_encoder)
    parts = parts.to(accelerator.device)
    options = config.optimizer
    adam = AdamSettings(options.adam_beta1, options.adam_beta2, options.adam_epsilon, options.adam_weight_decay)
    optimizer = OPTIMIZERS[options.optimizer](_trained(parts.denoiser, config), options.learning_rate, adam)
    released = Released(optimizer) if options.optimizer_release_gradients else None
    denoiser, optimizer = accelerator.prepare(parts.denoiser, optimizer)
    if processes.rank:
        torch.manual_seed(training.seed + processes.rank)  # dropout of its own; all else that is drawn is the same
    return Run(
        accelerator=accelerator,
        parts=parts,
        denoiser=denoiser,
        optimizer=optimizer,
        learning_rate=learning_rate_of(options, steps),
        released=released,
        max_grad_norm=training.max_grad_norm,
        max_nonfinite_steps=training.max_nonfinite_steps,
        generator=torch.Generator(accelerator.device).manual_seed(training.seed),
        scaler=GradScaler(accelerator.device.type, enabled=precision.autocast == "fp16"),
        processes=processes,
        ema=EMA(trainable_parameters(parts.denoiser), options.ema_decay) if options.use_ema else None,
    )
