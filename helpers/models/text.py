"""From captions to the text embeddings that a UNet attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from helpers.captions.cleaning import clean
from helpers.models.errors import load_whole, unfit
from helpers.models.fingerprints import fingerprint_files
from helpers.models.offloading import in_groups

DTYPE = torch.bfloat16
"""What embeds are kept in, and what T5 computes in: it overflows in float16."""


@dataclass(frozen=True)
class T5:
    """DeepFloyd IF's text side: cleaned captions, always `length` positions, the attention mask given to T5 alone.

    Attributes:
        width_key: where the encoder's configuration tells the width of an embedding, D.
        reader_key: where the UNet's configuration tells the width that it reads.
        published: what the published encoders take of memory, in words.
    """

    length: int = 77
    cleaning: str = "deepfloyd-if, twice"  # what `prepare` does, by a name that never changes its meaning
    width_key: str = "d_model"
    reader_key: str = "encoder_hid_dim"
    published: str = "T5-XXL takes 10 GB"

    def prepare(self, caption: str) -> str:
        """The caption as IF was trained to read it: lower-cased and cleaned."""
        return clean(caption)

    def mismatch(self, unet: Mapping[str, Any]) -> str | None:
        """Why a UNet of this configuration does not read such text; None if it does."""
        if unet.get("encoder_hid_dim_type") != "text_proj" or unet.get("addition_embed_type") != "text":
            return "their UNet has no projection of T5 embeddings"
        return None

    def fingerprint(self, folder: Path, variant: str | None = None) -> dict[str, str]:
        """What determines an embedding besides its text: cached ones are used again only where all of it is equal.

        Of the encoder only the files that `load` reads with this variant count: the folder may hold several.
        """
        return _fingerprint(self, folder, variant)

    def load(
        self, folder: Path, device: torch.device, variant: str | None = None, by_groups: bool = False
    ) -> TextEncoder:
        """The encoder; `by_groups`: on the device only a layer at a time, where it does not fit as a whole."""
        # dtype at load, not a cast after it: T5 keeps some of its weights in float32 on purpose.
        return TextEncoder(T5EncoderModel, self.length, folder, device, variant, DTYPE, True, by_groups)


@dataclass(frozen=True)
class CLIP:
    """Stable Diffusion's text side: captions as they are, of which CLIP reads 77 tokens with their begin and end.

    Attributes: as those of `T5`.
    """

    length: int = 77
    cleaning: str = "none"
    width_key: str = "hidden_size"
    reader_key: str = "cross_attention_dim"
    published: str = "ones take 0.5 GB (1.x) and 1.4 GB (2.x)"

    def prepare(self, caption: str) -> str:
        """The caption itself: CLIP's tokenizer makes it lower-case."""
        return caption

    def mismatch(self, unet: Mapping[str, Any]) -> str | None:
        """Why a UNet of this configuration does not read such text; None if it does."""
        if unet.get("encoder_hid_dim") is not None:
            return "their UNet reads another text encoder's embeddings"
        if unet.get("addition_embed_type") is not None:
            return "their UNet is told sizes or pooled text besides, as Stable Diffusion XL's is"
        return None

    def fingerprint(self, folder: Path, variant: str | None = None) -> dict[str, str]:
        """As `T5.fingerprint`."""
        return _fingerprint(self, folder, variant)

    def load(
        self, folder: Path, device: torch.device, variant: str | None = None, by_groups: bool = False
    ) -> TextEncoder:
        """As `T5.load`."""
        # CLIP is small: in float32 its embeddings lose no more than bfloat16 rounds of them.
        return TextEncoder(CLIPTextModel, self.length, folder, device, variant, torch.float32, by_groups=by_groups)

    def tokenizer(self, folder: Path) -> Tokenizer:
        """What reads captions for a text encoder in training."""
        with _words_for_any_error(folder):
            return Tokenizer(folder, self.length)

    def trainable(self, folder: Path, dtype: torch.dtype, variant: str | None = None) -> CLIPTextModel:
        """The encoder without its tokenizer, to be trained as a part of a `Denoiser`."""
        with _words_for_any_error(folder):
            return _encoder(CLIPTextModel, folder, dtype, variant)

    def untrained(self, config: Path) -> CLIPTextModel:
        """An encoder of this architecture, its `config.json`, with random weights."""
        with _words_for_any_error(config.parent.parent):
            return CLIPTextModel(CLIPTextConfig.from_json_file(config))


