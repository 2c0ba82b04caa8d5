"""From captions to the text embeddings that a UNet attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from helpers.captions.cleaning import clean
from helpers.models.errors import unfit
from helpers.models.fingerprints import fingerprint_files

DTYPE = torch.bfloat16
"""What an encoder computes in and embeds are kept in: T5 overflows in float16."""


@dataclass(frozen=True)
class T5:
    """DeepFloyd IF's text side: cleaned captions, always `length` positions, the attention mask given to T5 alone."""

    length: int = 77
    cleaning: str = "deepfloyd-if, twice"  # what `prepare` does, by a name that never changes its meaning

    def prepare(self, caption: str) -> str:
        """The caption as IF was trained to read it: lower-cased and cleaned."""
        return clean(caption)

    def fingerprint(self, folder: Path, variant: str | None = None) -> dict[str, str]:
        """What determines an embedding besides its text: cached ones are used again only where all of it is equal.

        Of the encoder only the files that `load` reads with this variant count: the folder may hold several.
        """
        return {
            "text_encoder": fingerprint_files(folder / "text_encoder", _encoder_files(variant)),
            "tokenizer": fingerprint_files(folder / "tokenizer"),
            "length": str(self.length),
            "cleaning": self.cleaning,
            "dtype": str(DTYPE).removeprefix("torch."),
        }

    def length_counter(self, tokenizer: Path) -> Callable[[str], int]:
        """From a prepared text to its tokens, before any are cut off, by the tokenizer in a folder."""
        return partial(_length, AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False))

    def load(self, folder: Path, device: torch.device, variant: str | None = None) -> T5Encoder:
        return T5Encoder(folder, self.length, device, variant)


class T5Encoder:
    """A loaded T5 and its tokenizer. Drop the last reference to it to free the memory."""

    def __init__(self, folder: Path, length: int, device: torch.device, variant: str | None) -> None:
        self.length = length
        # Said outright, since left open it asks at the console whether to run the code that a tokenizer brings along.
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
            # dtype at load, not a cast after it: T5 keeps some of its weights in float32 on purpose.
            model = T5EncoderModel.from_pretrained(
                folder / "text_encoder", dtype=DTYPE, variant=variant, use_safetensors=True
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # tokenizers raises a bare one
            raise unfit("the text encoder or its tokenizer", folder, error) from error
        self.model = model.to(device).eval()

    def length_of(self, text: str) -> int:
        """Tokens of `text`, before any are cut off."""
        return _length(self.tokenizer, text)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode prepared texts to bfloat16 `[B, length, D]` on the CPU.

        All positions count, the padded ones too: what T5 puts there depends on the text, and IF's UNet attends to them.
        """
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return hidden.to("cpu", DTYPE)


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text).input_ids)


def _encoder_files(variant: str | None) -> tuple[str, ...]:
    """The names, as patterns, of the files that transformers reads for an encoder of this variant."""
    infix = f".{variant}" if variant else ""
    shards = [f"model.safetensors.index{infix}.json", f"model{infix}-*.safetensors"]
    return ("config.json", f"model{infix}.safetensors", *shards)
