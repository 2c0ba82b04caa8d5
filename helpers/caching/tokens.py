"""The captions' tokens, in memory: what a text encoder in training reads, in place of cached embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tqdm import tqdm

from helpers.caching.embeds import cut_note
from helpers.models.text import Tokenizer

BATCH = 1024
"""Captions that are tokenized at a time."""


class Tokens:
    """Prepared texts as tokens, each tokenized once; 0.3 KB a caption. It is read as an `EmbedCache` is."""

    dtype = torch.int64

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer) -> None:
        """Captions that are longer than what is read of them are told."""
        unique = list(dict.fromkeys(texts))
        self._rows = {text: row for row, text in enumerate(unique)}
        self._tokens = torch.empty(len(unique), tokenizer.length, dtype=torch.int32)
        lengths: list[int] = []
        with tqdm(total=len(unique), desc="tokenizing captions", unit="caption", leave=False, delay=1) as bar:
            for start in range(0, len(unique), BATCH):
                batch = unique[start : start + BATCH]
                self._tokens[start : start + len(batch)] = tokenizer(batch).input_ids
                lengths += tokenizer.lengths(batch)
                bar.update(len(batch))
        longest_first = sorted(range(len(unique)), key=lengths.__getitem__, reverse=True)
        cut = [unique[row] for row in longest_first if lengths[row] > tokenizer.length]
        if cut:
            tqdm.write(f"Captions: {cut_note(cut, lengths[longest_first[0]], tokenizer.length)}")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one caption's tokens, (77,)."""
        return tuple(self._tokens.shape[1:])

    def read(self, texts: Sequence[str], out: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens of `texts`, int64 [B, 77]; as `EmbedCache.read`, of which `out` is filled."""
        tokens = self._tokens[[self._rows[text] for text in texts]].to(self.dtype)
        return tokens if out is None else out[: len(texts)].copy_(tokens)
