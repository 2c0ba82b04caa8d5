"""Typed options from flags and config.json: values, defaults, sources, and every problem in one list."""

from __future__ import annotations

import json

import pytest

from helpers.config import checks
from helpers.config.load import ENV_FILE_MARK, ConfigError, as_json, describe, load, load_all
from helpers.config.options import ROWS
from helpers.config.paths import ROOT
from helpers.sizes import Size

LORA = "--model_type=deepfloyd-lora"
RELEASED = ("--model_type=deepfloyd-full", "--optimizer_release_gradients", "--max_grad_norm=0")


def problems_of(*flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load([LORA, *flags])
    return list(caught.value.problems)


def written(tmp_path, content) -> str:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return f"--config={path}"


def test_a_model_type_alone_is_enough():
    config = load([LORA]).config
    assert config.data.resolution == 64
    assert config.validation.validation_resolution == (Size(64, 64),)
    assert config.data.data_backend_config == ROOT / "multidatabackend_deepfloyd.json"
    assert config.training.num_train_epochs > 0 and config.training.max_train_steps == 0
    assert config.family.alignment == 8 and config.training_kind == "lora"


def test_the_config_is_frozen_and_compares_by_value():
    config = load([LORA]).config
    assert config == load([LORA, "--lr_end=0"]).config
    assert config != load([LORA, "--lr_end=1e-6"]).config
    with pytest.raises(ValueError):
        config.training.seed = 1


@pytest.mark.parametrize("word, value", [
    ("true", True), ("TRUE", True), ("1", True), ("yes", True), ("On", True),
    ("false", False), ("False", False), ("0", False), ("NO", False), ("off", False),
])
def test_switches_understand_words_in_any_case(word, value):
    assert load([LORA, f"--allow_tf32={word}"]).config.training.allow_tf32 is value
    assert load([LORA, "--allow_tf32", word]).config.training.allow_tf32 is value


@pytest.mark.parametrize("word", ["maybe", "t", "2", "", "yes please"])
def test_other_words_are_no_switch(word):
    assert problems_of(f"--allow_tf32={word}") == [
        f"{ROWS['allow_tf32'].label}: found {word!r}, needs true or false"
    ]


def test_a_switch_alone_is_on_and_leaves_the_next_flag_alone():
    config = load([LORA, "--dry_run", "--seed", "7"]).config
    assert config.run.dry_run and config.training.seed == 7


@pytest.mark.parametrize("words, check", [
    (["--check"], "table"), (["--check", "--strict"], "table"), (["--check", "json", "--strict"], "json"),
    (["--check=json"], "json"), ([], "none"),
])
def test_a_check_alone_is_one_as_a_table(words, check):
    assert load([LORA, *words]).config.run.check == check


def test_a_check_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="found 'csv', needs one of none, table, json"):
        load([LORA, "--check", "csv"])


@pytest.mark.parametrize("flags", [["--lr_end=4e-6"], ["--lr_end", "4e-6"], ["--lr_end=1", "--lr_end=4e-6"]])
def test_both_ways_to_write_a_flag_and_the_last_one_wins(flags):
    assert load([LORA, *flags]).config.optimizer.lr_end == 4e-6


def test_an_error_names_flag_export_and_key_with_what_was_found():
    assert problems_of("--lr_end=abc") == [
        '--lr_end (export LEARNING_RATE_END, key "lr_end"): found \'abc\', needs a number of at least 0'
    ]


