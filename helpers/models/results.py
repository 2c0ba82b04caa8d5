"""What a training has written, loaded into a pipeline of diffusers to sample with; files of other trainers too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from helpers.config.families import FAMILIES, PICKLED, SINGLE_FILE, Family, local_or_hub
from helpers.config.jsonfile import BadJson, load_json
from helpers.config.problems import found
from helpers.files import on_one_line, printable
from helpers.models.bitfit import BIASES_FILE
from helpers.models.facts import AdapterFacts, read_adapter_facts
from helpers.models.lora import CLIP_LEVEL, LORA_FILE
from helpers.models.lora_files import (
    TEXT_ENCODER,
    UNET,
    Content,
    NotALora,
    Scaling,
    bare_unet,
    config_of,
    content_of,
    scaling_of,
    scalings_of,
)
from helpers.models.published import architecture

KINDS: Mapping[str, str] = MappingProxyType({"lora": "a LoRA", "dora": "a DoRA", "bitfit": "a BitFit"})
"""What the facts call what was trained, in words."""

OPTIONS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "deepfloyd-i": ("--stage1", "--stage1_lora"),
    "deepfloyd-ii": ("--stage2", "--stage2_lora"),
    "deepfloyd-iii": ("--upscaler", "--upscaler_lora"),
    "sd": ("--stage1", "--stage1_lora"),
})
"""What inference.py takes a family's weights and its adapters by."""

OWN_EXPORT = "pipeline"
"""How every pipeline of full tuning is called: a name that tells nothing."""

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What peft saves a LoRA as, and beside it what scales it."""

LFS, PICKLES = b"version https://git-lfs", (b"PK\x03\x04", b"\x80")
"""How the placeholders of large files begin, and pickled files, of which torch makes zip archives."""

CARD, LONGEST_CARD = "README.md", 20_000  # bytes
BASE_IN_CARD = re.compile(r"""^base_model:[ \t]*["']?([\w.-]+/[\w.-]+)["']?[ \t]*$""", re.MULTILINE)


class AdapterError(ValueError):
    """An adapter that cannot be used; the message says why and what to type instead."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its file tells it, whose weights no model has yet.

    Attributes:
        path: the file.
        facts: what it tells of itself; None for one of another trainer.
        maker: "floydtuner", "diffusers", "simpletuner", or "unknown".
        repairs: what is put right in memory, and what is assumed of it, each a sentence.
        base: a hub id, or the path of a folder or file, with the weights to load it on; None where that is not told.
        content: its layers; None for biases.
        shapes: of all of its tensors.
        scalings: of its parts, as far as they are told.
    """

    path: Path
    facts: AdapterFacts | None
    maker: str
    repairs: tuple[str, ...]
    base: str | None
    content: Content | None
    shapes: Mapping[str, tuple[int, ...]]
    scalings: Mapping[str, Scaling]

    @property
    def kind(self) -> str:
        """What it is, in words: "a LoRA of DeepFloyd IF stage II, trained on DeepFloyd/IF-II-M-v1.0"."""
        if self.facts is None:
            return "a DoRA" if self.content.dora else "a LoRA"
        family = next((family.name for family in FAMILIES if family.key == self.facts.family), self.facts.family)
        return f"{KINDS[self.facts.kind]} of {family}, trained on {self.facts.base_model}"


def read_adapter(path: Path | str) -> AdapterFile:
    """What the adapter at `path` is: a file, or the output folder of its training.

    Its tensors are looked at one by one and not kept.

    Raises:
        AdapterError: there is none, or it cannot be used.
    """
    file = adapter_file(Path(path))
    shapes, stored = _header(file)
    try:
        facts = read_adapter_facts(file)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise AdapterError(f"{file}: its facts of itself are damaged ({where}: {wrong['msg']}).") from None
    if facts and facts.kind not in KINDS:
        words = f"says that it is {found(facts.kind)}: the adapters of a UNet are {', '.join(KINDS)}"
        raise AdapterError(f"{printable(file)} {words}.")
    is_bitfit = facts is not None and facts.kind == "bitfit"
    try:
        content = None if is_bitfit else content_of(shapes)
        scalings = _beside(file) or scalings_of(stored)
        for part in (UNET, TEXT_ENCODER) if content else ():
            _config(part, content, scalings)
    except NotALora as error:
        raise AdapterError(f"{printable(file)} cannot be used: it {on_one_line(str(error))}.") from None
    except ValueError as error:
        raise AdapterError(f"{printable(file)} cannot be used: {on_one_line(str(error))}.") from None
    card = "" if facts else _card(file)
    maker = _maker(facts, content, stored, card)
    return AdapterFile(
        path=file,
        facts=facts,
        maker=maker,
        repairs=_repairs(content, scalings, maker) if content else (),
        base=_base(file, facts, content, card),
        content=content,
        shapes=MappingProxyType(shapes),
        scalings=MappingProxyType(scalings),
    )


def adapter_file(path: Path) -> Path:
    """The file of the adapter at `path`: that file itself, or the one in that folder.

    Raises:
        AdapterError: there is none.
    """
    if path.suffix.lower() in PICKLED:
        raise AdapterError(_pickled(path))
    files = [path] if path.is_file() else [path / name for name in (LORA_FILE, BIASES_FILE, PEFT_FILE)]
    found_file = next((file for file in files if file.is_file()), None)
    if found_file is None:
        raise AdapterError(f"there is no adapter in {printable(path)}: {_instead(path)}")
    return found_file


def _instead(folder: Path) -> str:
    """What to type in place of a folder without an adapter."""
    if not folder.is_dir():
        return "there is no such file or folder. Type the output folder of a training, or an adapter's file."
    if (folder / OWN_EXPORT / "model_index.json").is_file() or (folder / "model_index.json").is_file():
        whole = folder if (folder / "model_index.json").is_file() else folder / OWN_EXPORT
        return f"{printable(whole)} is a whole model: name it as the stage's weights, not as an adapter."
    files = sorted(path.name for path in folder.iterdir() if path.suffix == SINGLE_FILE)
    if files:
        return f"neither {LORA_FILE} nor {BIASES_FILE}. Is it {found(files[0])} in it? Then type the file's own path."
    pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLED)
    return _pickled(pickled[0]) if pickled else f"neither {LORA_FILE} nor {BIASES_FILE}."


