import os
import random
import shutil

import pytest
import torch
from diffusers import IFPipeline

from helpers.models.families import SPECS
from helpers.models.fingerprints import fingerprint_files

TEXT = SPECS["deepfloyd-i"].text
CAPTIONS = ["A Photo of a RED Circle!", "", "blurry, ugly   <b>cropped</b>", "a red circle " * 60]


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return TEXT.load(tiny_model, torch.device("cpu"))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_embeddings_are_those_of_diffusers_own_pipeline(tiny_model, encoder, caption):
    """Cleaned, 77 positions, with the mask: bit for bit what IFPipeline itself would feed to the UNet."""
    pipeline = IFPipeline.from_pretrained(
        tiny_model, dtype=torch.bfloat16, unet=None, safety_checker=None, requires_safety_checker=False
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, clean_caption=True)
    found = encoder([TEXT.prepare(caption)])
    assert found.shape == (1, 77, 64) and found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_a_caption_is_encoded_the_same_alone_and_in_a_batch(encoder):
    texts = [TEXT.prepare(caption) for caption in CAPTIONS]
    together = encoder(texts).float()
    for row, text in zip(together, texts):
        torch.testing.assert_close(encoder([text])[0].float(), row, atol=0.02, rtol=0.02)


def test_padded_positions_depend_on_the_text_so_none_may_be_cut_off(encoder):
    one, other = encoder(["a red circle", "a blue square"]).float()
    assert (one[40:] - other[40:]).abs().max() > 0.01


def test_length_counts_tokens_beyond_the_limit(encoder):
    assert encoder.length_of("a red circle") < 10
    assert encoder.length_of("a red circle " * 60) > 77


def test_fingerprint_passes_over_no_matrix_of_the_published_encoder(tmp_path):
    """Files of its proportions: 9.9 GB, of which one of the smallest matrices, 33.5 MB, is another."""
    path, size, matrix = tmp_path / "model.safetensors", 99_000_000, 335_000
    path.touch()
    os.truncate(path, size)
    plain = fingerprint_files(tmp_path)
    for start in random.Random(0).choices(range(size - matrix), k=8):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * matrix)
        assert fingerprint_files(tmp_path) != plain
        with path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(matrix))
    assert fingerprint_files(tmp_path) == plain


@pytest.mark.parametrize("changed", ["text_encoder/model.safetensors", "tokenizer/tokenizer_config.json"])
def test_fingerprint_is_stable_and_changes_with_the_weights_and_the_tokenizer(tiny_model, tmp_path, changed):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    assert TEXT.fingerprint(copy) == TEXT.fingerprint(tiny_model)
    path = copy / changed
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert TEXT.fingerprint(copy) != TEXT.fingerprint(tiny_model)
