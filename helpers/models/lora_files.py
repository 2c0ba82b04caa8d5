"""The LoRA and DoRA files of any trainer: what their tensors are called, and which layer of which part each is of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from torch import nn

from helpers.files import on_one_line

UNET, TEXT_ENCODER = "unet", "text_encoder"

KOHYA = KOHYA_UNET, KOHYA_TEXT = "lora_unet_", "lora_te_"
"""How the names of layers begin in kohya's format, which diffusers reads by itself."""

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
"""What peft calls a layer's tensors, and what they are called here."""

_SIDES = {"A": DOWN, "B": UP, "down": DOWN, "up": UP}

_PLACES = tuple(re.compile(pattern) for pattern in (
    r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight",
    r"(?P<layer>.+)\.lora_magnitude_vector(\.weight)?",
    r"(?P<layer>.+)\.lora\.(?P<side>down|up)\.weight",
    r"(?P<layer>.+)\.lora_linear_layer\.(?P<side>down|up)\.weight",
    r"(?P<layer>.+?)\.(processor\.)?(?P<projection>to_[qkv]|to_out|add_[kv]_proj)_lora\.(?P<side>down|up)\.weight",
    r"(?P<layer>.+)\.lora_(?P<side>[AB])\.default\.weight",
))
"""The forms of a name. By the place here: 0 and 1 are peft's own, 2 is what diffusers makes of some of them, 3 is for
text encoders, 4 is of its attention processors of old, 5 is of a module's whole state."""

_PROJECTIONS: Mapping[str, Mapping[str, str]] = {
    UNET: {"to_out": "to_out.0"},
    TEXT_ENCODER: {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
"""What the layers are called that the processors of old had other names for."""

_PEFT_PREFIX = "base_model.model."

_PLAIN_PATTERN = re.compile(r"\^?[\w.\\]{1,200}\$?")
"""What the patterns of a config may look like: layers' names. Any regular expression may take for ever."""


@dataclass(frozen=True)
class Layer:
    """The shapes of one layer's tensors: [rank, in, ...], [out, rank, ...], and DoRA's magnitudes, [out] or so."""

    down: tuple[int, ...]
    up: tuple[int, ...]
    magnitude: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.down[0]

    def fits(self, weight: tuple[int, ...]) -> bool:
        """Whether it can stand beside a linear layer or a convolution of this weight."""
        ones = (1,) * (len(weight) - 2)
        magnitude = self.magnitude is None or torch.Size(self.magnitude).numel() == weight[0]
        return self.down[1:] == weight[1:] and self.up == (weight[0], self.rank, *ones) and magnitude

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.down))} and {' x '.join(map(str, self.up))}"


@dataclass(frozen=True)
class Content:
    """What the tensors of a file are.

    Attributes:
        layers: by their names in the pipeline, `unet.mid_block.attentions.0.to_q`; in kohya's format by its own.
        names: what peft calls each tensor, by its name in the file; none of those of kohya's format.
        renamed: layers that diffusers may pass over, as the file has them.
        old: it has forms of names that diffusers itself once wrote.
        kohya: it is in kohya's format.
    """

    layers: Mapping[str, Layer]
    names: Mapping[str, str]
    renamed: frozenset[str] = frozenset()
    old: bool = False
    kohya: bool = False

    @property
    def dora(self) -> bool:
        return any(layer.magnitude for layer in self.layers.values())

    @property
    def has_text_encoder(self) -> bool:
        return any(name.startswith((f"{TEXT_ENCODER}.", KOHYA_TEXT)) for name in self.layers)

    def of(self, part: str) -> dict[str, Layer]:
        """The layers of a part, by their names in it."""
        return _below(part, self.layers)

    def misfit(self, unet: nn.Module) -> str | None:
        """Why its layers do not fit a UNet, as half a sentence; None if they do."""
        weights = weights_of(unet)
        if not self.kohya:
            return misfit(self.of(UNET), weights)
        weights = {f"{KOHYA_UNET}{name.replace('.', '_')}": weight for name, weight in weights.items()}
        # Of other tools' names for the same layers diffusers makes its own, and then finds them or not.
        return misfit({name: layer for name, layer in self.layers.items() if name in weights}, weights)