def _pickled(path: Path) -> str:
    return (
        f"{printable(path)} is a pickled file, which can run any code when it is read, and so is never opened: take the"
        f" same adapter as {SINGLE_FILE}, or have a program that you trust write it as that."
    )


def _header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of a file's tensors, and its metadata; each tensor is seen to be of finite numbers.

    A single NaN, left by a training that broke down, makes every picture black.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point():
                    raise AdapterError(f"{printable(file)} holds {found(name)} of {tensor.dtype}: it is no adapter.")
                if not torch.isfinite(tensor.float()).all():
                    raise AdapterError(
                        f"{printable(file)} holds {found(name)}, which is not all finite numbers: its training broke"
                        " down. Take an earlier checkpoint of it."
                    )
                shapes[name] = tuple(tensor.shape)
            return shapes, dict(tensors.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise AdapterError(_unreadable(file, error)) from None


def _unreadable(file: Path, error: Exception) -> str:
    """What a file is that is no safetensors file."""
    with suppress(OSError), file.open("rb") as stream:
        beginning = stream.read(len(LFS))
        if beginning.startswith(PICKLES):
            return _pickled(file)
        if beginning == LFS:
            return f"{printable(file)} is a placeholder of git LFS: run `git lfs pull` in {printable(file.parent)}."
    words = on_one_line(str(error))
    return f"{printable(file)} is no safetensors file, or it is damaged ({words}): download or copy it again."


def _beside(file: Path) -> dict[str, Scaling]:
    """The scaling of a LoRA that peft itself saved: its configuration lies beside it.

    Raises:
        ValueError: that cannot be read.
    """
    config = file.with_name(PEFT_CONFIG)
    if file.name != PEFT_FILE or not config.is_file():
        return {}
    try:
        return {UNET: scaling_of(load_json(config))}
    except (OSError, ValueError) as error:
        raise ValueError(f"{PEFT_CONFIG} beside it cannot be read ({error})") from None


def _maker(facts: AdapterFacts | None, content: Content | None, stored: Mapping[str, str], card: str) -> str:
    if facts:
        return "floydtuner"
    if "simpletuner" in card.lower():
        return "simpletuner"
    has_words = content.old or content.renamed or any(name.endswith("lora_adapter_metadata") for name in stored)
    return "diffusers" if has_words and not content.kohya else "unknown"


def _repairs(content: Content, scalings: Mapping[str, Scaling], maker: str) -> tuple[str, ...]:
    """What is put right and what is assumed, in sentences."""
    words, count = [], len(content.layers)
    if content.renamed:
        words.append(
            f"The names of {len(content.renamed)} of its {count} layers are put right in memory, as diffusers would"
            f" have passed over some of them: {count} of {count} are used."
        )
    untold = {layer.rank for name, layer in content.layers.items() if name.partition(".")[0] not in scalings}
    if untold and not content.kohya:
        ranks = " or ".join(map(str, sorted(untold)))
        words.append(
            f"It does not tell its alpha: taken as its rank, {ranks}, as its trainer has it by default. If it was"
            " trained with another, scale it by alpha / rank."
        )
    return tuple(words) if maker != "floydtuner" else ()


def _card(file: Path) -> str:
    """The beginning of the model card beside a file, which some trainers write; empty where there is none."""
    try:
        with (file.parent / CARD).open("rb") as stream:
            return stream.read(LONGEST_CARD).decode("utf-8", "replace")
    except OSError:
        return ""


def _base(file: Path, facts: AdapterFacts | None, content: Content | None, card: str) -> str | None:
    """The weights that an adapter was trained on, as a hub id or a path."""
    if facts is None:
        named = BASE_IN_CARD.search(card)
        fitting = list(published_bases(content))
        return named[1] if named else fitting[0] if len(fitting) == 1 else None
    for folder in (file.parent, file.parent.parent):  # that of a checkpoint lies one below
        name = _base_of_run(folder)
        if name and _last(name) == _last(facts.base_model):
            return local_or_hub(name)
    return facts.base_model if facts.base_model.count("/") == 1 else None


def _base_of_run(output: Path) -> str | None:
    """What run.json of a training's output folder names as its base."""
    try:
        name = load_json(output / "run.json")["options"]["pretrained_model_name_or_path"]
    except (OSError, BadJson, LookupError, TypeError):  # there is none: the adapter was copied elsewhere
        return None
    return name if isinstance(name, str) else None


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


@cache
def _published() -> tuple[tuple[str, Family, UNet2DConditionModel], ...]:
    """The published models whose architecture is kept here, by hub id, as UNets of shapes alone."""
    hub_ids = [(hub_id, family) for family in FAMILIES for hub_id in family.flavours.values()]
    paths = [(hub_id, family, path) for hub_id, family in hub_ids if (path := architecture(hub_id))]
    unets = {path: bare_unet(UNet2DConditionModel.load_config(path)) for _, _, path in paths}
    return tuple((hub_id, family, unets[path]) for hub_id, family, path in paths)


def published_bases(content: Content) -> dict[str, Family]:
    """The published models, by hub id, that have all of the UNet's layers of an adapter."""
    return {hub_id: family for hub_id, family, unet in _published() if not content.misfit(unet)}


def require_fits(
    adapter: AdapterFile,
    family_key: str,
    base_name: str,
    unet_config: Mapping[str, Any],
    unet_fingerprint: str | None,
    any_base: bool,
    option: str | None = None,
) -> tuple[str, ...]:
    """See that an adapter is of this stage and of these weights, before they load.

    Args:
        family_key: of the stage that it is for.
        base_name: the weights' name, as the user gave it: a hub id or a path.
        unet_config: of their UNet.
        unet_fingerprint: of their UNet's files, where it is known.
        any_base: use it on other weights of the same layers than it was trained on.
        option: by which the user named the adapter; the family's own if None.

    Returns:
        what to tell the user, in sentences.

    Raises:
        AdapterError: it is of another stage, does not fit, or is of other weights.
    """
    base_option, own_option = OPTIONS.get(family_key, ("the base", "the adapter"))
    what = f"{option or own_option}: {printable(adapter.path)} is {adapter.kind}"
    facts, of_family = adapter.facts, _family(family_key)
    if facts and facts.family != family_key:
        instead = _typed_instead(facts.family, family_key, adapter, adapter.base or facts.base_model)
        raise AdapterError(f"{what}, and here one of {of_family} is wanted{instead}.")
    wrong = _misfit(adapter, bare_unet(unet_config))
    if wrong:
        raise AdapterError(f"{what}, which does not fit {base_name}: {wrong}. {_fitting(adapter, family_key)}")
    if facts is None:
        return (f"{printable(adapter.path)} does not tell what it was trained on; its layers fit {base_name}.",)
    same_name, same_files = _same_base(facts, base_name, unet_fingerprint)
    if same_name and same_files is not False or same_files:
        return ()
    if same_name:
        return (f"{base_name} has other weights than those of that name that {printable(adapter.path)} was trained on,"
                " or another variant of them.",)
    if any_base:
        return (f"{printable(adapter.path)} was trained on {facts.base_model}, and is used on {base_name}.",)
    raise AdapterError(
        f"{what}, not on {base_name}, on which it would draw something else: type {base_option}"
        f" {adapter.base or facts.base_model}, or, to use it all the same, --any_base true."
    )


def _family(key: str) -> str:
    return next((family.name for family in FAMILIES if family.key == key), key)


def _typed_instead(own_key: str, family_key: str, adapter: AdapterFile, base: str) -> str:
    """What to type for an adapter of one family that was named for another one."""
    if own_key not in OPTIONS:
        return ""
    base_option, option = OPTIONS[own_key]
    if option == OPTIONS.get(family_key, ("", ""))[1]:  # the same place: it is the weights that are others
        return f": type {base_option} {base} beside it"
    return f": type {option} {printable(adapter.path)}"


def _misfit(adapter: AdapterFile, unet: UNet2DConditionModel) -> str | None:
    """Why an adapter's layers, or biases, are not a UNet's, as half a sentence."""
    if adapter.content:
        return adapter.content.misfit(unet)
    own = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    wrong = [name for name, shape in adapter.shapes.items() if own.get(name) != shape]
    return f"its UNet has no {wrong[0]} of that size" if wrong else None


def _fitting(adapter: AdapterFile, family_key: str) -> str:
    """What to type for an adapter whose layers do not fit."""
    fitting = {hub_id: family for hub_id, family, unet in _published() if not _misfit(adapter, unet)}
    own = [hub_id for hub_id, family in fitting.items() if family.key == family_key]
    if own:
        return f"It fits {', '.join(own)}: type {OPTIONS.get(family_key, ('the base', ''))[0]} {own[0]}."
    if fitting:
        hub_id, family = next(iter(fitting.items()))
        instead = _typed_instead(family.key, family_key, adapter, hub_id)
        return f"It fits {', '.join(fitting)}, which is {family.name}{instead}."
    return "It fits no published model either: name the weights that it was trained on."


def _same_base(facts: AdapterFacts, base_name: str, fingerprint: str | None) -> tuple[bool, bool | None]:
    """Whether the base has the name that the facts tell, and the very files; None where that is not known."""
    own, last = facts.base_model, _last(base_name)
    same_name = _today(own) == _today(base_name) or (last == _last(own) and last != OWN_EXPORT)
    known = facts.base_fingerprint and fingerprint
    return same_name, facts.base_fingerprint == fingerprint if known else None


def _today(name: str) -> str:
    """A hub id, by its present name."""
    families = (family for family in FAMILIES if name in family.former_names)
    return next((family.flavours[family.former_names[name]] for family in families), name)


def load_adapter(
    pipeline: DiffusionPipeline, adapter: AdapterFile | Path | str, name: str | None = None
) -> AdapterFacts | None:
    """Load a LoRA, DoRA or BitFit into the pipeline of its base, and set the scheduler that it was trained for.

    Files of other trainers too: names that diffusers would pass over in silence are put right, in memory.

    Args:
        adapter: its file, the output folder of its training, or what `read_adapter` made of that.
        name: what to call a LoRA or DoRA, for `set_adapters`.

    Returns:
        what the adapter tells of itself; None for one of another trainer.

    Raises:
        AdapterError: there is no adapter, it cannot be used, or it does not fit the pipeline as it is.
    """
    adapter = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
    if adapter.content is None:
        strange = sorted(adapter.shapes.keys() - pipeline.unet.state_dict().keys())
        if strange:
            raise AdapterError(
                f"{adapter.path}: the UNet has no {strange[0]}; load biases of its base, and before any LoRA."
            )
    wrong = _misfit(adapter, pipeline.unet)
    if wrong:
        raise AdapterError(f"{printable(adapter.path)} does not fit the pipeline's UNet: {wrong}.")
    if adapter.content is None:
        pipeline.unet.load_state_dict(load_file(adapter.path), strict=False)
    else:
        _load_lora(pipeline, adapter, name)
    changes = scheduler_changes([adapter])
    if changes:
        scheduler = pipeline.scheduler
        zero_snr = adapter.facts and adapter.facts.zero_terminal_snr
        kind = DDIMScheduler if zero_snr else type(scheduler)  # SD's usual one, PNDM, has no such thing
        pipeline.scheduler = kind.from_config(scheduler.config, **changes)
    return adapter.facts


def _load_lora(pipeline: DiffusionPipeline, adapter: AdapterFile, name: str | None) -> None:
    """Have diffusers load it, and see that every layer of it is there afterwards."""
    parts = {UNET: pipeline.unet, TEXT_ENCODER: getattr(pipeline, TEXT_ENCODER, None)}
    content = adapter.content
    if content.has_text_encoder and parts[TEXT_ENCODER] is None:
        raise AdapterError(f"{printable(adapter.path)} is of a text encoder too, which the pipeline does not have.")
    before = {part: _adapted(model) for part, model in parts.items() if model is not None}
    try:
        if content.kohya:
            pipeline.load_lora_weights(adapter.path.parent, weight_name=adapter.path.name, adapter_name=name)
        else:
            state = {content.names[stored]: tensor for stored, tensor in load_file(adapter.path).items()}
            config = {
                f"{part}.{key}": value
                for part in parts for key, value in _config(part, content, adapter.scalings).items()
            }
            how = {"adapter_name": name, "metadata": config, "_pipeline": pipeline, "low_cpu_mem_usage": True}
            if content.of(UNET):
                pipeline.load_lora_into_unet(state, None, pipeline.unet, **how)
            if content.has_text_encoder:
                pipeline.load_lora_into_text_encoder(state, None, pipeline.text_encoder, **how)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a file of any content makes diffusers or peft raise
        words = on_one_line(str(error))[:400]
        raise AdapterError(f"{printable(adapter.path)} cannot be loaded ({type(error).__name__}: {words}).") from error
    loaded = [layer for part, own in before.items() for layer in _adapted(parts[part]) - own]
    if len(loaded) != len(content.layers):
        pipeline.delete_adapters(sorted({own for _, own in loaded}))
        raise AdapterError(
            f"{printable(adapter.path)} is not wholly of this pipeline: diffusers found places for {len(loaded)} of its"
            f" {len(content.layers)} layers."
        )


def _adapted(model: torch.nn.Module) -> set[tuple[str, str]]:
    """The layers of a model that have an adapter, each with the adapter's name."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return {(name, own) for name, layer in layers for own in layer.lora_A}


def _config(part: str, content: Content, scalings: Mapping[str, Scaling]) -> dict[str, Any]:
    """peft's config of a part's layers; empty for a part without any."""
    # transformers has no such level in the names of CLIP's layers; older files have it.
    layers = {name.removeprefix(CLIP_LEVEL): layer for name, layer in content.of(part).items()}
    return config_of(layers, scalings.get(part)) if layers else {}


def scheduler_changes(adapters: Iterable[AdapterFile]) -> dict[str, Any]:
    """What the scheduler must be told to sample with these adapters at once.

    Of IF's other trainers none trains the variance: theirs are sampled with one that is not predicted.

    Raises:
        AdapterError: they ask for different things.
    """
    demands = [(adapter, _demands(adapter)) for adapter in adapters]
    demands = [(adapter, own) for adapter, own in demands if own is not None]
    for (one, first), (other, second) in zip(demands, demands[1:]):
        if first != second:
            raise AdapterError(
                f"{printable(one.path)} and {printable(other.path)} cannot be sampled at once: the first needs a"
                f" scheduler with {_shown(first)}, the second one with {_shown(second)}."
            )
    return demands[0][1] if demands else {}


def _demands(adapter: AdapterFile) -> dict[str, Any] | None:
    """What an adapter asks of the scheduler; None where it does not matter to it."""
    if adapter.facts:
        return adapter.facts.scheduler_changes
    # IF's UNet has its attentions where that of latents has blocks of them.
    is_pixels = not adapter.content.kohya and not any(".transformer_blocks." in name for name in adapter.content.layers)
    return {"variance_type": "fixed_small"} if is_pixels and adapter.content.of(UNET) else None


def _shown(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "nothing changed"