@pytest.mark.parametrize("flag, words", [
    ("--lr_ned=1", "--lr_ned: not an option; did you mean --lr_end?"),
    ("--LEARNING_RATE_END=1", "that is the export of --lr_end"),
    ("--optimizer=adamw_bf6", "did you mean adamw_bf16?"),
    ("--train_batch_size=0", "found '0', needs a whole number of at least 1"),
    ("--train_batch_size=1.5", "needs a whole number"),
    ("--learning_rate=nan", "needs a number above 0"),
    ("--seed=-1", "needs a whole number of at least 0"),
    ("--caption_dropout_probability=1.5", "at most 1"),
    ("--mixed_precision=fp16", "type bf16"),
    ("--caption_strategy=parquet", "type textfile"),
    ("--base_model_precision=int8-quanto", "type int8"),
    ("--base_model_precision=fp8-torchao", "type int8"),
    ("--base_model_precision=nf4-bnb", "type nf4"),
    ("--base_model_precision=fp4", "needs one of no_change, int8, nf4"),
    ("--resume_from_checkpoint=checkpoint-x", "needs latest, none, or the name of a checkpoint"),
    ("--validation_resolution=64,wide", "'wide' is not a size"),
    ("--instance_prompt", "no value, needs text"),
    ("stray", "found 'stray' where a flag is expected"),
    ("--resolution=60", "type 56 or 64"),
    ("--resolution=512", "needs at most 256"),
    ("--validation_resolution=64,100x64", "instead of 100 type 96 or 104"),
    ("--validation_resolution=264", "more than 4 times the trained resolution"),
    ("--validation_guidance_rescale=0.7", "set it to 0.0"),
    ("--lr_end=1", "above the learning_rate"),
    ("--validation_prompt_library=/nowhere.json", "there is no file /nowhere.json"),
    ("--lora_rank_pattern=add_k_proj", "needs layers with their ranks, such as add_k_proj=64"),
    ("--lora_rank_pattern=to_q=0", "found 'to_q=0', needs layers with their ranks"),
    ("--lora_rank_pattern=to_q=8,to_q=16", "needs each layer once: to_q is there several times"),
])
def test_wrong_input_is_answered_in_words(flag, words):
    problems = problems_of(flag)
    assert len(problems) == 1 and words in problems[0]


