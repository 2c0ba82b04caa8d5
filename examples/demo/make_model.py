"""Make the demo's untrained stage I or II: IF's architecture, tiny widths, random weights, a tokenizer of its own.

    python -m examples.demo.make_model FOLDER [--stage 2]
"""

from __future__ import annotations

import argparse
import math
import string
import tempfile
from pathlib import Path

import sentencepiece
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from examples.demo.vocabulary import ENGLISH, words

TEXT_WIDTH = 64
VOCABULARY = 512

BOTH_UNETS = {
    "sample_size": 64,
    "out_channels": 6,
    "block_out_channels": (16, 24, 48, 64),
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "act_fn": "gelu",
    "norm_num_groups": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": TEXT_WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "resnet_time_scale_shift": "scale_shift",
}
UNETS = {
    1: BOTH_UNETS | {
        "in_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("SimpleCrossAttnDownBlock2D",) * 2,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 2,
    },
    2: BOTH_UNETS | {
        "in_channels": 6,
        "class_embed_type": "timestep",
        "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",),
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 3,
        "mid_block_scale_factor": math.sqrt(2),
        "resnet_out_scale_factor": math.sqrt(2),
        "resnet_skip_time_act": True,
    },
}
"""IF-I-M's and IF-II-M's blocks and conditioning, tiny.

Attention starts at 16 px in stage I, at 8 px in stage II, which draws 256 px too: any earlier it would take half the time.
"""

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "clip_sample": True,
}
"""IF stage I's own scheduler."""
SCHEDULERS = {1: SCHEDULER, 2: SCHEDULER | {"sample_max_value": 1.0}}
NOISING = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "thresholding": False}
"""What noises IF stage II's low-resolution image."""


def tokenizer(folder: Path) -> T5Tokenizer:
    """Train sentencepiece into `folder`; unknown words fall apart into letters."""
    whole = [f"\u2581{word}" for word in words()]  # sentencepiece marks the space before a word
    # As good as no normalization, of which some versions of tokenizers cannot read the empty table.
    rules = folder / "rules.tsv"
    rules.write_text("3000\t20\n", "utf-8")  # an ideographic space is a space
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=("x" + word for word in ENGLISH.split() * 9),
        model_prefix=str(folder / "spiece"),
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        normalization_rule_tsv=str(rules),
        user_defined_symbols=whole,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def text_encoder(vocabulary: int) -> T5EncoderModel:
    """A random T5: it never learns, and need not, for its outputs differ by word."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    ).eval()


def make(folder: Path, stage: int = 1, seed: int = 0) -> DiffusionPipeline:
    """Write an untrained pipeline for `DiffusionPipeline.from_pretrained(folder)`; the seed gives its weights.

    Both stages of one seed have the same text encoder.
    """
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        pieces = tokenizer(Path(scratch))
        components = dict(
            tokenizer=pieces,
            text_encoder=text_encoder(len(pieces)),
            unet=UNet2DConditionModel(**UNETS[stage]),
            scheduler=DDPMScheduler(**SCHEDULERS[stage]),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
        if stage == 1:
            pipeline = IFPipeline(**components)
        else:
            pipeline = IFSuperResolutionPipeline(**components, image_noising_scheduler=DDPMScheduler(**NOISING))
        pipeline.save_pretrained(folder)
        piece_model = (Path(scratch) / "spiece.model").read_bytes()
    (folder / "tokenizer" / "spiece.model").write_bytes(piece_model)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's untrained model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", type=int, choices=sorted(UNETS), default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.stage, arguments.seed)


if __name__ == "__main__":
    main()
