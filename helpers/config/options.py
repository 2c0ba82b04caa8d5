"""The one table of options. Each is stated here once: its name is its flag and its config.json key.

Everything else that knows the options is derived from this table: the parser, the mapping from exports to flags that
train.sh uses, the checks, OPTIONS.md and the JSON Schema.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.fields import FieldInfo

from helpers.config.families import FLAVOURS, MODEL_TYPES, Family, local_or_hub
from helpers.config.paths import from_root
from helpers.files import CONTROLS
from helpers.sizes import Size, parse_sizes

SWITCH_WORDS: Mapping[str, bool] = MappingProxyType({
    "true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False,
})


def parse_switch(value: object) -> bool:
    """true/false, 1/0, yes/no, on/off in any case. Raises ValueError for anything else."""
    word = str(value).strip().lower()
    if word not in SWITCH_WORDS:
        raise ValueError("needs true or false")
    return SWITCH_WORDS[word]


def _not_a_switch(value: object) -> object:
    if isinstance(value, bool):  # JSON's true would pass for the number 1
        raise ValueError("true and false are not numbers")
    return value


def _within_reach(value: float) -> float:
    if abs(value) > LARGEST:
        raise ValueError(f"needs a number up to {LARGEST}")
    return value


def _plain_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("needs text in UTF-8") from None
    if "\0" in value:
        raise ValueError("needs text without NUL")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"needs text of at most {LONGEST_TEXT:,} letters")
    return value


def folder_name(value: str) -> str:
    """A text that can name a folder of ours and stand in a line of the log. Raises ValueError, in words."""
    if value in (".", "..") or "/" in value or "\\" in value or CONTROLS.search(value):
        raise ValueError("needs a name for a folder: letters, no slashes, no line breaks")
    if len(value.encode()) > LONGEST_FOLDER:
        raise ValueError(f"needs a name for a folder of at most {LONGEST_FOLDER} bytes")
    return value


def _possible_path(value: str) -> str:
    from_root(value)  # any name of a model may be a folder
    return value


def _folder_or_hub(value: str) -> str:
    return local_or_hub(_possible_path(value))


def _whole_if_integral(value: float) -> float:
    """64.0 becomes 64, so that sizes computed from it are whole numbers and print as such."""
    return int(value) if float(value).is_integer() else value


def _to_sizes(value: object) -> tuple[Size, ...]:
    entries = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(entry, bool) for entry in entries):
        raise ValueError("needs sizes like 64 or 96x64")
    return parse_sizes(",".join(str(entry) for entry in entries))


def _to_ranks(value: object) -> str:
    """Ranks by layer as "add_k_proj=64,add_v_proj=64", from such a text or from an object."""
    entries = value.items() if isinstance(value, dict) else (pair.split("=") for pair in str(value).split(","))
    pairs = [tuple(str(part).strip() for part in entry) for entry in entries]
    if any(len(pair) != 2 or re.fullmatch("[1-9][0-9]*", pair[1]) is None for pair in pairs):
        raise ValueError("needs layers with their ranks, such as add_k_proj=64,add_v_proj=64")
    twice = [layer for layer, count in Counter(layer for layer, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"needs each layer once: {', '.join(twice)} is there several times")
    return ",".join("=".join(pair) for pair in pairs)


def _resume_name(value: str) -> str:
    if value not in ("latest", "none") and not (value.startswith("checkpoint-") and value[11:].isdigit()):
        raise ValueError("needs latest, none, or the name of a checkpoint such as checkpoint-500")
    return value


def _hub_name(value: str) -> str:
    """A repository's name as the hub takes it, with or without its owner."""
    parts = value.split("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", part) for part in parts)
    if not plain or len(parts) > 2 or len(value) > LONGEST_HUB_NAME or re.search(r"--|\.\.|\.git$", value):
        words = "letters, digits, _, and between them single - and ."
        raise ValueError(f"needs a name for a repository, or owner/name, of at most {LONGEST_HUB_NAME} {words}")
    return value


LONGEST_HUB_NAME = 96