@pytest.mark.parametrize("flags, words", [
    (["--max_train_steps=0", "--num_train_epochs=0"], "NUM_EPOCHS"),
    (["--optimizer=adamw", "--pure_bf16"], "type adamw_bf16"),
    (["--mixed_precision=no", "--pure_bf16"], "which is float32: set mixed_precision to bf16, or pure_bf16 to false"),
    (["--model_type=lora", "--mixed_precision=fp16", "--pure_bf16"], "fp16, which keeps what is trained in float32"),
    (["--mixed_precision=fp16", "--pure_bf16"], "text encoder and UNet of DeepFloyd IF stage I overflow: type bf16"),
    (["--lr_scheduler=constant", "--lr_warmup_steps=5"], "constant_with_warmup"),
    (["--lr_scheduler=constant", "--lr_end=1e-6"], "found 1e-06 beside lr_scheduler 'constant'"),
    (["--lr_scheduler=constant_with_warmup", "--lr_end=1e-6"], "remove it, or type cosine"),
    (["--max_train_steps=10", "--lr_warmup_steps=10"], "ends after 10 steps, as --max_train_steps"),
    (["--resolution_type=area", "--resolution=64"], "resolution_type pixel"),
    (["--soft_min_snr"], "type a snr_gamma such as 5"),
    (["--optimizer=prodigy", "--pure_bf16"], "type adamw_bf16 with learning_rate 4e-05, or set"),
    (["--optimizer=adamw_bf16", "--learning_rate=1"], "with which a rate above 0.1 breaks any model"),
    (["--optimizer=prodigy", "--learning_rate=4e-5"], "finds its own rate and multiplies it by this: type 1"),
    (["--optimizer=adafactor", "--adam_beta2=0.99"], "found 0.99 beside optimizer 'adafactor'"),
    (["--optimizer=lion", "--adam_epsilon=1e-6"], "has no such setting: remove it"),
    (["--lr_scheduler=linear", "--lr_num_cycles=2"], "has no cycles: remove it"),
    (["--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=1.5"], "type a whole number"),
    (["--lr_scheduler=sine", "--lr_num_cycles=6", "--max_train_steps=10"], "sine needs 13 steps after the warm-up"),
    (["--lr_scheduler=sine", "--max_train_steps=2"], "sine needs 3 steps after the warm-up, and there are 2"),
    (["--lr_scheduler=sine", "--lr_num_cycles=0.4"], "type 0.5 or more"),
    (["--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=7", "--max_train_steps=4"], "type a smaller number"),
    (["--lr_power=2"], "type polynomial"),
    (["--use_dora", "--model_type=deepfloyd-full"], "set it to false, or model_type to deepfloyd-lora"),
    (["--use_rslora", "--model_type=deepfloyd-stage2"], "set it to false, or model_type to deepfloyd-stage2-lora"),
    (["--lora_rank_pattern=to_q=8,add_k_prj=64"], "found the layer 'add_k_prj'"),
    (["--lora_rank_pattern=conv1=8"], "with lora_targets 'attention' it needs one of to_q"),
    (["--lora_rank=64", "--model_type=deepfloyd-full"], "found 64 beside model_type deepfloyd-full, which trains no"),
    (["--lora_alpha=16", "--model_type=deepfloyd-stage2"], "remove it, or set model_type to deepfloyd-stage2-lora"),
    (["--lora_rank_pattern=to_q=8", "--model_type=deepfloyd-full", "--use_bitfit"], "found 'to_q=8' beside"),
    (["--timestep_bias_multiplier=3"], "found 3 beside timestep_bias_strategy 'none', where it does nothing"),
    (["--timestep_bias_strategy=later", "--timestep_bias_begin=10"], "or type timestep_bias_strategy range"),
    (["--timestep_bias_strategy=range", "--timestep_bias_end=9", "--timestep_bias_portion=0.5"], "earlier or later"),
    (["--timestep_bias_strategy=range"], "which is all timesteps: make the range smaller"),
    (["--timestep_bias_strategy=range", "--timestep_bias_begin=9", "--timestep_bias_end=9"], "the range ends before 9"),
    (["--timestep_bias_strategy=later", "--timestep_bias_portion=0.0001"], "which is none of the 1000 timesteps"),
    (["--timestep_bias_strategy=earlier", "--timestep_bias_portion=1"], "which is all of the 1000 timesteps"),
    (["--timestep_bias_strategy=later", "--timestep_bias_multiplier=1"], "type 2, or less than 1"),
    (["--timestep_bias_strategy=later", "--timestep_bias_multiplier=1e39"], "at most 1000"),
    (["--export=kohya"], "found 'kohya', but ComfyUI and A1111 have no DeepFloyd IF stage I: remove it"),
    (["--export=kohya", "--model_type=deepfloyd-full"], "have no DeepFloyd IF stage I: remove it"),
    (["--use_bitfit"], "set it to false, or model_type to deepfloyd-full"),
    (["--controlnet"], "no ControlNet can be made for DeepFloyd IF stage I: it would be a copy of the UNet's"),
    (["--controlnet", "--model_type=lora"], "set model_type to full, or controlnet to false"),
    (["--controlnet", "--model_type=full", "--use_bitfit"], "a ControlNet is trained as a whole"),
    (["--controlnet", "--model_type=full", "--validation_guidance_rescale=0.5"], "a ControlNet has no guidance"),
    (["--use_bitfit", "--use_dora"], "set one of the two to false"),
    (["--use_bitfit", "--use_rslora", "--model_type=deepfloyd-full"], "set one of the two to false"),
    (["--prediction_type=v_prediction"], "DeepFloyd IF stage I predicts"),
    (["--validation_noise_level=100"], "validation of DeepFloyd IF stage I upscales nothing"),
    (["--train_variance=false", "--model_type=full"], "predicts no variance that could be trained"),
    (["--base_model_precision=int8", "--model_type=full", "--controlnet"], "remove it, or set model_type to lora"),
    (["--base_model_precision=nf4", "--model_type=deepfloyd-full", "--use_bitfit"], "which trains no adapter"),
    (["--base_model_precision=int8", "--model_type=deepfloyd-stage2"], "set model_type to deepfloyd-stage2-lora"),
    (["--rescale_betas_zero_snr"], "found true for a model that predicts epsilon"),
    (["--optimizer_release_gradients"], "gradients of an adapter are small, and nothing would be won: set it to false"),
    ([*RELEASED, "--use_bitfit"], "gradients of biases are small"),
    ([*RELEASED, "--max_grad_norm=1"], "found true beside max_grad_norm 1, which is the norm of all gradients"),
    ([*RELEASED, "--gradient_accumulation_steps=4"], "set gradient_accumulation_steps to 1, or this to false"),
    ([*RELEASED, "--model_type=full", "--mixed_precision=fp16"], "set mixed_precision to bf16, or this to false"),
    ([*RELEASED, "--optimizer=prodigy"], "finds its rate by all gradients at once: type optimizer adamw with learning"),
])
def test_options_that_do_not_fit_together_are_refused(flags, words):
    problems = problems_of(*flags)
    assert len(problems) == 1 and words in problems[0]


@pytest.mark.parametrize("flags", [[], ["--use_bitfit"]])
def test_a_family_that_other_tools_have_is_exported_for_them_as_an_adapter_only(flags):
    assert load(["--model_type=lora", "--export=kohya"]).config.run.export == "kohya"
    [problem] = problems_of("--export=kohya", "--model_type=full", *flags)
    assert "beside model_type full, which trains no adapter: type diffusers, or set model_type to" in problem


