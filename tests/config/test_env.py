"""Exports to flags: values, names that are a slip away, and names that belong to others."""

from __future__ import annotations

import json

import pytest

from helpers.config.env import command_line, known_exports, misspelled, strange
from helpers.config.load import ConfigError, load
from helpers.config.paths import ROOT

NOTHING = frozenset()


@pytest.fixture
def environ(tmp_path):
    path = tmp_path / "backends.json"
    path.write_text(json.dumps([{"id": "a", "instance_data_dir": str(tmp_path)}]), encoding="utf-8")
    return {"MODEL_TYPE": "deepfloyd-lora", "DATALOADER_CONFIG": str(path)}


def problems_of(environ, *argv):
    with pytest.raises(ConfigError) as caught:
        command_line(argv, environ, NOTHING, "python")
    return list(caught.value.problems)


def test_exports_become_flags_and_typed_flags_replace_them(environ):
    words = command_line(["--seed", "5"], environ | {"TRAINING_SEED": "4", "LORA_RANK": "8"}, NOTHING, "python")
    assert words[:2] == ["python", "train_sd2x.py"]
    assert "--lora_rank=8" in words and words[-2:] == ["--seed", "5"] and "--seed=4" not in words


def test_an_empty_export_is_not_set(environ):
    words = command_line([], environ | {"TRAINING_SEED": "", "USE_XFORMERS": " ", "USE_EMA": ""}, NOTHING, "python")
    assert load(words[2:]).config.training.seed == 42


@pytest.mark.parametrize("word, mechanism", [("true", "xformers"), ("YES", "xformers"), ("0", "sdpa"), ("", "sdpa")])
def test_use_xformers_is_a_switch(environ, word, mechanism):
    words = command_line([], environ | {"USE_XFORMERS": word}, NOTHING, "python")
    assert load(words[2:]).config.training.attention_mechanism == mechanism


def test_extra_flags_are_split_as_a_shell_does_and_typed_ones_win(environ):
    extra = environ | {"TRAINER_EXTRA_ARGS": "--validation_prompt 'two words' --seed=4", "LORA_RANK": "8"}
    config = load(command_line(["--seed=5"], extra, NOTHING, "python")[2:]).config
    assert (config.validation.validation_prompt, config.training.seed) == ("two words", 5)


@pytest.mark.parametrize("exports", [
    {"TRAINING_DYNAMO_BACKEND": "inductor"}, {"ACCELERATE_EXTRA_ARGS": "--main_process_port 29501"},
])
def test_accelerate_is_used_only_for_what_needs_it(environ, exports):
    direct = command_line([], environ | {"TRAINING_NUM_PROCESSES": "1"}, NOTHING, "python")
    launched = command_line([], environ | exports, NOTHING, "python")
    assert direct[1] == "train_sd2x.py"
    assert launched[1:3] == ["-m", "accelerate.commands.launch"]
    assert {"--num_processes=1", "--num_machines=1"} <= set(launched)
    assert any(next(iter(exports.values())).split()[-1] in word for word in launched)


def test_the_mode_of_the_compiler_reaches_accelerate(environ):
    exports = {"TRAINING_DYNAMO_BACKEND": "inductor", "TRAINING_DYNAMO_MODE": "reduce-overhead"}
    assert "--dynamo_mode=reduce-overhead" in command_line([], environ | exports, NOTHING, "python")


@pytest.mark.parametrize("exports, words", [
    ({"TRAINING_DYNAMO_BACKEND": "inductor", "TRAINING_DYNAMO_MODE": "fast"}, "TRAINING_DYNAMO_MODE: found 'fast'"),
    ({"TRAINING_DYNAMO_MODE": "reduce-overhead"}, "found reduce-overhead without TRAINING_DYNAMO_BACKEND"),
    ({"USE_XFORMERS": "maybe"}, "found 'maybe' in export USE_XFORMERS, needs true or false"),
    ({"USE_XFORMERS": "true", "ATTENTION_MECHANISM": "sdpa"}, "contradict each other"),
    ({"MINIMUM_RESOLUTION": "64", "MINIMUM_IMAGE_SIZE": "72"}, "contradict each other"),
    ({"TRAINING_NUM_PROCESSES": "many"}, "export TRAINING_NUM_PROCESSES: found 'many', needs a whole number"),
    ({"TRAINING_NUM_MACHINES": "2"}, "all processes train on one machine: set it to 1"),
    ({"TEXT_ENCODER_BATCHSIZE": "2"}, "did you mean TEXT_ENCODER_BATCH_SIZE?"),
    ({"TRAINER_EXTRA_ARGS": "--help"}, "type ./train.sh --help"),
    ({"TRAINER_EXTRA_ARGS": "'open"}, "export TRAINER_EXTRA_ARGS"),
    ({"ACCELERATE_EXTRA_ARGS": "'open"}, "export ACCELERATE_EXTRA_ARGS"),
    ({"VALIDATION_STEP": "5"}, "export VALIDATION_STEP: not an option; did you mean VALIDATION_STEPS?"),
    ({"PUSH_CHECKPOINTS": "true"}, "found true without push_to_hub: set that to true"),
    ({"PUSH_TO_HUB": "true", "HUB_MODEL_NAME": "my subject"}, "found 'my subject', needs a name for a repository"),
    ({"MODEL_TYPE": "deepfloyd-full", "MAX_GRAD_NORM": "0", "OPTIMIZER_RELEASE_GRADIENTS": "true",
      "TRAINING_NUM_PROCESSES": "2"}, "found true beside 2 processes"),
    ({"CONTROLNET": "true"}, "no ControlNet can be made for DeepFloyd IF stage I"),
    ({"TEXT_ENCODER_LIMIT": "25"}, "TRAIN_TEXT_ENCODER=true trains a LoRA"),
    ({"DELETE_UNWANTED_IMAGES": "true"}, "the dataset is only read"),
])
def test_a_wrong_export_is_answered_in_words(environ, exports, words):
    problems = problems_of(environ | exports)
    assert len(problems) == 1 and words in problems[0]