LARGEST = 2**63 - 1
"""The largest number that any option takes: PyTorch's seeds and Python's own counts end there."""

LONGEST_TEXT = 20_000
"""Letters of a prompt; models read the first 77 tokens of it."""

LONGEST_FOLDER = 120
"""Bytes of a name that a folder has: file systems allow 255, and some of ours go into a longer name."""

Switch = Annotated[bool, BeforeValidator(parse_switch)]
Text = Annotated[str, AfterValidator(_plain_text)]
FolderName = Annotated[Text, AfterValidator(folder_name)]
HubName = Annotated[Text, AfterValidator(_hub_name)]
ModelName = Annotated[Text, AfterValidator(_possible_path)]
FolderOrHub = Annotated[Text, AfterValidator(_folder_or_hub)]
Whole = Annotated[int, BeforeValidator(_not_a_switch), AfterValidator(_within_reach)]
Real = Annotated[float, BeforeValidator(_not_a_switch), Field(allow_inf_nan=False), AfterValidator(_within_reach)]
Extent = Annotated[Real, AfterValidator(_whole_if_integral)]
"""Pixels of an edge, or megapixels: whole numbers stay whole."""
FromRoot = Annotated[Path, AfterValidator(from_root)]
"""A path; a relative one counts from the project's root."""
Sizes = Annotated[
    tuple[Size, ...], BeforeValidator(_to_sizes),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"},
                              {"type": "array", "items": {"type": ["string", "integer"]}}]}),
]
Ranks = Annotated[
    str, BeforeValidator(_to_ranks),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": {"type": "integer"}}]}),
]
Resume = Annotated[Text, AfterValidator(_resume_name)]
ResolutionType = Literal["pixel", "area"]
TEXT_ENCODER_OPTIONS = ("text_encoder_lora_rank", "text_encoder_lora_alpha", "text_encoder_learning_rate")
"""Options of an adapter of the text encoder, which train_text_encoder asks for."""
OTHER_PRECISIONS: Mapping[str, str] = MappingProxyType({
    **dict.fromkeys(
        ("int8-quanto", "int8-torchao", "fp8-quanto", "fp8uz-quanto", "fp8-torchao"),
        "weights of 8 bits are kept as int8 here, without a package for it: type int8"),
    **dict.fromkeys(
        ("nf4-bnb", "fp4-bnb", "int4-quanto", "int4-torchao", "int2-quanto"),
        "weights of 4 bits are kept as nf4 here, without a package for it: type nf4"),
})
"""What other trainers' files have for base_model_precision, with the nearest of ours."""
DownsampleMethod = Literal["stepwise", "single"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt"]


def option(
    default: Any = None,
    *,
    help: str,
    export: str | tuple[str, ...] = (),
    switches: Mapping[str, str] | None = None,
    unit: str = "",
    by_family: bool = False,
    default_words: str = "",
    refused: Mapping[str, str] | None = None,
    bare: str = "",
    **limits: float,
) -> Any:
    """State one option.

    Args:
        export: its name or names in the env file; without one, its own name in capitals.
        switches: further exports that are switches, with the value that each stands for when it is on.
        by_family: the default is the attribute of the same name of the family's row.
        default_words: the default in words, where it follows from other options (`load.py` fills it in).
        refused: values that users are known to try, with what to do instead.
        bare: the value that its flag alone stands for.
        limits: pydantic's ge, gt, le, lt.
    """
    facts = {
        "exports": [export] if isinstance(export, str) else list(export),
        "switches": dict(switches or {}),
        "unit": unit,
        "by_family": by_family,
        "default_words": default_words,
        "refused": dict(refused or {}),
        "bare": bare,
    }
    return Field(
        default, description=help, validate_default=default is not None, json_schema_extra={"option": facts}, **limits
    )


class Group(BaseModel):
    """One group of options; frozen, and closed to names that it does not state."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelOptions(Group):
    model_type: Text | None = option(
        help=f"What to train: {', '.join(MODEL_TYPES)}; or lora or full, beside model_family.",
        default_words="lora, where model_family is set")
    model_family: Text | None = option(
        help="The family of models (deepfloyd, sd, sd1x, sd2x), the other way to say the model type.",
        default_words="by model_type")
    model_flavour: Text | None = option(
        help=f"Which of the family's models: {', '.join(FLAVOURS)}.",
        default_words="i-medium-400m, ii-medium-450m, iii-x4, or 2.1")
    pretrained_model_name_or_path: ModelName | None = option(
        export="MODEL_NAME", help="The weights: a hub id, or a local folder in the diffusers layout.",
        default_words="the flavour's hub id")
    revision: Text | None = option(export="MODEL_REVISION", help="Branch, tag or commit of the hub's repository.")
    variant: FolderName | None = option(export="MODEL_VARIANT", help="Variant of the weight files, such as fp16.")
    single_file_config: FolderOrHub | None = option(
        export="MODEL_CONFIG", default_words="a hub id that fits the file",
        help="Of a model in one .safetensors file: the pipeline, a hub id or a local folder in the diffusers layout,"
             " whose small files (configurations, tokenizer) it is read with.")


class DataOptions(Group):
    data_backend_config: FromRoot = option(
        export="DATALOADER_CONFIG", by_family=True, help="The dataloader JSON: the datasets and their caches.")
    cache_dir: FromRoot = option("cache", help="Where caches go that the dataloader JSON gives no folder.")
    resolution: Extent = option(
        by_family=True, gt=0, unit="px or MP", help="Training size: an edge in pixels, or megapixels.")
    resolution_type: ResolutionType = option(
        "pixel", help="pixel: resolution is the edge of a square, or the shorter edge; area: it is megapixels.")
    minimum_image_size: Extent | None = option(
        export=("MINIMUM_RESOLUTION", "MINIMUM_IMAGE_SIZE"), gt=0, unit="px or MP",
        help="Images below it are left out and listed.")
    maximum_image_size: Extent | None = option(
        gt=0, unit="px or MP", help="Images above it are first resized to target_downsample_size, then cropped.")
    target_downsample_size: Extent | None = option(
        gt=0, unit="px or MP", help="The size that images above maximum_image_size are resized to before the crop.")
    aspect_bucket_rounding: Whole = option(
        2, ge=1, le=9, unit="digits", help="Digits that aspect ratios are rounded to before bucketing.")
    downsample_method: DownsampleMethod = option(
        "stepwise", help="stepwise: by 25 % at a time; single: one antialiased resize.")
    caption_strategy: CaptionStrategy = option(
        "filename", help="Where captions come from, for datasets that do not say it themselves.",
        refused={"parquet": "captions from parquet files are not read: write them to .txt files and type textfile"})
    instance_prompt: Text | None = option(help="The prompt of caption_strategy instanceprompt, and the one prepended.")
    caption_dropout_probability: Real = option(
        0.1, ge=0, le=1, help="Share of captions replaced by the empty prompt, which guidance needs.")
    vae_batch_size: Whole = option(
        4, ge=1, unit="images", help="Stable Diffusion, stage III: images that are encoded by the VAE at a time.")
    text_encoder_batch_size: Whole | None = option(
        ge=1, unit="captions", default_words="8; on a GPU as many as fit, up to 64",
        help="Captions that are encoded at a time.")
    text_encoder_device: Literal["auto", "cpu"] = option(
        "auto", help="Where captions are encoded: auto is the training device.")
    text_embeds_storage: Literal["bf16", "int8"] = option(
        "bf16", help="How text embeds are cached: bf16 is exact; int8 takes half of the disk, and is 0.6 % off.")


class TrainingOptions(Group):
    train_batch_size: Whole = option(4, ge=1, unit="images", help="Images in a batch of one device.")
    gradient_accumulation_steps: Whole = option(1, ge=1, unit="batches", help="Batches that make one step.")
    max_train_steps: Whole = option(
        0, export="MAX_NUM_STEPS", ge=0, unit="steps", help="Stop after so many steps; 0: by epochs only.")
    num_train_epochs: Whole = option(
        export="NUM_EPOCHS", ge=0, unit="epochs", default_words="25, or 0 where max_train_steps is set",
        help="Stop after so many epochs; 0: by steps only. With both, whichever comes first.")
    max_grad_norm: Real = option(1.0, ge=0, help="Gradients are clipped to this norm; 0: never.")
    max_nonfinite_steps: Whole = option(
        5, ge=0, unit="steps",
        help="Steps in a row that are skipped where loss or gradient is NaN or infinite; one more ends the run.")
    gradient_checkpointing: Switch = option(
        False, export="USE_GRADIENT_CHECKPOINTING", help="Compute activations twice: a third slower, a fifth of their memory.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "bf16", help="Precision of the computation; fp16: Stable Diffusion or stage III on GPUs before Ampere.")
    pure_bf16: Switch = option(False, help="Keep the trained weights and the optimizer's state in bf16 too.")
    use_bitfit: Switch = option(False, help="BitFit, for full model types: only the biases are trained.")
    controlnet: Switch = option(
        False, help="For full model types of Stable Diffusion: a ControlNet is trained, and the UNet stays as it is.")
    attention_mechanism: Literal["sdpa", "xformers"] = option(
        "sdpa", switches={"USE_XFORMERS": "xformers"},
        help="Attention kernels; sdpa is used where xformers is not at hand, and needs no more memory.")
    seed: Whole = option(42, export="TRAINING_SEED", ge=0, help="Seed of everything that training draws.")
    allow_tf32: Switch = option(True, help="Let CUDA round fp32 matrix products to TF32.")


class LossOptions(Group):
    train_variance: Switch = option(
        True, help="Train the learned variance too; without it, inference needs variance_type fixed_small.")
    snr_gamma: Real = option(
        0.0, export="MIN_SNR_GAMMA", ge=0,
        help="Min-SNR weighting: the smaller, the less the nearly clear timesteps count; 0: all count the same.")
    soft_min_snr: Switch = option(False, export="USE_SOFT_MIN_SNR", help="Min-SNR weighting without its corner.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        default_words="as the weights say", help="What the UNet predicts; another than the weights say is refused.")
    rescale_betas_zero_snr: Switch = option(
        False, help="Zero terminal SNR: the last timestep becomes noise alone; for weights that predict v.")
    noise_offset: Real = option(
        0.0, ge=0, le=1, help="Offset noise: how much the brightness of whole images is noised too, such as 0.05.")
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option(
        "none", help="Timesteps that come up more often: the nearly clear ones (earlier), the noisy ones, or a range.")
    timestep_bias_multiplier: Real = option(
        2.0, gt=0, le=1000, help="How much more often they come up; below 1: less often.")
    timestep_bias_portion: Real = option(0.25, gt=0, le=1, help="The part of the timesteps that earlier and later mean.")
    timestep_bias_begin: Whole = option(0, ge=0, le=999, help="The first timestep of the range.")
    timestep_bias_end: Whole = option(1000, ge=1, le=1000, help="The timestep after the range's last one.")


class LoraOptions(Group):
    lora_rank: Whole = option(32, ge=1, help="Rank of the adapter's matrices.")
    lora_rank_pattern: Ranks | None = option(
        help="Other ranks for some of the layers, such as add_k_proj=64,add_v_proj=64 for text keys and values.")
    lora_alpha: Real | None = option(gt=0, default_words="lora_rank", help="The adapter is scaled by alpha / rank.")
    lora_dropout: Real = option(0.0, ge=0, lt=1, help="Dropout on the adapter's input.")
    lora_targets: Literal["attention", "attention+conv"] = option(
        "attention", help="The layers that get an adapter.")
    use_dora: Switch = option(
        False, help="DoRA, for lora model types: the magnitude of each weight is learned apart from its direction.")
    use_rslora: Switch = option(
        False, help="rsLoRA, for lora model types: the adapter is scaled by alpha / sqrt(rank), for high ranks.")
    base_model_precision: Literal["no_change", "int8", "nf4"] = option(
        "no_change", refused=OTHER_PRECISIONS,
        help="For lora model types: what the UNet's frozen weights are kept in, to save memory: int8; nf4, 4 bits, only"
        " where int8 has no room, as a LoRA learns less exactly from it; no_change: as mixed_precision says.")
    train_text_encoder: Switch = option(
        False, export=("TRAIN_TEXT_ENCODER", "TEXT_ENCODER_TRAINING"),
        help="Stable Diffusion, model type lora: train an adapter of CLIP, the text encoder, too, of the same kind.")
    text_encoder_lora_rank: Whole | None = option(
        ge=1, default_words="lora_rank", help="Rank of the text encoder's adapter.")
    text_encoder_lora_alpha: Real | None = option(
        gt=0, default_words="scaled as lora_alpha / lora_rank says",
        help="The text encoder's adapter is scaled by alpha / rank.")
    text_encoder_learning_rate: Real | None = option(
        gt=0, default_words="learning_rate",
        help="The highest learning rate of the text encoder's adapter, on the same schedule; not with prodigy.")

    @property
    def ranks(self) -> dict[str, int]:
        """`lora_rank_pattern` as {layer: rank}."""
        pairs = (pair.split("=") for pair in self.lora_rank_pattern.split(",")) if self.lora_rank_pattern else ()
        return {layer: int(rank) for layer, rank in pairs}


class OptimizerOptions(Group):
    optimizer: Literal[
        "adamw", "adamw_bf16", "adamw8bit", "ao_adamw8bit", "adafactor", "lion", "prodigy"
    ] = option(
        default_words="adamw_bf16 with pure_bf16, else adamw",
        help="adamw; adamw_bf16: for pure_bf16; adamw8bit, ao_adamw8bit (torchao's): a state of 8 bits; adafactor: "
        "the smallest state; lion: needs a learning_rate 3 to 10 times smaller; prodigy: finds the rate itself.")
    learning_rate: Real | None = option(
        gt=0, default_words="4e-5; 1e-5 with lion, 1 with prodigy",
        help="The highest learning rate; with prodigy a factor of the rate that it finds.")
    lr_end: Real = option(
        0.0, export="LEARNING_RATE_END", ge=0,
        help="The learning rate at the end of a decay, or at the bottom of each valley.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
    ] = option("cosine", export="LR_SCHEDULE", help="How the learning rate goes from learning_rate to lr_end.")
    lr_warmup_steps: Whole = option(0, ge=0, unit="steps", help="Steps in which the learning rate rises from 0.")
    lr_power: Real = option(1.0, gt=0, help="Power of the polynomial schedule.")
    lr_num_cycles: Real = option(
        1.0, gt=0, unit="cycles",
        help="Over the whole run: waves of sine, valleys of cosine, decays of cosine_with_restarts.")
    adam_beta1: Real = option(0.9, ge=0, lt=1, help="Decay of the mean of gradients; not with adafactor.")
    adam_beta2: Real | None = option(
        ge=0, lt=1, default_words="0.999; 0.99 with lion",
        help="Decay of the mean of squared gradients, with lion of its slower mean of gradients; not with adafactor.")
    adam_epsilon: Real = option(1e-8, gt=0, help="Added to the denominator; not with adafactor or lion.")
    adam_weight_decay: Real = option(0.01, ge=0, help="Decoupled weight decay; lion usually takes a larger one.")
    optimizer_release_gradients: Switch = option(
        False, help="For full model types, with max_grad_norm 0: update weights in the backward pass, as soon as their "
        "gradients are there, and free these. The same result, in less memory where gradients weigh more than "
        "activations; but weights that were updated before a gradient that is NaN or infinite came stay so.")
    use_ema: Switch = option(
        False, help="Average the trained weights over the steps, for validation images and the result.")
    ema_decay: Real = option(
        0.999, gt=0, lt=1, help="Share of the average that each step keeps, once there were enough steps to average.")


class ValidationOptions(Group):
    validation_prompt: Text | None = option(help="What to draw at each validation; unset: see the prompt library.")
    validation_prompt_library: FromRoot | None = option(
        export="USER_PROMPT_LIBRARY", help="A JSON file {name: prompt} of further prompts to draw.")
    validation_negative_prompt: Text = option("", help="What to avoid in validation images.")
    validation_resolution: Sizes | None = option(
        default_words="resolution, where that is in pixels, else what the model was trained at", unit="px",
        help="Sizes of validation images: 64, 96x64, or several: 64,96,64x96,96x64.")
    validation_steps: Whole = option(
        250, ge=0, unit="steps", help="Steps between validations; 0: only before the first step and after the last.")
    validation_num_inference_steps: Whole = option(
        25, ge=1, le=1000, unit="steps", help="Denoising steps per image.")
    validation_guidance: Real = option(by_family=True, ge=1, help="Classifier-free guidance scale; 1: none.")
    validation_guidance_rescale: Real | None = option(
        ge=0, le=1, default_words="0; of Stable Diffusion with rescale_betas_zero_snr 0.7, but for ControlNets",
        help="How far the contrast that guidance adds is taken back; 0: not at all.")
    validation_noise_scheduler: Literal["ddpm", "ddim", "euler", "euler-a", "unipc", "dpm++"] = option(
        by_family=True, help="The scheduler that validation images are sampled with.")
    num_eval_images: Whole = option(
        by_family=True, ge=0, unit="images",
        help="Stages II and III: how many images of each dataset to upscale at each validation, always the same. With a"
             " ControlNet (then 4 by default): how many to draw from their conditioning images.")
    validation_noise_level: Whole = option(
        by_family=True, ge=0, le=999,
        help="Stages II and III: how much noise validation adds to the low-resolution image; stage III: up to 350.")
    validation_seed: Whole = option(42, ge=0, help="Seed of the validation images, the same at each validation.")


class RunOptions(Group):
    output_dir: FromRoot = option("output", help="Where results go.")
    export: Literal["diffusers", "kohya"] = option(
        "diffusers", export="EXPORT_FORMAT",
        help="kohya: besides the result of a lora model type, a file that ComfyUI and A1111 read.")
    checkpointing_steps: Whole = option(500, ge=0, unit="steps", help="Steps between checkpoints; 0: at the end only.")
    checkpoints_total_limit: Whole = option(
        3, export="CHECKPOINTING_LIMIT", ge=0, help="Checkpoints to keep, the newest ones; 0: all.")
    resume_from_checkpoint: Resume = option(
        "latest", export="RESUME_CHECKPOINT",
        help="latest (from the start where there is none), none, or a name like checkpoint-500.")
    report_to: Literal["tensorboard", "wandb", "none"] = option("tensorboard", help="Where the curves go.")
    tracker_project_name: FolderName = option("floydtuner", help="The tracker's project.")
    tracker_run_name: FolderName | None = option(
        default_words="output_dir's name", help="The tracker's name for this run.")
    push_to_hub: Switch = option(
        False, help="Upload the result, its model card and sample images to the Hugging Face hub at the end.")
    hub_model_id: HubName | None = option(
        export="HUB_MODEL_NAME", default_words="tracker_run_name, or output_dir's name",
        help="The repository to upload to: a name, or owner/name.")
    hub_private: Switch = option(True, help="Upload to a private repository only; false: one that all can see.")
    push_checkpoints_to_hub: Switch = option(
        False, export="PUSH_CHECKPOINTS",
        help="With push_to_hub: upload the weights of each checkpoint too, while training goes on.")
    dry_run: Switch = option(False, help="Print the options, the plan of the data, the memory and the disk space needed, then stop.")
    check: Literal["none", "table", "json"] = option(
        "none", export="CHECK_DATA", bare="table",
        help="Look at every image and caption, print what is wrong with them, then stop; `--check` alone: as a table.")
    strict: Switch = option(
        False, export="CHECK_STRICT", help="With check: exit with code 6 where anything was found.")


class DoorOptions(Group):
    """Says where options come from; not part of `Config`, so that every way in ends in the same one."""

    config: FromRoot | None = option(export="CONFIG_FILE", help="A JSON file of options by their flags' names.")


class LaunchOptions(Group):
    """What train.sh itself reads. These are exports only: they say how the trainer is started, not what it does."""

    env_file: str = option("sd2x-env.sh", help="The env file to read: `ENV_FILE=my-env.sh ./train.sh`.")
    num_processes: Whole = option(
        1, export="TRAINING_NUM_PROCESSES", ge=1, help="Processes to train with, one for each GPU; each trains TRAIN_BATCH_SIZE images at a time.")
    num_machines: Whole = option(
        1, export="TRAINING_NUM_MACHINES", ge=1, help="Machines to train with: 1.")
    dynamo_backend: str = option(
        "no", export="TRAINING_DYNAMO_BACKEND",
        help="Compile the model with this backend of torch.compile: inductor, for long runs on a GPU. The first step"
             " then takes two to three minutes, and the first of each image size some of that again.")
    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune"] = option(
        "default", export="TRAINING_DYNAMO_MODE",
        help="How it compiles: reduce-overhead records CUDA graphs, which are the fastest for small batches.")
    accelerate_args: str = option(
        "", export="ACCELERATE_EXTRA_ARGS", help="More words for `accelerate launch`, quoted as in a shell.")
    trainer_args: str = option(
        "", export="TRAINER_EXTRA_ARGS", help="More flags for the trainer, quoted as in a shell.")

    @property
    def compiles(self) -> bool:
        return self.dynamo_backend.lower() != "no"


class Config(BaseModel):
    """All options of one run, typed and checked. `helpers.config.load.load` makes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelOptions
    data: DataOptions
    training: TrainingOptions
    loss: LossOptions
    lora: LoraOptions
    optimizer: OptimizerOptions
    validation: ValidationOptions
    run: RunOptions

    @property
    def family(self) -> Family:
        return MODEL_TYPES[self.model.model_type][0]

    @property
    def training_kind(self) -> str:
        """ "lora" or "full"."""
        return MODEL_TYPES[self.model.model_type][1]

    @property
    def shows_eval_images(self) -> bool:
        """Whether validation makes something of the datasets' images, and not of prompts alone."""
        return self.family.upscales or self.training.controlnet

    @property
    def lora_type(self) -> str:
        """The model type that trains a LoRA of the same family."""
        return next(name for name, row in MODEL_TYPES.items() if row == (self.family, "lora"))


@dataclass(frozen=True)
class Row:
    """One option as the table states it."""

    group: str
    name: str
    exports: tuple[str, ...]
    switches: Mapping[str, str]
    field: FieldInfo
    unit: str
    by_family: bool
    default_words: str
    refused: Mapping[str, str]
    bare: str

    @property
    def all_exports(self) -> tuple[str, ...]:
        return (*self.exports, *self.switches)

    @property
    def label(self) -> str:
        """How messages name the option: its flag, its exports and its key."""
        if self.group == "launch":
            return f"export {self.exports[0]}"
        if not self.exports:
            return f"--{self.name}"
        return f'--{self.name} (export {" or ".join(self.all_exports)}, key "{self.name}")'

    @property
    def is_switch(self) -> bool:
        return self.field.annotation is bool


GROUPS: Mapping[str, type[Group]] = MappingProxyType({
    name: field.annotation for name, field in Config.model_fields.items()
})


def row_of(group: str, name: str, field: FieldInfo) -> Row:
    """The row of one option, by its field."""
    facts = field.json_schema_extra["option"]
    exports = tuple(facts["exports"]) or (name.upper(),)
    return Row(
        group, name, exports, MappingProxyType(facts["switches"]), field, facts["unit"], facts["by_family"],
        facts["default_words"], MappingProxyType(facts["refused"]), facts["bare"],
    )


ROWS: Mapping[str, Row] = MappingProxyType({
    name: row_of(group, name, field)
    for group, model in {**GROUPS, "door": DoorOptions}.items()
    for name, field in model.model_fields.items()
})
"""Every option that has a flag, by its name."""

LAUNCH_ROWS: Mapping[str, Row] = MappingProxyType({
    name: row_of("launch", name, field) for name, field in LaunchOptions.model_fields.items()
})