class NotALora(ValueError):
    """Tensors that are no whole LoRA or DoRA; the message says which, and ends a sentence."""


def content_of(shapes: Mapping[str, tuple[int, ...]]) -> Content:
    """What the tensors of these names and shapes are.

    Raises:
        NotALora: one is none of a LoRA's or DoRA's, or a layer lacks one.
    """
    if any(name.startswith(KOHYA) for name in shapes):
        return _kohya(shapes)
    names, found, forms = {}, {}, {}
    for name, shape in shapes.items():
        place = _place(name)
        if place is None:
            raise NotALora(f"holds {name!r}, which is no part of a LoRA or DoRA of a UNet or of its text encoder")
        part, layer, kind, form = place
        own = found.setdefault(f"{part}.{layer}", {})
        if kind in own:
            raise NotALora(f"holds {kind} of {part}.{layer} twice")
        own[kind] = tuple(shape)
        forms.setdefault(f"{part}.{layer}", set()).add(form)
        # diffusers reads the text encoder's in several forms by itself
        names[name] = f"{part}.{layer}.{kind}" if part == UNET else name
    layers = _layers(found)
    of_unet = {name: own for name, own in forms.items() if name.startswith(f"{UNET}.")}
    mixed = {form for own in of_unet.values() for form in own if form != "peft"}
    passed_over = {name for name, own in of_unet.items() if own & {"bare", "strange"}}
    if mixed and any("peft" in own for own in of_unet.values()):
        passed_over |= {name for name, own in of_unet.items() if own - {"peft"}}
    return Content(layers, names, frozenset(passed_over), old=bool(mixed))


def _place(name: str) -> tuple[str, str, str, str] | None:
    """The part, layer, kind and form of a tensor: "peft", "diffusers", or one that diffusers does not read."""
    part, _, rest = name.partition(".")
    bare = part not in (UNET, TEXT_ENCODER)
    part, rest = (UNET, name) if bare else (part, rest)
    strange = rest.startswith(_PEFT_PREFIX)
    rest = rest.removeprefix(_PEFT_PREFIX)
    for number, pattern in enumerate(_PLACES):
        if match := pattern.fullmatch(rest):
            break
    else:
        return None
    words = match.groupdict()
    layer, projection = words["layer"], words.get("projection")
    if projection:
        layer += f".{_PROJECTIONS[part].get(projection, projection)}"
    strange |= number == 5 or (projection or "").startswith("add_")
    form = "bare" if bare else "strange" if strange else "peft" if number < 2 else "diffusers"
    return part, layer, _SIDES[words["side"]] if "side" in words else MAGNITUDE, form


def _kohya(shapes: Mapping[str, tuple[int, ...]]) -> Content:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, ending = name.partition(".")
        if not layer.startswith(KOHYA) or ending not in ("lora_down.weight", "lora_up.weight", "alpha"):
            what = "DoRA's magnitudes, which diffusers leaves out" if ending == "dora_scale" else "of another kind"
            raise NotALora(f"holds {name!r} beside a LoRA in kohya's format: {what}")
        kind = {"lora_down.weight": DOWN, "lora_up.weight": UP}.get(ending)
        if kind:
            found.setdefault(layer, {})[kind] = tuple(shape)
    return Content(_layers(found), {}, kohya=True)


def _layers(found: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Layer]:
    if not found:
        raise NotALora("holds no layer of a LoRA or DoRA")
    for name, own in found.items():
        if DOWN not in own or UP not in own:
            raise NotALora(f"has only one of the two matrices of {name}")
        if len(own[DOWN]) < 2 or len(own[UP]) != len(own[DOWN]) or own[UP][1] != own[DOWN][0] or not own[DOWN][0]:
            layer = Layer(own[DOWN], own[UP])
            raise NotALora(f"has matrices of {name}, {layer}, that do not fit each other")
    with_magnitude = {name.partition(".")[0] for name, own in found.items() if MAGNITUDE in own}
    for name, own in found.items():
        if name.partition(".")[0] in with_magnitude and MAGNITUDE not in own:
            raise NotALora(f"has DoRA's magnitudes of some layers, but not of {name}")
    return {name: Layer(own[DOWN], own[UP], own.get(MAGNITUDE)) for name, own in found.items()}