@pytest.mark.parametrize("full, lora", [
    ("deepfloyd-full", "deepfloyd-lora"), ("deepfloyd-stage2", "deepfloyd-stage2-lora"),
])
@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_adapters_beside_full_tuning_are_refused_in_words(full, lora, option):
    assert problems_of(f"--{option}", f"--model_type={full}") == [
        f"{ROWS[option].label}: found true beside model_type {full}, which trains no adapter: set it to false, or "
        f"model_type to {lora}"
    ]


@pytest.mark.parametrize("flags", [
    ["--lr_end=4e-6"],
    ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=5", "--lr_end=0"],
    ["--max_train_steps=10", "--lr_warmup_steps=9"],
    ["--lr_scheduler=sine", "--max_train_steps=3"],
    ["--lr_scheduler=sine", "--lr_num_cycles=0.5", "--max_train_steps=2"],
    ["--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=2", "--max_train_steps=4"],
    ["--max_train_steps=1"],
])
def test_schedules_that_make_sense_pass(flags):
    load([LORA, *flags])


@pytest.mark.parametrize("flags", [
    ["--timestep_bias_strategy=later"],
    ["--timestep_bias_strategy=earlier", "--timestep_bias_multiplier=0.5", "--timestep_bias_portion=0.4"],
    ["--timestep_bias_strategy=range", "--timestep_bias_begin=100"],
])
def test_a_timestep_bias_that_acts_passes(flags):
    loss = load([LORA, *flags]).config.loss
    assert loss.timestep_bias_multiplier != 1


@pytest.mark.parametrize("resolution", ["0.0655", "0.065536", "0.066"])
def test_an_area_is_held_against_the_smallest_edge_as_it_is_trained(resolution):
    """0.0655 megapixels are 255.9 px an edge, which are trained at 256."""
    load(["--model_type=deepfloyd-stage2-lora", "--resolution_type=area", f"--resolution={resolution}"])
    with pytest.raises(ConfigError, match="256 pixels and more out of a quarter of that: type 256"):
        load(["--model_type=deepfloyd-stage2-lora", "--resolution_type=area", "--resolution=0.06"])


def test_all_problems_come_at_once_and_none_twice():
    problems = problems_of("--lr_end=x", "--resolution=60", "--seeed=1", "--pure_bf16=maybe", "--max_train_steps=x")
    assert len(problems) == 5


def test_a_wrong_value_causes_no_second_problem_between_options():
    assert len(problems_of("--resolution=abc", "--validation_resolution=1024")) == 1


@pytest.mark.parametrize("flags, steps, epochs", [
    ([], 0, 25),
    (["--max_train_steps=10"], 10, 0),
    (["--num_train_epochs=3"], 0, 3),
    (["--max_train_steps=10", "--num_train_epochs=3"], 10, 3),
    (["--max_train_steps=10", "--num_train_epochs=0"], 10, 0),
])
def test_steps_or_epochs_end_the_run(flags, steps, epochs):
    training = load([LORA, *flags]).config.training
    assert (training.max_train_steps, training.num_train_epochs) == (steps, epochs)


@pytest.mark.parametrize("flags, optimizer", [
    ([], "adamw"), (["--pure_bf16"], "adamw_bf16"), (["--optimizer=adamw_bf16"], "adamw_bf16"),
])
def test_the_default_optimizer_moves_weights_of_the_precision_chosen(flags, optimizer):
    assert load([LORA, *flags]).config.optimizer.optimizer == optimizer


@pytest.mark.parametrize("flags, learning_rate, beta2", [
    ([], 4e-5, 0.999), (["--optimizer=prodigy"], 1.0, 0.999), (["--optimizer=lion"], 1e-5, 0.99),
    (["--optimizer=prodigy", "--learning_rate=0.5", "--adam_beta2=0.99"], 0.5, 0.99),
])
def test_an_optimizer_brings_its_own_defaults(flags, learning_rate, beta2):
    optimizer = load([LORA, *flags]).config.optimizer
    assert (optimizer.learning_rate, optimizer.adam_beta2) == (learning_rate, beta2)


