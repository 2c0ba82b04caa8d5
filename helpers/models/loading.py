"""From a model's name to its parts, checked against the family's row before anything large is read."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from helpers.config.families import FAMILIES, MODEL_TYPES, Family
from helpers.config.jsonfile import MAX_BYTES, BadJson, load_json
from helpers.config.options import ROWS, LossOptions
from helpers.config.problems import found
from helpers.models.errors import OPTION, WeightsError, load_whole, unfit
from helpers.models.families import SPECS
from helpers.models.parts import LossSettings, Parts, put_together
from helpers.models.schedulers import SCHEDULER_CONFIG, ZERO_TERMINAL_SNR, prediction_type_of, schedule_of
from helpers.models.spaces import Latents
from helpers.models.spec import Spec

LARGEST_JSON = 100_000_000  # bytes; tokenizer.json with a vocabulary of 250,000 pieces has 17 MB
SMALLEST_WEIGHTS = 1024  # bytes; any real file of weights is larger, and git LFS's placeholders are smaller


def components(spec: Spec) -> tuple[str, ...]:
    """The folders of a pipeline that a family is trained with."""
    of_axes = (spec.space.component, spec.conditioning.scheduler)
    return ("unet", "scheduler", "text_encoder", "tokenizer", *(name for name in of_axes if name))


def _with_weights(spec: Spec, only: Collection[str] | None = None) -> dict[str, str]:
    """Of these the ones that have weights, with the stem of their files; `only` those, where they are named."""
    stems = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    stems |= {spec.space.component: "diffusion_pytorch_model"} if spec.space.component else {}
    return {name: stem for name, stem in stems.items() if only is None or name in only}


def fetch_configs(name: str, revision: str | None, spec: Spec) -> Path:
    """The folder with the model's configuration: the local one, or a snapshot that holds a few small files.

    Raises:
        WeightsError: there is neither such a folder nor such a model on the hub, or it cannot be had.
    """
    return _fetch(name, revision, _config_patterns(spec))


def fetch_weights(
    name: str, revision: str | None, variant: str | None, spec: Spec, only: Collection[str] | None = None
) -> Path:
    """The folder with the model's weights, downloaded where `name` is not a local folder.

    Args:
        variant: the variant of the files to take ("fp16"), or None for the plain ones.
        only: the components whose weights are needed; None: all.
    """
    return _fetch(name, revision, *file_patterns(variant, spec, only))


def fetch_any_configs(name: str) -> Path:
    """As `fetch_configs`, of a model of any family.

    Raises:
        WeightsError: see there.
    """
    return _fetch(name, None, sorted({pattern for spec in SPECS.values() for pattern in _config_patterns(spec)}))


def fetch_components(name: str, parts: Collection[str]) -> Path:
    """The folder of a model with these components, whichever they are, as far as it has them: as safetensors.

    Raises:
        WeightsError: see `fetch_configs`.
    """
    patterns = [f"{part}/*.{suffix}" for part in parts for suffix in ("json", "safetensors")]
    return _fetch(name, None, ["model_index.json", *patterns], ["*.fp16*"])


def at_hand(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a model, if that is a local folder or the hub's cache holds it; nothing is downloaded."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def file_patterns(
    variant: str | None, spec: Spec, only: Collection[str] | None = None
) -> tuple[list[str], list[str]]:
    """Which files of a hub repository to take and which not: its components, as safetensors, in one variant."""
    suffixes = [f".{variant}.safetensors", f".{variant}-*.safetensors"] if variant else [".safetensors"]
    weights = [f"{component}/*{suffix}" for component in _with_weights(spec, only) for suffix in suffixes]
    return [*_config_patterns(spec), *weights], [] if variant else ["*.fp16*", "*.non_ema*"]


def _config_patterns(spec: Spec) -> list[str]:
    files = [f"{component}/{'*' if component == 'tokenizer' else '*.json'}" for component in components(spec)]
    return ["model_index.json", *files]


def _fetch(name: str, revision: str | None, allow: list[str], ignore: list[str] | None = None) -> Path:
    if os.path.isdir(name):
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise WeightsError(f"{OPTION}: there is no folder {name!r}. Type an existing folder, or a model of the hub.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=allow, ignore_patterns=ignore))
    except RevisionNotFoundError as error:
        raise WeightsError(f"{ROWS['revision'].label}: {name} on the hub has no revision {revision!r}.") from error
    except HFValidationError as error:
        raise WeightsError(f"{OPTION}: {name!r} is neither a folder here nor a name that the hub allows.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(unreachable(name, error)) from error


def unreachable(name: str, error: Exception) -> str:
    """What to tell a user whose model cannot be had from the hub."""
    login = f"accept the licence at https://huggingface.co/{name} while logged in, then run `hf auth login` here once"
    if isinstance(error, GatedRepoError):
        reason = f"asks for its licence to be accepted: {login}."
    elif isinstance(error, RepositoryNotFoundError):
        reason = f"does not exist, or not for you: check its spelling; if it is private or gated, {login}."
    else:
        reason = f"cannot be reached: check the network; if it is gated, {login}."
    copies = (family.flavours[family.former_names[name]] for family in FAMILIES if name in family.former_names)
    moved = next((f" It was taken off the hub; a copy of it is {copy!r}." for copy in copies if copy != name), "")
    return (
        f"{OPTION}: {name!r} is not a folder here, and on the Hugging Face hub it {reason}{moved}"
        " Or download the model elsewhere and name its folder instead:"
        f' export MODEL_NAME="/path/to/{name.rsplit("/")[-1]}".'
    )


def family_of(folder: Path) -> Family | None:
    """The family of the pipeline in a folder, by its UNet; None for one that is of none.

    Raises:
        WeightsError: there is no UNet in it, or its configuration cannot be read.
    """
    unet = _json(folder / "unet" / "config.json")
    return next((family for family in FAMILIES if not _wrong_unet(SPECS[family.key], unet)), None)


def check(
    family: Family,
    spec: Spec,
    folder: Path,
    loss: LossOptions = LossOptions(),
    without: Collection[str] = (),
) -> None:
    """Compare the weights' configuration with the family that MODEL_TYPE names, and with what the options say of it.

    Args:
        without: components that are not needed.

    Raises:
        WeightsError: something is missing, or these are another family's or stage's weights.
    """
    needed = [name for name in components(spec) if name not in without]
    missing = [name for name in ("model_index.json", *needed) if not (folder / name).exists()]
    unet = None if "unet" in missing else _json(folder / "unet" / "config.json")
    wrong = unet is not None and _wrong_unet(spec, unet)
    if wrong:  # before what is missing: another stage's pipeline has other components, which is not what is wrong
        other = _other_family(unet)
        remedy = f"{other}, or name" if other else f"{wrong}. Name"
        raise WeightsError(
            f"{OPTION}: the weights in {folder} are not {family.name}: {remedy} weights of {family.name}, such as"
            f" {family.flavours[family.default_flavour]}."
        )
    if missing:
        raise WeightsError(f"{OPTION}: {folder} has no {', '.join(missing)}: it is not a {family.name} pipeline.")
    _require_readable(folder, needed)
    if not isinstance(unet.get("out_channels"), int):
        raise WeightsError(f"{OPTION}: {folder / 'unet' / 'config.json'} says no out_channels: it is damaged.")
    read = unet.get(spec.text.reader_key)
    texts = _json(folder / "text_encoder" / "config.json") if "text_encoder" in needed else {spec.text.width_key: read}
    width = texts.get(spec.text.width_key)
    if width != read:
        raise WeightsError(
            f"{OPTION}: in {folder} the text encoder gives {width} values a token, the UNet takes {read}. They are not"
            " of one model."
        )
    if spec.space.component:
        _check_vae(spec, folder)
    schedulers = [name for name in components(spec) if name.endswith("scheduler")]
    configs = {name: _json(folder / name / SCHEDULER_CONFIG) for name in schedulers}
    _check_prediction(family, folder, configs["scheduler"].get("prediction_type", "epsilon"), loss)
    levels, told = noise_levels(spec, folder), unet.get("num_class_embeds")
    if levels and told and levels > told:
        words = f"{folder} has {levels} noise levels, of which its UNet knows {told}: it is damaged"
        raise WeightsError(f"{OPTION}: {words}.")


def _check_vae(spec: Spec, folder: Path) -> None:
    """See that the VAE leads into the UNet's space, and says by how much latents are scaled."""
    vae = _json(folder / "vae" / "config.json")
    levels, scale = vae.get("block_out_channels"), vae.get("scaling_factor", 0.18215)
    factor = 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else None
    made, taken = (vae.get("latent_channels"), factor), (spec.space.channels, spec.space.factor)
    if made != taken or not isinstance(scale, (int, float)) or not scale > 0:
        raise WeightsError(
            f"{OPTION}: the VAE in {folder} makes {made[0]} channels, {made[1]} times smaller than the image, scaled by"
            f" {scale}; the UNet takes {taken[0]}, {taken[1]} times smaller. They are not of one model."
        )


