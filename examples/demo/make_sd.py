"""Make the demo's untrained Stable Diffusion: its architecture, tiny widths, random weights, a tokenizer of its own.

    python -m examples.demo.make_sd FOLDER [--version 2] [--prediction-type v_prediction]

`examples.demo.train_vae` then trains its VAE.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.demo.vocabulary import words

TEXT_WIDTH = 64
TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
PADDING = {1: END, 2: "!"}
"""What fills a caption up to 77 tokens, by version."""

VAE = {
    "sample_size": 128,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
BOTH_UNETS = {
    "sample_size": 16,
    "block_out_channels": (32, 48, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
}
UNETS = {
    1: BOTH_UNETS | {"attention_head_dim": 2},
    2: BOTH_UNETS | {"attention_head_dim": (2, 3, 4), "use_linear_projection": True},
}
"""SD 1.x's and 2.x's blocks, tiny. Their `attention_head_dim` is the number of heads, and so it is here."""

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
"""SD 1.5's own scheduler, whose config has `clip_sample` though PNDM does not use it."""


def tokenizer(version: int) -> CLIPTokenizer:
    """CLIP's own rules with few pieces; unknown words fall apart into letters and beginnings of known ones."""
    letters = sorted(ByteLevel.alphabet())  # "!" is the first, as in CLIP's own
    merges = merges_of(words())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocabulary, list(merges), pad_token=PADDING[version], model_max_length=TOKENS)


def merges_of(words: list[str]) -> dict[tuple[str, str], int]:
    """Byte-pair merges and their ranks, after which each word is one token.

    A later merge has a lower rank, so it never acts in a word that those before it make whole.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := split(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    return ranks


def split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of a word after all merges, at each turn the one that comes first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, i = min(known)
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
    return pieces


def text_encoder(pieces: CLIPTokenizer) -> CLIPTextModel:
    """A random CLIP: it never learns, and need not, for its outputs differ by word."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pieces),
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=pieces.bos_token_id,
            eos_token_id=pieces.eos_token_id,
            pad_token_id=pieces.pad_token_id,
        )
    )
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)  # CLIP's own 0.02 drowns the words in the layers' sums
    return encoder.eval()


def make(
    folder: Path, seed: int = 0, prediction_type: str = "epsilon", version: int = 1
) -> StableDiffusionPipeline:
    """Write an untrained pipeline for `StableDiffusionPipeline.from_pretrained(folder)`; the seed gives its weights."""
    torch.manual_seed(seed)
    pieces = tokenizer(version)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder(pieces),
        tokenizer=pieces,
        unet=UNet2DConditionModel(**UNETS[version]),
        scheduler=PNDMScheduler.from_config(SCHEDULER | {"prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    pieces.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's untrained Stable Diffusion.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", type=int, choices=sorted(UNETS), default=1)
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.seed, arguments.prediction_type, arguments.version)


if __name__ == "__main__":
    main()
