"""Prompts as the stages read them: encoded once, kept in the trainer's cache, the encoder gone before a UNet loads."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from helpers.caching.embeds import EmbedCache
from helpers.captions.cleaning import erased_words
from helpers.config.jsonfile import load_json
from helpers.files import on_one_line
from helpers.inference.placement import Place
from helpers.inference.stages import Adapted, Stage, load_adapters
from helpers.models.bases import Base, fetch
from helpers.models.errors import OPTION, WeightsError
from helpers.models.fingerprints import fingerprint_file
from helpers.models.text import TextEncoder

TEXT = ("text_encoder",)
FOLDER = "text"
"""Below the cache folder, where the trainer keeps its own."""

UNSAID = ("_name_or_path", "torch_dtype", "dtype", "transformers_version")
"""What configurations of one encoder differ in."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A text encoder, and what changes it.

    Attributes:
        base: in whose folder it lies.
        adapted: the adapters that change it.
    """

    base: Base
    variant: str | None
    adapted: tuple[Adapted, ...] = ()


def readers(stages: Sequence[Stage]) -> list[Reader]:
    """The text encoder that each stage reads by; several have one in common where theirs are the same.

    Raises:
        WeightsError: a stage has none, and no stage before it has one that it could use.
    """
    found: list[Reader] = []
    for stage in stages:
        adapted = tuple(adapted for adapted in stage.adapters if adapted.of_text)
        own = Reader(stage.base, stage.variant, adapted)
        shared = next((reader for reader in found if not adapted and not reader.adapted and _serves(reader, own)), None)
        if shared is None and not stage.base.reads_text_by_itself:
            raise WeightsError(
                f"{OPTION}: {stage.base.name} has no text encoder, and no stage before it has one that would serve:"
                " download its text_encoder and tokenizer too, or name stage I."
            )
        found.append(shared or own)
    return found


def _serves(reader: Reader, own: Reader) -> bool:
    """Whether one stage's text encoder does for another's.

    By their weights where both are at hand; else by their configurations: so T5-XXL, of 19 GB, is not downloaded twice.
    """
    if reader.base.spec.text.cleaning != own.base.spec.text.cleaning:
        return False
    if own.base.configs is None:  # where nothing may be downloaded: of the published models it is so
        return True
    if not own.base.reads_text_by_itself:
        return reader.base.unet.get(own.base.spec.text.reader_key) == own.base.unet.get(own.base.spec.text.reader_key)
    prints = [_weights(each) for each in (reader, own)]
    if all(prints):
        return prints[0] == prints[1]
    configs = [_config(each.base) for each in (reader, own)]
    return configs[0] is not None and configs[0] == configs[1]


def _weights(reader: Reader) -> str | None:
    folder = reader.base.configs
    if folder is None or not any((folder / "text_encoder").glob("*.safetensors")):
        return None
    return reader.base.spec.text.fingerprint(folder, reader.variant)["text_encoder"]


def _config(base: Base) -> dict | None:
    path = base.text_encoder
    return {key: value for key, value in load_json(path).items() if key not in UNSAID} if path else None


class Texts:
    """The embeddings of all prompts, for each stage.

    Args:
        cache_dir: where they are kept.
    """

    def __init__(self, stages: Sequence[Stage], cache_dir: Path) -> None:
        self._readers = dict(zip((stage.option for stage in stages), readers(stages)))
        self._folders: dict[Reader, Path] = {}
        self._caches: dict[Reader, EmbedCache] = {}
        self._fingerprints: dict[Reader, dict[str, str]] = {}
        self._cache_dir = cache_dir
        self._prepared: dict[tuple[str, str], str] = {}

    @property
    def readers(self) -> list[Reader]:
        """The encoders, each once."""
        return list(dict.fromkeys(self._readers.values()))

    def encode(
        self,
        prompts: Iterable[str],
        device: torch.device,
        place: Callable[[Reader], Place],
        tell: Callable[[str], None],
    ) -> None:
        """Encode what is not cached yet; each encoder is loaded only for that, once, and freed again.

        Args:
            place: how an encoder works on the device.

        Raises:
            WeightsError, AdapterError, NonFiniteEmbedding: in words.
        """
        prompts = list(dict.fromkeys(prompts))
        for reader in self.readers:
            texts = [self._text(reader, prompt, tell) for prompt in prompts]
            cache = self._cache(reader)
            if not cache.missing(texts):
                continue
            where = place(reader)
            encoder = _loaded(reader, self._folders[reader], device, where.by_groups)
            cache.build(texts, encoder, encoder.length_of, where.batch, encoder.length)
            del encoder
            give_back_memory(device)

    def read(self, stage: Stage, prompts: Sequence[str]) -> Tensor:
        """bfloat16 `[B, length, D]`."""
        reader = self._readers[stage.option]
        return self._cache(reader).read([self._text(reader, prompt) for prompt in prompts])

    def fingerprint(self, stage: Stage) -> Mapping[str, str]:
        """What determines a stage's embeddings besides the text."""
        return self._fingerprint(self._readers[stage.option])

    def _text(self, reader: Reader, prompt: str, tell: Callable[[str], None] | None = None) -> str:
        key = (reader.base.spec.text.cleaning, prompt)
        if key not in self._prepared:
            self._prepared[key] = reader.base.spec.text.prepare(prompt)
            if tell and (lost := sorted(erased_words(prompt, self._prepared[key]))):
                tell(f"{on_one_line(prompt)!r} is read as {self._prepared[key]!r}: without {', '.join(lost)}.")
        return self._prepared[key]

    def _cache(self, reader: Reader) -> EmbedCache:
        if reader not in self._caches:
            self._caches[reader] = EmbedCache(self._cache_dir / FOLDER, self._fingerprint(reader))
        return self._caches[reader]

    def _fingerprint(self, reader: Reader) -> dict[str, str]:
        if reader not in self._fingerprints:
            self._fingerprints[reader] = self._fetched(reader)
        return self._fingerprints[reader]

    def _fetched(self, reader: Reader) -> dict[str, str]:
        self._folders[reader] = fetch(reader.base, reader.variant, TEXT)
        own = reader.base.spec.text.fingerprint(self._folders[reader], reader.variant)
        adapters = [f"{fingerprint_file(one.file.path)}:{one.scale:g}" for one in reader.adapted]
        return own | ({"adapters": ",".join(adapters)} if adapters else {})


def _loaded(reader: Reader, folder: Path, device: torch.device, by_groups: bool) -> TextEncoder:
    encoder = reader.base.spec.text.load(folder, device, reader.variant, by_groups)
    if reader.adapted:
        kind = getattr(diffusers, reader.base.spec.pipeline)
        with torch.device("meta"):  # what the adapters have of the UNet is loaded where it takes nothing
            unet = UNet2DConditionModel.from_config(dict(reader.base.unet))
        components = {"unet": unet, "text_encoder": encoder.model, "requires_safety_checker": False}
        takes = dict.fromkeys(inspect.signature(kind).parameters)
        load_adapters(kind(**takes | {name: one for name, one in components.items() if name in takes}), reader.adapted)
        encoder.model.to(device)
    return encoder


def give_back_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
