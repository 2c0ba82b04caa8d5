"""LoRA and DoRA in the format of kohya's tools, which ComfyUI and A1111 read."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from helpers.config.families import MODEL_TYPES
from helpers.files import on_one_line, printable, write_whole
from helpers.models.facts import PREFIX, AdapterFacts, read_adapter_facts
from helpers.models.lora_files import Scaling, scalings_of
from helpers.models.results import AdapterError, adapter_file

KOHYA_FILE = "lora_for_comfyui.safetensors"

PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
"""How the names of a part's layers begin, in diffusers' files (before a dot) and in that format."""

DOWN, UP, SCALE = "lora_down.weight", "lora_up.weight", "dora_scale"

ENDINGS = {
    "lora_A.weight": DOWN, "lora_B.weight": UP,
    "lora.down.weight": DOWN, "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN, "lora_linear_layer.up.weight": UP,
    "lora_magnitude_vector": SCALE, "lora_magnitude_vector.weight": SCALE,
}
"""How the names of a layer's tensors end: peft's and diffusers' own, and what each is there."""

GENERATIONS = {768: "sd_v1", 1024: "sd_v2"}
"""What a Stable Diffusion is called there, by the width of the text that its attention reads."""


class NotExportable(ValueError):
    """A file that has no equal in that format; the message says why."""