def _check_prediction(family: Family, folder: Path, predicted: str, loss: LossOptions) -> None:
    """See that what the weights predict can be trained, and is what the options say."""
    if predicted not in family.predictions:
        offered = " or ".join(family.predictions)
        raise WeightsError(f"{OPTION}: {folder} predicts {predicted!r}; {family.name} is trained on {offered}.")
    if loss.prediction_type not in (None, predicted):
        raise WeightsError(
            f"{ROWS['prediction_type'].label}: found {loss.prediction_type!r}, but the weights in {folder} predict"
            f" {predicted!r}, as their scheduler says: remove it, or name other weights."
        )
    if loss.rescale_betas_zero_snr and predicted != "v_prediction":
        raise WeightsError(
            f"{ROWS['rescale_betas_zero_snr'].label}: found true, but the weights in {folder} predict {predicted!r}:"
            " where the last timestep is noise alone, the noise tells nothing of the image. Set it to false, or name weights"
            " that predict v, such as Stable Diffusion 2.1's."
        )


def _require_readable(folder: Path, names: Collection[str]) -> None:
    """See that all JSON that the libraries and the export will read is JSON, and loads nothing from elsewhere.

    The libraries read it late, the export at the very end, and end in tracebacks.
    """
    index = _json(folder / "model_index.json")
    for component in names:
        kind = index.get(component)
        is_listed = isinstance(kind, list) and all(isinstance(part, str) for part in kind)
        if component.endswith("scheduler") and not is_listed:
            listed = f"{folder / 'model_index.json'} does not list the component {component}"
            raise WeightsError(f"{OPTION}: {listed}, without which no pipeline can be written: it is damaged.")
        if not (folder / component).is_dir():
            raise WeightsError(f"{OPTION}: {folder / component} is not a folder, as diffusers' pipelines have it.")
        for path in sorted((folder / component).glob("*.json")):
            _json(path, LARGEST_JSON)
    adapter = folder / "text_encoder" / "adapter_config.json"
    if adapter.exists():  # transformers would load the base that it names, from wherever that is
        raise WeightsError(f"{OPTION}: {adapter} makes the text encoder an adapter of another one: merge it first.")


