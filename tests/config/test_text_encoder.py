"""Options of an adapter of the text encoder: what they mean, and what is said where they cannot be had."""

import pytest

from helpers.config.load import ConfigError, load


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(list(words))
    [problem] = caught.value.problems
    return problem


TRAINED = ("--model_type=lora", "--train_text_encoder")


@pytest.mark.parametrize("flags, named, words", [
    (["--model_type=deepfloyd-lora", "--train_text_encoder"], "train_text_encoder", "T5-XXL, whose 4.8 billion"),
    (["--model_type=deepfloyd-stage2-lora", "--train_text_encoder"], "train_text_encoder", "set it to false"),
    (["--model_type=full", "--train_text_encoder"], "train_text_encoder", "trains no adapter"),
    (["--model_type=full", "--use_bitfit", "--train_text_encoder"], "train_text_encoder", "trains no adapter"),
    (["--model_type=full", "--text_encoder_learning_rate=1e-6"], "text_encoder_learning_rate", "trains no adapter"),
    (["--model_type=lora", "--text_encoder_lora_rank=4"], "text_encoder_lora_rank", "set train_text_encoder to true"),
    (["--model_type=lora", "--text_encoder_learning_rate=1e-6"], "text_encoder_learning_rate", "where it does nothing"),
    ([*TRAINED, "--text_encoder_device=cpu"], "text_encoder_device", "remove it"),
    ([*TRAINED, "--text_encoder_batch_size=2"], "text_encoder_batch_size", "remove it"),
    ([*TRAINED, "--text_embeds_storage=int8"], "text_embeds_storage", "with which the captions of each batch"),
    ([*TRAINED, "--text_encoder_learning_rate=1"], "text_encoder_learning_rate", "type a rate near 4e-06"),
    ([*TRAINED, "--optimizer=prodigy", "--text_encoder_learning_rate=0.5"], "text_encoder_learning_rate", "one rate"),
])
def test_what_cannot_be_trained_is_refused_by_its_name_with_what_to_do(flags, named, words):
    problem = refused(*flags)
    assert problem.startswith(f"--{named} (export ") and words in problem


@pytest.mark.parametrize("flags", [
    ["--text_encoder_lora_rank=4", "--text_encoder_lora_alpha=2", "--text_encoder_learning_rate=1e-6"],
    ["--use_dora"],
    ["--optimizer=prodigy"],
    ["--optimizer=prodigy", "--text_encoder_learning_rate=1"],
])
def test_the_rest_can(flags):
    assert load([*TRAINED, *flags]).config.lora.train_text_encoder