@pytest.mark.parametrize("optimizer, package", [
    ("adamw8bit", "bitsandbytes"), ("lion", "bitsandbytes"), ("prodigy", "prodigyopt"), ("ao_adamw8bit", "torchao"),
])
def test_an_optimizer_whose_package_is_missing_is_refused_with_the_command_that_installs_it(
    monkeypatch, optimizer, package
):
    monkeypatch.setattr(checks, "is_installed", lambda name: name != package)
    (problem,) = problems_of(f"--optimizer={optimizer}")
    assert f"pip install {package}" in problem and "type adamw" in problem
    assert ("adamw with learning_rate 4e-05" in problem) == (optimizer in ("prodigy", "lion")), "theirs are not its own"


@pytest.mark.parametrize("value", ["64, 96,64x96,96X64", [64, "96", "64x96", "96x64"]])
def test_validation_sizes_are_listed_in_order(value, tmp_path):
    config = load([LORA, written(tmp_path, {"validation_resolution": value})]).config
    assert config.validation.validation_resolution == (Size(64, 64), Size(96, 96), Size(64, 96), Size(96, 64))


def test_flags_win_over_config_json_and_that_over_defaults(tmp_path):
    resolved = load([LORA, written(tmp_path, {"seed": 5, "lora_rank": 8}), "--seed=6"])
    assert (resolved.config.training.seed, resolved.config.lora.lora_rank) == (6, 8)
    assert {name: resolved.sources[name] for name in ("seed", "lora_rank", "lora_dropout")} == {
        "seed": "flag", "lora_rank": "config.json", "lora_dropout": "default",
    }


def test_a_flag_that_train_sh_made_is_traced_to_its_export():
    environ = {ENV_FILE_MARK: "my-env.sh", "LEARNING_RATE_END": "1e-6", "USE_XFORMERS": "true", "TRAINING_SEED": "3"}
    flags = [LORA, "--lr_end=1e-6", "--attention_mechanism=xformers", "--seed=4"]
    sources = load(flags, environ).sources
    assert sources["lr_end"] == "export LEARNING_RATE_END (my-env.sh)"
    assert sources["attention_mechanism"] == "export USE_XFORMERS (my-env.sh)"
    assert sources["seed"] == "flag"


def test_the_environment_gives_no_values_to_the_trainer():
    assert load([LORA], {"LORA_RANK": "7", ENV_FILE_MARK: ""}).config.lora.lora_rank == 32


def test_null_is_not_set_and_whole_lines_of_comment_are_skipped(tmp_path):
    text = '{\n# a comment\n  // another\n"lora_alpha": null, "validation_prompt": "no # comment // here"\n}'
    config = load([LORA, written(tmp_path, text)]).config
    assert config.lora.lora_alpha is None
    assert config.validation.validation_prompt == "no # comment // here"


@pytest.mark.parametrize("content, words", [
    ({"lr_ned": 1}, 'config.json, key "lr_ned": not an option; did you mean lr_end?'),
    ({"seed": True}, "found true, needs a whole number"),
    ({"learning_rate": [1]}, "found [1], needs a number"),
    ({"hub_model_id": "a/b/c"}, "found 'a/b/c', needs a name for a repository, or owner/name"),
    ({"config": "x"}, 'key "config": not an option'),
    ('{"seed": 1, "seed": 2}', 'key "seed" is there twice'),
    ('{"seed": 1,}', "not JSON: a comma stands before the closing bracket: remove it"),
    ('"seed": 1', "put { before the first key"),
    ("[1]", "needs one object"),
])
def test_a_wrong_config_file_is_answered_in_words(content, words, tmp_path):
    problems = problems_of(written(tmp_path, content))
    assert len(problems) == 1 and words in problems[0]


def test_a_missing_config_file_is_the_only_problem_that_it_causes():
    with pytest.raises(ConfigError) as caught:
        load_all(["--config=/nowhere/config.json"])
    (problem,) = caught.value.problems
    assert "there is no file /nowhere/config.json" in problem


@pytest.fixture
def all_problems(tmp_path):
    """The problems of flags and the entries of a dataloader JSON."""

    def all_problems(*entries, flags=(), **environ) -> tuple[str, ...]:
        path = tmp_path / "backends.json"
        path.write_text(json.dumps([{"instance_data_dir": str(tmp_path)} | entry for entry in entries]))
        try:
            load_all([LORA, f"--data_backend_config={path}", *flags], environ)
        except ConfigError as error:
            return error.problems
        return ()

    return all_problems


def test_the_problems_of_flags_and_of_the_dataloader_json_come_together(all_problems):
    assert all_problems({"id": "a"}) == ()
    problems = all_problems({"id": "a", "repeats": -1}, {"id": "b", "crop_styl": 1}, flags=["--seed=x", "--lr_ned=1"])
    assert len(problems) == 4