def test_how_it_is_started_is_held_against_the_options_beside_all_other_problems(environ):
    graphs = {"TRAINING_DYNAMO_BACKEND": "inductor", "TRAINING_DYNAMO_MODE": "reduce-overhead"}
    typo = {"GRADIENT_ACCUMULATION_STEPS": "4", "RESOLUTION_TYPE": "pixels"}
    problems = " ".join(problems_of(environ | graphs | typo))
    assert "found 4 beside TRAINING_DYNAMO_MODE=reduce-overhead" in problems and "pixels" in problems


def test_what_asks_for_nothing_passes(environ):
    off = {"CONTROLNET": "", "TEXT_ENCODER_LIMIT": "", "DELETE_SMALL_IMAGES": "false"}
    off |= {"TEXT_ENCODER_1_PRECISION": "no_change"}
    assert command_line([], environ | off, NOTHING, "python") == command_line([], environ, NOTHING, "python")


def test_options_that_share_a_prefix_with_refused_names_pass(environ):
    exports = environ | {"TEXT_ENCODER_DEVICE": "cpu", "TEXT_ENCODER_BATCH_SIZE": "2"}
    data = load(command_line([], exports, NOTHING, "python")[2:]).config.data
    assert (data.text_encoder_device, data.text_encoder_batch_size) == ("cpu", 2)


def test_problems_of_exports_flags_and_files_come_together(environ, tmp_path):
    (tmp_path / "backends.json").write_text('[{"id": "a", "instance_data_dir": "/nowhere"}]', encoding="utf-8")
    exports = {"VALIDATION_STEP": "5", "LORA_RANK": "x", "TRAINING_NUM_MACHINES": "2", "ACCELERATE_EXTRA_ARGS": "'"}
    assert len(problems_of(environ | exports, "--lr_ned=3")) == 6


@pytest.mark.parametrize("name", [
    "HF_TOKEN", "HF_HOME", "WANDB_PROJECT", "CUDA_VISIBLE_DEVICES", "BASE_DIR", "PATH", "HOME", "LANG", "SEED",
    "EDITOR", "LOCAL_RANK", "CCACHE_DIR", "DATA_DIR", "MY_DIR", "TERM", "PYTHONPATH", "OMP_NUM_THREADS", "NUM_WORKERS",
])
@pytest.mark.parametrize("outer", [True, False])
def test_other_peoples_names_are_left_alone(name, outer):
    assert misspelled({name: "x"}, frozenset({name}) if outer else NOTHING) == []


@pytest.mark.parametrize("name", ["VALIDATION_STEP", "VALIDAITON_STEPS", "LEARNING_RATE_EN", "TRAIN_BATCHSIZE"])
@pytest.mark.parametrize("outer", [True, False])
def test_a_slip_in_a_long_name_is_seen_wherever_it_was_set(name, outer):
    assert len(misspelled({name: "x"}, frozenset({name}) if outer else NOTHING)) == 1


def test_a_slip_in_a_short_name_counts_only_in_the_env_file():
    assert misspelled({"LORA_RNK": "x"}, NOTHING) and not misspelled({"LORA_RNK": "x"}, frozenset({"LORA_RNK"}))


def test_names_that_nobody_reads_are_mentioned():
    environ = {"MY_THING": "1", "BASE_DIR": "/", "HF_HOME": "/", "LORA_RANK": "1", "OLD": "1"}
    assert strange(environ, {"OLD"}) == ["MY_THING"]


def test_the_example_shows_every_export_and_no_other():
    text = (ROOT / "sd2x-env.sh.example").read_text(encoding="utf-8")
    shown = {line.split("export ")[1].split("=")[0] for line in text.splitlines() if "export " in line and "=" in line}
    ours = known_exports() - {"ENV_FILE"}
    assert shown - {"BASE_DIR"} <= ours
    assert ours <= shown
