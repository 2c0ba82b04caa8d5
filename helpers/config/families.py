"""The model families, as plain facts: one row each. No torch; the widths come from the weights themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from helpers.config.paths import ROOT, from_root
from helpers.sizes import Size


@dataclass(frozen=True)
class Family:
    """One kind of UNet, and the defaults that follow from it.

    `flavours` maps a flavour's name to its hub id. `alignment` is the number of pixels that every edge must be a
    multiple of; `resolution` is the edge in pixels at which the family was trained. A family that `upscales` learns
    from images and their low-resolution copies: an image below the resolution would teach it blur.
    """

    key: str
    name: str
    model_family: str
    flavours: Mapping[str, str] = field(repr=False)
    default_flavour: str
    alignment: int
    resolution: int
    validation_resolution: tuple[Size, ...]
    data_backend_config: Path
    mixed_precisions: tuple[str, ...]
    guidance_rescale: bool
    validation_guidance: float
    num_eval_images: int
    upscales: bool = False
    largest_factor: int = 4


DEEPFLOYD_I = Family(
    key="deepfloyd-i",
    name="DeepFloyd IF stage I",
    model_family="deepfloyd",
    flavours=MappingProxyType({
        "i-medium-400m": "DeepFloyd/IF-I-M-v1.0",
        "i-large-900m": "DeepFloyd/IF-I-L-v1.0",
        "i-xlarge-4.3b": "DeepFloyd/IF-I-XL-v1.0",
    }),
    default_flavour="i-medium-400m",
    alignment=8,
    resolution=64,
    validation_resolution=(Size(64, 64),),
    data_backend_config=ROOT / "multidatabackend_deepfloyd.json",
    mixed_precisions=("no", "bf16"),
    guidance_rescale=False,
    validation_guidance=7.5,
    num_eval_images=0,
)

DEEPFLOYD_II = Family(
    key="deepfloyd-ii",
    name="DeepFloyd IF stage II",
    model_family="deepfloyd",
    flavours=MappingProxyType({
        "ii-medium-450m": "DeepFloyd/IF-II-M-v1.0",
        "ii-large-1.2b": "DeepFloyd/IF-II-L-v1.0",
    }),
    default_flavour="ii-medium-450m",
    alignment=16,
    resolution=256,
    validation_resolution=(Size(256, 256),),
    data_backend_config=ROOT / "multidatabackend_deepfloyd.json",
    mixed_precisions=("no", "bf16"),
    guidance_rescale=False,
    validation_guidance=4.0,
    num_eval_images=4,
    upscales=True,
)

MODEL_TYPES: Mapping[str, tuple[Family, str]] = MappingProxyType({
    "deepfloyd-lora": (DEEPFLOYD_I, "lora"),
    "deepfloyd-full": (DEEPFLOYD_I, "full"),
    "deepfloyd-stage2-lora": (DEEPFLOYD_II, "lora"),
    "deepfloyd-stage2": (DEEPFLOYD_II, "full"),
})
"""The names that MODEL_TYPE may have: what is trained (a family's row), and how ("lora" or "full")."""

FLAVOURS: tuple[str, ...] = tuple(
    dict.fromkeys(flavour for family, _ in MODEL_TYPES.values() for flavour in family.flavours)
)

TRAINING_KINDS = ("lora", "full")

# IF keeps its text keys and values in add_k_proj and add_v_proj: without them a caption can hardly be learned.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
LORA_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "attention": ATTENTION, "attention+conv": ATTENTION + CONVOLUTIONS,
})
"""The layers of a UNet that get an adapter, by the words of the option lora_targets."""

NOT_YET: Mapping[str, str] = MappingProxyType({
    "deepfloyd-stage3": "DeepFloyd IF stage III",
    "iii-": "DeepFloyd IF stage III",
})
"""How the names of other models' types and flavours begin: known, but not trained by this version."""


class Contradiction(ValueError):
    """What the model options say does not fit together; `option` is the flag to blame, `str()` says why."""

    def __init__(self, option: str, words: str):
        super().__init__(words)
        self.option = option


@dataclass(frozen=True)
class Model:
    """One model to train, said in full: both front doors end in the same one."""

    model_type: str
    family: Family
    flavour: str | None
    name: str


