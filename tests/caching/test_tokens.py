"""The captions' tokens: what CLIP's pipelines make of them, read as embeddings are."""

import pytest
import torch
from transformers import CLIPTokenizer

from helpers.caching.tokens import BATCH, Tokens
from helpers.models.families import SPECS

TEXTS = ["", "a red circle", "A Blue Square", "a red circle"]


@pytest.fixture
def tokenizer(tiny_sd):
    return SPECS["sd"].text.tokenizer(tiny_sd)


def test_tokens_are_those_of_the_pipeline_padded_and_cut_to_what_is_read(tokenizer, tiny_sd):
    texts = [*TEXTS, "circle " * 100]
    reference = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    expected = reference(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    tokens = Tokens(texts, tokenizer)
    assert tokens.row_shape == (77,) and tokens.dtype == torch.int64
    assert torch.equal(tokens.read(texts), expected) and tokens.read(texts).dtype == torch.int64


def test_they_are_read_into_a_buffer_in_the_order_that_is_asked_for(tokenizer):
    texts = [f"a circle {number}" for number in range(BATCH + 3)]  # more than are tokenized at a time
    tokens, out = Tokens(texts, tokenizer), torch.zeros(4, 77, dtype=torch.int64)
    wanted = [texts[-1], texts[0], texts[BATCH]]
    assert tokens.read(wanted, out).data_ptr() == out.data_ptr()
    assert torch.equal(out[:3], tokenizer(wanted).input_ids) and not out[3].any()


def test_captions_that_are_too_long_are_told_with_the_longest_first(tokenizer, capsys):
    Tokens([*TEXTS, "square " * 80, "circle " * 100], tokenizer)
    said = capsys.readouterr()
    assert "2 captions have more than the 77 tokens that are read (the longest 102)" in said.out + said.err
    assert (said.out + said.err).index("circle circle") < (said.out + said.err).index("square square")
    Tokens(TEXTS, tokenizer)
    said = capsys.readouterr()
    assert "captions have more" not in said.out + said.err