@dataclass(frozen=True)
class Scaling:
    """What peft's config says of how an adapter's output is scaled, by peft's names.

    Attributes:
        r: the rank; None where it is not said.
        rank_pattern, alpha_pattern: other ranks and alphas, by the end of a layer's name as a regular expression.
        use_rslora: by alpha / sqrt(rank), not alpha / rank.
    """

    lora_alpha: FiniteFloat
    alpha_pattern: Mapping[str, FiniteFloat] = field(default_factory=dict)
    use_rslora: bool = False
    r: int | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern in (*self.alpha_pattern, *self.rank_pattern):
            if not _PLAIN_PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern[:80]!r} among its patterns is no layer's name")

    def alpha_of(self, layer: str) -> float:
        return self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, layer), self.lora_alpha)

    def rank_of(self, layer: str) -> int | None:
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern, layer), self.r)

    def alpha(self, layer: str, rank: int) -> float:
        """The alpha with which alpha / rank is the layer's scale: kohya's format knows no other rule."""
        return self.alpha_of(layer) * rank**0.5 if self.use_rslora else self.alpha_of(layer)


def scaling_of(config: object) -> Scaling:
    """That of a config of peft's.

    Raises:
        ValueError: it tells none.
    """
    try:
        return TypeAdapter(Scaling).validate_python(config)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ValueError(": ".join([*(str(part) for part in wrong["loc"]), wrong["msg"]])) from None


def scalings_of(stored: Mapping[str, str]) -> dict[str, Scaling]:
    """What a file's metadata tell of the scales of its parts; nothing of those that they do not tell of.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        said = json.loads(stored.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        if not isinstance(said, dict):
            raise ValueError("needs an object")
        parts = {part: _below(part, said) for part in (UNET, TEXT_ENCODER)}
        return {part: scaling_of(own) for part, own in parts.items() if own}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {LORA_ADAPTER_METADATA_KEY} cannot be read ({on_one_line(str(error))})") from None


def _below(part: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """What has names of a part, by its name in it."""
    return {name.removeprefix(f"{part}."): one for name, one in named.items() if name.startswith(f"{part}.")}


def config_of(layers: Mapping[str, Layer], scaling: Scaling | None) -> dict[str, Any]:
    """peft's config of an adapter with these layers; without a scaling each layer's alpha is its rank.

    Of what a file says only the scaling goes into it: peft's configs name modules to import, among other things.

    Raises:
        NotALora: the file says other ranks than its matrices have.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    for name, rank in ranks.items():
        if scaling and scaling.rank_of(name) not in (None, rank):
            raise NotALora(f"says rank {scaling.rank_of(name)} of {name}, whose matrices have rank {rank}")
    alphas = {name: scaling.alpha_of(name) if scaling else rank for name, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {re.escape(name): own for name, own in alphas.items() if own != alpha},
        "target_modules": list(layers),
        "use_dora": any(layer.magnitude for layer in layers.values()),
        "use_rslora": bool(scaling and scaling.use_rslora),
    }


def bare_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet of shapes alone."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def weights_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a model's linear layers and convolutions, by the layers' names.

    It may have adapters already.
    """
    kinds = (nn.Linear, nn.Conv2d)
    return {
        name.removesuffix(".base_layer"): tuple(module.weight.shape)
        for name, module in model.named_modules() if isinstance(module, kinds) and ".lora_" not in name
    }


def misfit(layers: Mapping[str, Layer], weights: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why an adapter of these layers does not fit a model of these weights, as half a sentence; None if it does."""
    strange = [name for name in layers if name not in weights]
    if strange:
        return f"{_counted(strange, layers)} of its layers are not there, such as {strange[0]}"
    wrong = [name for name, layer in layers.items() if not layer.fits(weights[name])]
    if wrong:
        name = wrong[0]
        return (
            f"{_counted(wrong, layers)} of its layers have other sizes, such as {name}, whose matrices of"
            f" {layers[name]} stand beside weights of {' x '.join(map(str, weights[name]))}"
        )
    return None


def _counted(some: Iterable[str], of: Iterable[str]) -> str:
    return f"{len(list(some))} of {len(list(of))}"