def resolve(
    model_type: str | None, model_family: str | None, model_flavour: str | None, model_name: str | None
) -> Model:
    """Join the two ways to name a model: one `model_type`, or a family with its flavour and "lora" or "full".

    Returns:
        the model; `flavour` is None where `model_name` is none of the family's own (a local folder, another hub id)
        and no flavour was given; `name` is an absolute path for a local folder, a hub id otherwise.

    Raises:
        Contradiction: in words, for names that do not exist and for options that contradict each other.
    """
    full_type = _full_type(model_type, model_family, model_flavour or _known_flavour(model_name))
    family, kind = MODEL_TYPES[full_type]
    if model_family is not None and model_family != family.model_family:
        raise Contradiction(
            "model_family",
            f"found {model_family!r} beside model_type {full_type!r}, which is {family.model_family!r}: "
            "remove one of the two",
        )
    flavour = model_flavour or _flavour_of(model_name, family)
    _check_flavour(flavour, family, kind)
    if model_name is None:
        flavour = flavour or family.default_flavour
        return Model(full_type, family, flavour, family.flavours[flavour])
    _check_name(model_name, model_flavour, family, kind)
    return Model(full_type, family, flavour, _local_or_hub(model_name))


def _full_type(model_type: str | None, model_family: str | None, model_flavour: str | None) -> str:
    if model_type in MODEL_TYPES:
        return model_type
    if model_type is not None and model_type not in TRAINING_KINDS:
        raise Contradiction("model_type", _unknown(model_type, MODEL_TYPES))
    if model_family is None:
        raise Contradiction("model_type", _without_family(model_type))
    kind = model_type or "lora"
    rows = {name: row for name, row in MODEL_TYPES.items() if row[0].model_family == model_family}
    if not rows:
        families = {family.model_family for family, _ in MODEL_TYPES.values()}
        raise Contradiction("model_family", _unknown(model_family, families))
    flavoured = [name for name, row in rows.items() if row[1] == kind and model_flavour in row[0].flavours]
    return flavoured[0] if flavoured else next(name for name, row in rows.items() if row[1] == kind)


def _without_family(kind: str | None) -> str:
    if kind is None:
        return f"is not set, needs {_one_of(MODEL_TYPES)}"
    return (
        f"found {kind!r} without a model_family, which is the name of a Stable Diffusion model: this version does not "
        f"train it yet; type {_one_of(MODEL_TYPES)}, or set model_family to {DEEPFLOYD_I.model_family} beside it"
    )


def _flavour_of(model_name: str | None, family: Family) -> str | None:
    return next((flavour for flavour, hub_id in family.flavours.items() if hub_id == model_name), None)


def _known_flavour(model_name: str | None) -> str | None:
    """The flavour, of whichever family, that a hub id is."""
    families = (family for family, _ in MODEL_TYPES.values())
    return next((flavour for family in families if (flavour := _flavour_of(model_name, family))), None)


def _other_type(flavour: str | None, kind: str) -> str | None:
    """What a flavour of another family is, and the model type that trains it; None for one that does not exist."""
    rows = ((name, row[0]) for name, row in MODEL_TYPES.items() if row[1] == kind and flavour in row[0].flavours)
    return next((f"which is {family.name}: set model_type to {name}" for name, family in rows), None)


def _check_flavour(flavour: str | None, family: Family, kind: str) -> None:
    if flavour is None or flavour in family.flavours:
        return
    other = _other_type(flavour, kind)
    words = f"found {flavour!r}, {other}, or type {_one_of(family.flavours)}" if other else None
    raise Contradiction("model_flavour", words or _unknown(flavour, family.flavours, family.name))


def _check_name(model_name: str, model_flavour: str | None, family: Family, kind: str) -> None:
    own = _flavour_of(model_name, family)
    if own is not None and model_flavour is not None and own != model_flavour:
        raise Contradiction(
            "model_flavour",
            f"found {model_flavour!r} beside the model {model_name!r}, which is {own!r}: remove one of the two",
        )
    if own is None and model_name.startswith("DeepFloyd/") and not os.path.isdir(from_root(model_name)):
        other = _other_type(_known_flavour(model_name), kind)
        raise Contradiction(
            "pretrained_model_name_or_path",
            f"found {model_name!r}, {other or f'which is not a {family.name} model'}; or "
            f"type one of {', '.join(family.flavours.values())}, or the path of a local folder",
        )


def _local_or_hub(model_name: str) -> str:
    """A folder's absolute path, so that it is found wherever the trainer is started; anything else as it stands."""
    looks_local = model_name.startswith(("/", "./", "../", "~")) or os.path.isdir(from_root(model_name))
    return str(from_root(model_name)) if looks_local else model_name


def _unknown(name: str, names: Iterable[str], of: str = "") -> str:
    """What to say of a name that is none of `names`, which belong to `of`."""
    known = next((model for prefix, model in NOT_YET.items() if name.lower().startswith(prefix)), None)
    if known is not None:
        return f"found {name!r}, which is {known}: this version does not train it yet; type {_one_of(names)}"
    close = get_close_matches(name, list(names), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"found {name!r}, {of}{' ' if of else ''}needs {_one_of(names)}{hint}"


def _one_of(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