def noise_levels(spec: Spec, folder: Path) -> int | None:
    """How many levels of noise the low-resolution image of the pipeline in `folder` may have; None: a whole schedule's.

    Raises:
        WeightsError: the pipeline says what cannot be.
    """
    if spec.conditioning.levels is None:
        return None
    path = folder / "model_index.json"
    count = _json(path).get("max_noise_level", spec.conditioning.levels)
    if type(count) is not int or not 0 < count <= 1000:
        raise WeightsError(f"{OPTION}: {path} says max_noise_level {found(count)}, which is no number of 1..1000.")
    return count


def trained_edge(spec: Spec, folder: Path) -> int | None:
    """The edge in pixels of the images that the weights were made for, of models in latents."""
    edge = _json(folder / "unet" / "config.json").get("sample_size")
    return edge * spec.space.factor if isinstance(spec.space, Latents) and isinstance(edge, int) else None


def check_weight_files(
    folder: Path, variant: str | None, spec: Spec, only: Collection[str] | None = None
) -> None:
    """See that the weights themselves are there, in the variant that is asked for, and as safetensors.

    Args:
        only: the components to look at; None: all.

    Raises:
        WeightsError: a file is missing, or is the placeholder that git leaves where its large files were not fetched.
    """
    infix = f".{variant}" if variant else ""
    for stem in (f"{component}/{stem}" for component, stem in _with_weights(spec, only).items()):
        files = sorted(folder.glob(f"{stem}{infix}.safetensors")) + sorted(folder.glob(f"{stem}{infix}-*.safetensors"))
        if not files:
            other = ", ".join(sorted(path.name for path in (folder / stem).parent.iterdir() if path.suffix != ".json"))
            raise WeightsError(
                f"{OPTION}: {folder} has no {stem}{infix}.safetensors, it has {other or 'no weights'}. Set MODEL_VARIANT"
                " (--variant) to the variant that is there; weights in pickled files (.bin) must be converted first."
            )
        for path in files:
            require_safetensors(path)
        for index in sorted((folder / stem).parent.glob("*.index*.json")):
            _require_own_shards(index)