@pytest.mark.parametrize("flag", ["--resolution=60", "--resolution=x", "--target_downsample_size=x"])
def test_a_wrong_flag_is_not_held_against_the_entries_that_inherit_it(all_problems, flag):
    entry = {"id": "a", "maximum_image_size": 256} if "target" in flag else {"id": "a"}
    (problem,) = all_problems(entry, flags=[flag])
    assert problem.startswith(flag.split("=")[0])


def test_an_entrys_own_wrong_value_is_named_beside_that_of_the_flag(all_problems):
    problems = all_problems({"id": "a", "resolution": 52}, flags=["--resolution=60"])
    assert [word for problem in problems for word in ("found 60", "found 52") if word in problem] == [
        "found 60", "found 52",
    ]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_splitting_a_model_over_gpus_is_refused_in_words(all_problems, name):
    assert all_problems({"id": "a"}, **{f"ACCELERATE_USE_{name}": "false"}) == ()
    (problem,) = all_problems({"id": "a"}, **{f"ACCELERATE_USE_{name}": "true"})
    assert name.lower() in problem.lower() and "LoRA and full alike" in problem and "TRAINING_NUM_PROCESSES" in problem


def test_processes_that_accelerate_did_not_start_are_missed(all_problems):
    alone = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}
    assert all_problems({"id": "a"}, **alone) == ()
    asked_for_two = alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    (problem,) = all_problems({"id": "a"}, **asked_for_two)
    assert "started one" in problem and "torchrun" in problem
    assert all_problems({"id": "a"}, **asked_for_two, LOCAL_RANK="0", RANK="0", WORLD_SIZE="2") == ()


def test_several_processes_do_not_release_their_gradients(all_problems):
    two = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}
    assert all_problems({"id": "a"}, **two) == ()
    assert all_problems({"id": "a"}, flags=RELEASED) == ()
    (problem,) = all_problems({"id": "a"}, flags=RELEASED, **two)
    assert "found true beside 2 processes (TRAINING_NUM_PROCESSES)" in problem and "set it to false" in problem


def test_what_accelerate_was_told_to_compile_is_held_against_the_options(all_problems):
    compiled = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}
    graphs = compiled | {"ACCELERATE_DYNAMO_MODE": "reduce-overhead"}
    accumulates = ["--gradient_accumulation_steps=4"]
    assert all_problems({"id": "a"}, flags=accumulates, **compiled) == ()
    assert all_problems({"id": "a"}, **graphs) == ()
    (problem,) = all_problems({"id": "a"}, flags=accumulates, **graphs)
    assert "found 4 beside TRAINING_DYNAMO_MODE=reduce-overhead" in problem and "set it to 1" in problem
    (problem,) = all_problems({"id": "a"}, flags=RELEASED, **compiled)
    assert "found true beside TRAINING_DYNAMO_BACKEND=inductor" in problem
    off = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"}
    assert all_problems({"id": "a"}, flags=RELEASED, **off) == ()


def test_a_model_type_that_is_no_text_is_one_problem(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load([written(tmp_path, {"model_type": 1})])
    assert len(caught.value.problems) == 1


def test_relative_paths_count_from_the_projects_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load([LORA, "--output_dir=out"]).config.run.output_dir == ROOT / "out"


def test_the_saved_options_are_a_config_json_of_the_same_config(tmp_path):
    first = load([LORA, "--validation_resolution=64,96x64", "--pure_bf16", "--lora_alpha=16", "--resolution=72"])
    again = load([written(tmp_path, as_json(first)["options"])])
    assert again.config == first.config


def test_the_description_shows_every_option_with_its_source():
    text = describe(load([LORA, "--lr_end=1e-6"]))
    assert any(line.startswith("* lr_end") and "1e-06" in line and line.endswith("flag") for line in text.splitlines())
    assert all(any(line[2:].startswith(f"{name} ") for line in text.splitlines()) for name in ROWS if name != "config")


def test_help_lists_every_option_and_ends_with_0(capsys):
    with pytest.raises(SystemExit) as ended:
        load(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in ROWS)


@pytest.mark.parametrize("flags, count", [([], 4), (["--num_eval_images=0"], 0), (["--controlnet=false"], 0)])
def test_a_controlnet_is_judged_by_eval_images_unless_told_otherwise(flags, count):
    config = load(["--model_type=full", "--controlnet", *flags]).config
    assert config.validation.num_eval_images == count