def to_kohya(state: Mapping[str, torch.Tensor], scalings: Mapping[str, Scaling]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by that format's names.

    Args:
        state: as diffusers saves it. Of the linear layer `unet.mid.to_q`: `unet.mid.to_q.lora_A.weight` [rank, in],
            `.lora_B.weight` [out, rank] and with DoRA `.lora_magnitude_vector` [out]; of a convolution
            [rank, in, k, k], [out, rank, 1, 1] and [1, out, 1, 1].
        scalings: of each part, a key of `PARTS`.

    Returns:
        for each layer `lora_unet_mid_to_q.lora_down.weight` and `.lora_up.weight`, `.alpha`, a scalar in float32, and
        with DoRA `.dora_scale` [out, 1] or [out, 1, 1, 1]: a first axis like the weight's tells readers that the
        outputs are scaled, not the inputs. A part has one alpha; layers that were trained with another have the
        difference in `.lora_up.weight`, in float32.

    Raises:
        NotExportable: a tensor is none of an adapter of these parts, or a layer lacks one.
    """
    layers: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        part, layer, kind = _place(name)
        layers.setdefault((part, layer), {})[kind] = tensor
    alphas: dict[tuple[str, str], float] = {}
    for (part, layer), own in layers.items():
        if DOWN not in own or UP not in own:
            raise NotExportable(f"the layer {part}.{layer} lacks one of its two matrices")
        if part not in scalings:
            raise NotExportable(f"it does not tell the alpha of its {part}, so that its strength is not known")
        alphas[part, layer] = scalings[part].alpha(layer, own[DOWN].shape[0])
    tensors: dict[str, torch.Tensor] = {}
    for part in PARTS:
        own_alphas = {place: alpha for place, alpha in alphas.items() if place[0] == part}
        # One alpha for all: where they differ, diffusers reads those of attentions and text encoders wrongly.
        common = Counter(own_alphas.values()).most_common(1)[0][0] if own_alphas else 1.0
        for place, alpha in own_alphas.items():
            tensors |= _layer(_kohya_name(*place), layers[place], common, alpha / common)
    return tensors


def _layer(name: str, own: Mapping[str, torch.Tensor], alpha: float, factor: float) -> dict[str, torch.Tensor]:
    """The tensors of one layer, whose output is `factor` times what that alpha makes it."""
    down, up = own[DOWN], own[UP]
    tensors = {
        f"{name}.alpha": torch.tensor(float(alpha)),
        f"{name}.{DOWN}": down,
        f"{name}.{UP}": up if factor == 1 else up.float() * factor,
    }
    if SCALE in own:
        tensors[f"{name}.{SCALE}"] = own[SCALE].reshape(-1, *[1] * (down.ndim - 1))
    return tensors


def _place(name: str) -> tuple[str, str, str]:
    """The part, the layer and the kind of a tensor."""
    part, _, rest = name.partition(".")
    ending = next((ending for ending in ENDINGS if rest.endswith(f".{ending}")), None)
    if part not in PARTS or ending is None:
        raise NotExportable(f"found {name!r}, which is no part of a LoRA or DoRA of Stable Diffusion 1.x or 2.x")
    return part, rest.removesuffix(f".{ending}"), ENDINGS[ending]


def _kohya_name(part: str, layer: str) -> str:
    # transformers has dropped the level `text_model` from CLIP's names; that format has kept it.
    if part == "text_encoder" and not layer.startswith("text_model."):
        layer = f"text_model.{layer}"
    return PARTS[part] + layer.replace(".", "_")


def describe(tensors: Mapping[str, torch.Tensor], prediction_type: str | None) -> dict[str, str]:
    """What that format's metadata say of an adapter: only what is known, and the same for all of its layers.

    Args:
        tensors: as `to_kohya` gives them.
        prediction_type: diffusers' name of what the UNet predicts; None where that is not known.
    """
    said = {
        "ss_network_dim": _one_of_all(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(DOWN)),
        "ss_network_alpha": _one_of_all(tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")),
    }
    width = _one_of_all(tensor.shape[1] for name, tensor in tensors.items() if name.endswith(f"attn2_to_k.{DOWN}"))
    if width in GENERATIONS:
        said["ss_v2"] = GENERATIONS[width] == "sd_v2"  # by this A1111 tells which models to offer the file for
        if prediction_type:
            suffix = "_v" if prediction_type == "v_prediction" else ""
            said["ss_base_model_version"] = GENERATIONS[width] + suffix
    return {name: f"{value:g}" if isinstance(value, float) else str(value)
            for name, value in said.items() if value is not None}


def _one_of_all(values: Iterable[float]) -> float | None:
    """The value that all have; None where they differ, or there are none."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def export(source: Path, target: Path) -> Path:
    """Write an adapter's file of diffusers once more, in that format; returns `target`.

    Raises:
        NotExportable: it is no LoRA or DoRA, or one of a model that those tools do not have.
        DiskFull: there is no room for it.
    """
    try:
        facts = read_adapter_facts(source)
        with safe_open(source, framework="pt") as file:
            stored = file.metadata() or {}
        state = load_file(source)
    except SafetensorError as error:
        raise NotExportable(f"{source} is no whole safetensors file ({error})") from None
    except ValidationError as error:
        raise NotExportable(f"{source} has damaged facts of its own ({error.errors()[0]['msg']})") from None
    try:
        _require_readable(facts)
        tensors = to_kohya(state, _scalings(stored))
    except NotExportable as error:
        raise NotExportable(f"{source} cannot be exported: {error}") from None
    own = {name: value for name, value in stored.items() if name.startswith(PREFIX)}
    said = {"format": "pt", **describe(tensors, facts.prediction_type if facts else None), **own}
    write_whole(target, save({name: tensor.contiguous() for name, tensor in tensors.items()}, said))
    return target


def readers(file: Path) -> str:
    """What reads an exported file, and how well."""
    with safe_open(file, framework="pt") as tensors:
        dora = any(name.endswith(f".{SCALE}") for name in tensors.keys())
    if dora:  # peft's is one of the outputs: ComfyUI divides by the norms of the base, A1111 by those of the inputs
        return "for ComfyUI, which applies a DoRA nearly as it was trained; not for A1111"
    return "for ComfyUI and A1111"


def _require_readable(facts: AdapterFacts | None) -> None:
    if facts is None:
        return
    if facts.kind == "bitfit":
        raise NotExportable("it has the biases of a BitFit, for which that format has no place")
    family = next((family for family, _ in MODEL_TYPES.values() if family.key == facts.family), None)
    if family and not family.kohya:
        raise NotExportable(f"ComfyUI and A1111 have no {family.name}, which it was trained for")


def _scalings(stored: Mapping[str, str]) -> dict[str, Scaling]:
    """What a file of diffusers tells of its parts' scales, from its metadata."""
    if LORA_ADAPTER_METADATA_KEY not in stored:
        raise NotExportable(f"its metadata have no {LORA_ADAPTER_METADATA_KEY}, which tells its alpha")
    try:
        return scalings_of(stored)
    except ValueError as error:
        raise NotExportable(str(error)) from None


def main(arguments: list[str]) -> int:
    """Export an adapter that was trained before; 0, or 2 with the reason on standard error."""
    parser = argparse.ArgumentParser("python -m helpers.models.kohya", description=__doc__)
    parser.add_argument("adapter", type=Path, help="its file, or the output folder of its training")
    parser.add_argument("out", type=Path, nargs="?", help=f"what to write; without it {KOHYA_FILE} beside the adapter")
    given = parser.parse_args(arguments)
    try:
        source = adapter_file(given.adapter)
        target = given.out or source.with_name(KOHYA_FILE)
        if target.is_dir():
            target /= KOHYA_FILE
        if target.suffix != ".safetensors":
            raise NotExportable(f"{target} needs a name that ends in .safetensors: ComfyUI and A1111 list no others")
        if target.exists() and target.samefile(source):
            raise NotExportable(f"{target} is the adapter itself: type another name")
        export(source, target)
    except (OSError, AdapterError, NotExportable) as error:
        print(on_one_line(str(error)), file=sys.stderr)
        return 2
    print(f"Written: {printable(target)}, {readers(target)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
