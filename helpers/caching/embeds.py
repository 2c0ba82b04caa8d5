"""The text-embed cache: prepared caption -> the text encoder's output, encoded once and kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

import torch
from tqdm import tqdm

from helpers.caching.storages import STORAGES
from helpers.caching.store import ShardStore, Writer, claimed_records

NAMED = 3
"""How many of the captions that are too long the console names."""

EXAMPLE_LETTERS = 60
"""How much of such a caption it shows."""

CONVERTED = 16
"""Embeds that are stored in another way at a time."""

ALIKE = ("kind", "storage")
"""What the recipes of all embeds that are stored in one way have in common."""


class NonFiniteEmbedding(ValueError):
    """The text encoder returned inf or NaN; the message names the caption."""


class EmbedCache:
    """The embeddings of one text encoder. Texts come prepared: cleaned as the model family wants them.

    `fingerprint` says everything that an embedding depends on besides the text: encoder weights, tokenizer, length,
    cleaning. Each fingerprint has its own folder inside `folder`, so that encoders sharing a cache_dir never mix, and
    so has each of the ways to store embeds, `storage`: a key of `STORAGES`.
    """

    dtype = torch.bfloat16

    def __init__(self, folder: Path, fingerprint: Mapping[str, str], storage: str = "bf16") -> None:
        self._folder, self._fingerprint, self._storage = folder, fingerprint, STORAGES[storage]
        self._recipe = _recipe(fingerprint, storage)
        self.store = ShardStore(_place(folder, self._recipe), self._recipe)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those texts, each once and in order, that have no embedding yet."""
        return [text for text in dict.fromkeys(texts) if text_key(text) not in self.store]

    def plan(self, texts: Iterable[str]) -> str:
        """How many of these texts are cached, how many have to be encoded, and why, in words."""
        unique = list(dict.fromkeys(texts))
        missing = self.missing(unique)
        words = f"{len(unique) - len(missing):,} captions encoded before"
        if not missing:
            return f"{words}, 0 to encode"
        damaged, others = self.store.damaged_keys(), self._others()
        otherwise = "new or of a damaged shard" if self.store.damage_is_nameless() else "new"
        reasons = Counter(_why(text_key(text), damaged, others) or otherwise for text in missing)
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        return f"{words}, {len(missing):,} captions to encode ({why})"

    def _others(self) -> dict[str, str]:
        """Texts that other encoders encoded in the same folder, by their keys, and in what those differ."""
        differing: dict[str, tuple[str, ...]] = {}
        known = dict.fromkeys([*self._recipe, *ALIKE])  # not what else a stranger's cache may name
        for folder in self.store.folder.parent.iterdir():
            if folder == self.store.folder or not folder.is_dir():
                continue
            for recipe, keys in claimed_records(folder):
                parts = tuple(part for part in known if recipe.get(part) != self._recipe.get(part))
                if "kind" not in parts:
                    differing |= {key: parts for key in keys if len(parts) < len(differing.get(key, known))}
        return {key: " and ".join(parts) for key, parts in differing.items()}

    def convert(self, texts: Iterable[str]) -> None:
        """Make what is missing of those texts whose exact embeds are in the same folder: without their encoder."""
        exact = _recipe(self._fingerprint)
        missing = self.missing(texts)
        if self._recipe == exact or not missing or not _place(self._folder, exact).is_dir():
            return
        source = EmbedCache(self._folder, self._fingerprint)
        there = [text for text in missing if text_key(text) in source.store]
        if not there:
            return
        if self.store.damaged:
            tqdm.write(self.store.damage())
        words = f"{len(there):,} captions are stored as {self._recipe['storage']}, made of the exact embeds in"
        tqdm.write(f"Text embeds: {words} {source.store.folder}, which stay")
        with self.store.writer() as writer, tqdm(total=len(there), desc="text embeds", unit="caption") as bar:
            for start in range(0, len(there), CONVERTED):
                batch = there[start : start + CONVERTED]
                self._add(writer, batch, source.read(batch))
                bar.update(len(batch))

    def build(
        self,
        texts: Iterable[str],
        encode: Callable[[Sequence[str]], torch.Tensor],
        length_of: Callable[[str], int],
        batch_size: int,
        limit: int = 77,
        mine: Callable[[str], bool] | None = None,
    ) -> None:
        """Encode what is missing; `encode` returns bf16 [B, 77, D] and `length_of` the tokens of a text.

        Batches hold texts of like length, the longest first: an encoder that does not fit fails at once and the
        announced time is not exceeded. An interrupted build keeps what it had encoded. Texts of more than `limit`
        tokens, which the encoder cuts, are told before it starts. With `mine`, only the texts whose keys it takes are
        encoded here, and the others by other processes.

        Raises:
            NonFiniteEmbedding: the encoder overflowed.
        """
        texts = list(texts)
        missing = [text for text in self.missing(texts) if mine is None or mine(text_key(text))]
        lengths = {text: length_of(text) for text in missing}
        wanted = sorted(lengths, key=lengths.__getitem__, reverse=True)
        if not wanted:
            return
        if self.store.damaged:
            tqdm.write(self.store.damage())
        tqdm.write(f"Text embeds: {self.plan(texts)}, in batches of {batch_size}")
        if cut := [text for text in wanted if lengths[text] > limit]:
            tqdm.write(f"Text embeds: {cut_note(cut, lengths[cut[0]], limit)}")
        # While a thread looks at a batch and writes it, the next one is encoded.
        with (
            self.store.writer() as writer,
            tqdm(total=len(wanted), desc="text embeds", unit="caption") as bar,
            ThreadPoolExecutor(1, "embeds") as thread,
        ):
            written = None
            for start in range(0, len(wanted), batch_size):
                batch = wanted[start : start + batch_size]
                began = time.perf_counter()
                embeds = encode(batch)
                if start == 0:
                    tqdm.write(self._announcement(embeds, len(wanted), time.perf_counter() - began))
                if written:
                    written.result()
                written = thread.submit(self._add, writer, batch, embeds)
                bar.update(len(batch))
            written.result()

    def read(self, texts: Sequence[str], out: torch.Tensor | None = None) -> torch.Tensor:
        """The embeddings of `texts` as bf16 [B, 77, D], bit for bit as they were encoded if so they are stored.

        `out` (contiguous, at least B rows) is filled and its first B rows are returned; without it the tensor is new.

        Raises:
            KeyError: a text was never encoded; the message shows it.
        """
        if out is None:
            out = torch.empty(len(texts), *self.row_shape, dtype=torch.bfloat16)
        if len(out) < len(texts):
            raise ValueError(f"{len(texts)} captions do not fit into {len(out)} rows")
        filled, keys = out[: len(texts)], [text_key(text) for text in texts]
        try:
            records = self.store.records(keys)
        except KeyError as error:
            text = texts[keys.index(error.args[0])]
            raise KeyError(f"no embedding was made for the caption {text!r}") from None
        self._storage.unpack([record.content for record in records], filled)
        return filled

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one embedding, (77, D).

        Raises:
            LookupError: the cache is empty.
        """
        for key in self.store:
            length, stored = self.store.shape(key)
            return length, self._storage.width(stored)
        raise LookupError(f"the text-embed cache {self.store.folder} is empty: build it first")

    def _add(self, writer: Writer, texts: Sequence[str], embeds: torch.Tensor) -> None:
        if embeds.dtype != torch.bfloat16 or embeds.ndim != 3 or len(embeds) != len(texts):
            found = f"{embeds.dtype} {list(embeds.shape)}"
            raise ValueError(f"the text encoder returned {found} for {len(texts)} captions, not bfloat16 [B, 77, D]")
        finite = torch.isfinite(embeds).flatten(1).all(1)
        for text, row, is_finite in zip(texts, self._storage.packed(embeds), finite.tolist()):
            if not is_finite:
                raise NonFiniteEmbedding(
                    f"the text encoder returned inf or NaN for the caption {text!r}: its weights are damaged, or were"
                    " once rounded to fp16, which T5 overflows"
                )
            writer.add(text_key(text), row)

    def _announcement(self, first: torch.Tensor, total: int, seconds: float) -> str:
        size = first[0, ..., 0].numel() * self._storage.nbytes(first.shape[-1]) * total
        estimate = math.ceil(seconds * total / len(first))
        return f"Text embeds: {size / 1e6:,.1f} MB on disk, at most about {tqdm.format_interval(estimate)}"


def stored_texts(folder: Path, storage: str) -> set[str]:
    """The keys of all texts whose embeds are kept in this way below a folder, whichever encoder made them.

    By the headers of the shards alone: to tell the user, and for nothing else.
    """
    found = (records for place in folder.glob("*") if place.is_dir() for records in claimed_records(place))
    own = _recipe({}, storage)
    return {key for recipe, keys in found if all(recipe.get(part) == own.get(part) for part in ALIKE) for key in keys}


def text_key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _recipe(fingerprint: Mapping[str, str], storage: str = "bf16") -> dict[str, str]:
    """What determines what is stored of a text."""
    return {"kind": "text embeds", **fingerprint, **STORAGES[storage].recipe}


def _place(folder: Path, recipe: Mapping[str, str]) -> Path:
    return folder / hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=10).hexdigest()


def _why(key: str, damaged: set[str], others: Mapping[str, str]) -> str | None:
    """Why a text is not encoded yet, as far as shards tell."""
    if key in damaged:
        return "of a damaged shard"
    return f"so far with another {others[key]}" if key in others else None


def cut_note(texts: Sequence[str], longest: int, limit: int) -> str:
    """What to say of texts that have more tokens than are read, with some of them as examples."""
    examples = ", ".join(repr(shorten(text, EXAMPLE_LETTERS, placeholder=" ...")) for text in texts[:NAMED])
    return (
        f"{len(texts):,} captions have more than the {limit} tokens that are read (the longest {longest}),"
        f" and what comes after those is left out: {examples}{', ...' if len(texts) > NAMED else ''}"
    )