def require_safetensors(path: Path) -> None:
    """See that a file is what its name says, by its header: it may be cut short, or a pickle.

    Raises:
        WeightsError: it is not, or it is the placeholder that git leaves where its large files were not fetched.
    """
    if path.stat().st_size < SMALLEST_WEIGHTS and path.read_bytes().startswith(b"version https://git-lfs"):
        raise WeightsError(f"{OPTION}: {path} is a placeholder of git LFS: run `git lfs pull` in {path.parent}.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{OPTION}: {path} is no safetensors file, or it is damaged ({error}): download or convert it again."
        ) from error


def _require_own_shards(index: Path) -> None:
    """See that a list of shards names safetensors files beside it: diffusers would unpickle any other."""
    names = _json(index, LARGEST_JSON).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) and all(isinstance(n, str) for n in names.values()) else {""}
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{OPTION}: {index} names {found(name)} where only safetensors files beside it are read: it is damaged,"
                " or its pickled weights must be converted first."
            )


def _other_family(unet: dict) -> str | None:
    """Which family a UNet is of, in words, with the types that train it; None if none."""
    fitting = {key for key, spec in SPECS.items() if not _wrong_unet(spec, unet)}
    types = {name: family for name, (family, _) in MODEL_TYPES.items() if family.key in fitting}
    if not types:
        return None
    return f"they are {next(iter(types.values())).name}: set MODEL_TYPE (--model_type) to {' or '.join(types)}"


def _wrong_unet(spec: Spec, unet: dict) -> str | None:
    """Why a UNet is not of a family; None if it is."""
    channels = unet.get("in_channels")
    if channels != spec.in_channels:
        return f"their UNet takes {channels} channels instead of {spec.in_channels}"
    return spec.conditioning.mismatch(unet) or spec.text.mismatch(unet)


def _json(path: Path, max_bytes: int = MAX_BYTES) -> dict:
    try:
        content = load_json(path, max_bytes, minus_infinity=path.name == SCHEDULER_CONFIG)
    except (OSError, BadJson) as error:
        raise WeightsError(f"{OPTION}: {path} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{OPTION}: {path} holds no object, but {found(content)}: it is damaged.")
    return content


def load(
    spec: Spec,
    folder: Path,
    dtype: torch.dtype,
    variant: str | None = None,
    loss: LossSettings = LossSettings(),
    with_text_encoder: bool = False,
) -> Parts:
    """Read the UNet in `dtype` and the schedulers; betas and channels are the checkpoint's own.

    Args:
        with_text_encoder: put the text encoder beside the UNet, to be trained too, in the same dtype.
    """
    try:
        unet = load_whole(UNet2DConditionModel, folder / "unet", dtype=dtype, variant=variant)
        low_res = spec.conditioning.scheduler
        rescaled = ZERO_TERMINAL_SNR if loss.zero_terminal_snr else {}
        noised = low_res and schedule_of(folder, low_res).first(noise_levels(spec, folder))
        schedules = schedule_of(folder, "scheduler", rescaled), noised
        predicted = prediction_type_of(folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a config of any content makes diffusers raise
        raise unfit("the UNet or a scheduler", folder, error) from error
    text_encoder = spec.text.trainable(folder, dtype, variant) if with_text_encoder else None
    return put_together(spec, unet, *schedules, loss, predicted, text_encoder)