class TextEncoder:
    """A loaded text encoder and its tokenizer. Drop the last reference to it to free the memory."""

    def __init__(
        self,
        kind: type[PreTrainedModel],
        length: int,
        folder: Path,
        device: torch.device,
        variant: str | None,
        dtype: torch.dtype,
        masks_padding: bool = False,
        by_groups: bool = False,
    ) -> None:
        self.length = length
        self.device = device
        self.masks_padding = masks_padding
        with _words_for_any_error(folder):
            self.tokenizer = Tokenizer(folder, length)
            model = _encoder(kind, folder, dtype, variant)
        self.model = (in_groups(model, device) if by_groups else model.to(device)).eval()

    def length_of(self, text: str) -> int:
        """Tokens of `text`, before any are cut off."""
        [length] = self.tokenizer.lengths([text])
        return length

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode prepared texts to bfloat16 `[B, length, D]` on the CPU.

        All positions count, the padded ones too: what the encoder puts there depends on the text, and the UNet attends
        to them.
        """
        tokens = self.tokenizer(texts).to(self.device)
        mask = tokens.attention_mask if self.masks_padding else None
        return self.model(tokens.input_ids, attention_mask=mask).last_hidden_state.to("cpu", DTYPE)


class Tokenizer:
    """From prepared texts to the tokens that an encoder reads, always `length` of them."""

    def __init__(self, folder: Path, length: int) -> None:
        self.length = length
        self._tokenizer = _tokenizer(folder / "tokenizer")

    def __call__(self, texts: Sequence[str]) -> BatchEncoding:
        """`input_ids`, int64 `[B, length]`, and their `attention_mask`."""
        return self._tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, before any are cut off."""
        return [len(tokens) for tokens in self._tokenizer(list(texts)).input_ids]


def length_counter(tokenizer: Path) -> Callable[[str], int]:
    """From a prepared text to its tokens, before any are cut off, by the tokenizer in a folder."""
    return partial(_length, _tokenizer(tokenizer))


def bare_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder of the pipeline in a folder by its shapes alone, to find places for an adapter's layers."""
    with torch.device("meta"):
        return CLIP().untrained(folder / "text_encoder" / "config.json")


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text).input_ids)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Said outright, since left open it asks at the console whether to run the code that a tokenizer brings along.
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _encoder(
    kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype, variant: str | None
) -> PreTrainedModel:
    return load_whole(kind, folder / "text_encoder", dtype=dtype, variant=variant)


@contextmanager
def _words_for_any_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tokenizers raises a bare one
        raise unfit("the text encoder or its tokenizer", folder, error) from error


def _fingerprint(text: T5 | CLIP, folder: Path, variant: str | None) -> dict[str, str]:
    return {
        "text_encoder": fingerprint_files(folder / "text_encoder", _encoder_files(variant)),
        "tokenizer": fingerprint_files(folder / "tokenizer"),
        "length": str(text.length),
        "cleaning": text.cleaning,
        "dtype": str(DTYPE).removeprefix("torch."),
    }


def _encoder_files(variant: str | None) -> tuple[str, ...]:
    """The names, as patterns, of the files that transformers reads for an encoder of this variant."""
    infix = f".{variant}" if variant else ""
    shards = [f"model.safetensors.index{infix}.json", f"model{infix}-*.safetensors"]
    return ("config.json", f"model{infix}.safetensors", *shards)
