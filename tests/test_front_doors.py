"""Every option means the same as an export, as a flag and as a key of config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_sd2x
from helpers.config.env import command_line, flags_from_exports
from helpers.config.load import ConfigError, as_json, load
from helpers.config.options import ROWS

# A value other than the default for each option, as a shell and as JSON would hold it, and what it needs beside it.
VALUES = {
    "model_type": ("deepfloyd-full", "deepfloyd-full"),
    "model_family": ("deepfloyd", "deepfloyd"),
    "model_flavour": ("i-large-900m", "i-large-900m"),
    "pretrained_model_name_or_path": ("someone/their-if", "someone/their-if"),
    "revision": ("main", "main"),
    "variant": ("fp16", "fp16"),
    "single_file_config": ("someone/their-sd", "someone/their-sd"),
    "data_backend_config": ("my data.json", "my data.json"),
    "cache_dir": ("/tmp/c", "/tmp/c"),
    "resolution": ("72", 72),
    "resolution_type": ("area", "area"),
    "minimum_image_size": ("48", 48),
    "maximum_image_size": ("512", 512.0),
    "target_downsample_size": ("96", 96),
    "aspect_bucket_rounding": ("3", 3),
    "downsample_method": ("single", "single"),
    "caption_strategy": ("textfile", "textfile"),
    "instance_prompt": ("a $5 \"bill\"", "a $5 \"bill\""),
    "caption_dropout_probability": ("0.2", 0.2),
    "vae_batch_size": ("2", 2),
    "text_encoder_batch_size": ("2", 2),
    "text_encoder_device": ("cpu", "cpu"),
    "text_embeds_storage": ("int8", "int8"),
    "train_batch_size": ("1", 1),
    "gradient_accumulation_steps": ("2", 2),
    "max_train_steps": ("10", 10),
    "num_train_epochs": ("3", 3),
    "max_grad_norm": ("0", 0),
    "max_nonfinite_steps": ("0", 0),
    "gradient_checkpointing": ("yes", True),
    "mixed_precision": ("no", "no"),
    "pure_bf16": ("TRUE", True),
    "attention_mechanism": ("xformers", "xformers"),
    "seed": ("7", 7),
    "allow_tf32": ("0", False),
    "train_variance": ("no", False),
    "snr_gamma": ("5", 5.0),
    "soft_min_snr": ("true", True),
    "prediction_type": ("v_prediction", "v_prediction"),
    "rescale_betas_zero_snr": ("true", True),
    "noise_offset": ("0.05", 0.05),
    "timestep_bias_strategy": ("later", "later"),
    "timestep_bias_multiplier": ("3", 3.0),
    "timestep_bias_portion": ("0.5", 0.5),
    "timestep_bias_begin": ("100", 100),
    "timestep_bias_end": ("900", 900),
    "lora_rank": ("8", 8),
    "lora_rank_pattern": ("to_q=4, add_k_proj=64", {"to_q": 4, "add_k_proj": 64}),
    "lora_alpha": ("4", 4),
    "lora_dropout": ("0.1", 0.1),
    "lora_targets": ("attention+conv", "attention+conv"),
    "use_dora": ("true", True),
    "use_rslora": ("1", True),
    "base_model_precision": ("int8", "int8"),
    "train_text_encoder": ("true", True),
    "text_encoder_lora_rank": ("4", 4),
    "text_encoder_lora_alpha": ("2", 2),
    "text_encoder_learning_rate": ("1e-6", 1e-6),
    "use_bitfit": ("yes", True),
    "controlnet": ("true", True),
    "optimizer": ("adamw_bf16", "adamw_bf16"),
    "learning_rate": ("1e-4", 1e-4),
    "lr_end": ("4e-6", 4e-6),
    "lr_scheduler": ("sine", "sine"),
    "lr_warmup_steps": ("5", 5),
    "lr_power": ("2", 2.0),
    "lr_num_cycles": ("2", 2.0),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.99", 0.99),
    "adam_epsilon": ("1e-6", 1e-6),
    "adam_weight_decay": ("0", 0.0),
    "optimizer_release_gradients": ("true", True),
    "use_ema": ("true", True),
    "ema_decay": ("0.99", 0.99),
    "validation_prompt": ("a müde fox\nin 'snow'", "a müde fox\nin 'snow'"),
    "validation_prompt_library": ("PROMPTS", "PROMPTS"),
    "validation_negative_prompt": ("blurry, ugly", "blurry, ugly"),
    "validation_resolution": ("64, 96x64", [64, "96x64"]),
    "validation_steps": ("0", 0),
    "validation_num_inference_steps": ("5", 5),
    "validation_guidance": ("1", 1),
    "validation_guidance_rescale": ("0.0", 0),
    "validation_noise_scheduler": ("euler-a", "euler-a"),
    "num_eval_images": ("2", 2),
    "validation_noise_level": ("100", 100),
    "validation_seed": ("1", 1),
    "output_dir": ("~/out", "~/out"),
    "export": ("kohya", "kohya"),
    "checkpointing_steps": ("100", 100),
    "checkpoints_total_limit": ("0", 0),
    "resume_from_checkpoint": ("checkpoint-100", "checkpoint-100"),
    "report_to": ("none", "none"),
    "tracker_project_name": ("mine", "mine"),
    "tracker_run_name": ("first", "first"),
    "push_to_hub": ("1", True),
    "hub_model_id": ("me/my-subject", "me/my-subject"),
    "hub_private": ("false", False),
    "push_checkpoints_to_hub": ("true", True),
    "dry_run": ("on", True),
    "check": ("json", "json"),
    "strict": ("true", True),
}
SAME_AS_DEFAULT = {"model_family", "validation_guidance_rescale"}
NEEDED = {"resolution_type": ["--resolution=0.01"], "lr_power": ["--lr_scheduler=polynomial"],
          "soft_min_snr": ["--snr_gamma=5"], "strict": ["--check"],
          "push_checkpoints_to_hub": ["--push_to_hub"],
          **dict.fromkeys(["export", "prediction_type", "rescale_betas_zero_snr", "train_text_encoder", "vae_batch_size",
                           "validation_noise_scheduler"], ["--model_type=lora"]),
          **dict.fromkeys(["text_encoder_lora_rank", "text_encoder_lora_alpha", "text_encoder_learning_rate"],
                          ["--model_type=lora", "--train_text_encoder"]),
          "single_file_config": ["--model_type=lora", "--pretrained_model_name_or_path=/tmp/their.safetensors"],
          "timestep_bias_multiplier": ["--timestep_bias_strategy=later"],
          "timestep_bias_portion": ["--timestep_bias_strategy=later"],
          "timestep_bias_begin": ["--timestep_bias_strategy=range"],
          "timestep_bias_end": ["--timestep_bias_strategy=range"],
          "validation_noise_level": ["--model_type=deepfloyd-stage2-lora"],
          "num_eval_images": ["--model_type=deepfloyd-stage2-lora"], "use_bitfit": ["--model_type=deepfloyd-full"],
          "controlnet": ["--model_type=full"],
          "optimizer_release_gradients": ["--model_type=deepfloyd-full", "--max_grad_norm=0"]}
BASE = {"model_type": "deepfloyd-lora"}


def test_every_option_is_tried():
    assert set(VALUES) == set(ROWS) - {"config"}


@pytest.mark.parametrize("name", list(VALUES))
def test_an_export_a_flag_and_a_key_give_the_same_config(name, tmp_path):
    library = tmp_path / "prompts.json"
    library.write_text('{"fox": "a fox"}', encoding="utf-8")
    text, value = (str(library), str(library)) if name == "validation_prompt_library" else VALUES[name]
    base = [f"--{key}={base}" for key, base in BASE.items() if key != name] + NEEDED.get(name, [])
    by_flag = load([*base, f"--{name}={text}"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value}), encoding="utf-8")
    by_key = load([*base, f"--config={path}"])
    assert by_key.config == by_flag.config
    assert (by_flag.sources[name], by_key.sources[name]) == ("flag", "config.json")
    for export in ROWS[name].exports:
        problems: list[str] = []
        flags = flags_from_exports({export: text}, base, problems)
        assert not problems and load([*flags, *base]).config == by_flag.config
    if name not in SAME_AS_DEFAULT:
        default = load(["--model_type=deepfloyd-lora"])
        assert as_json(by_flag)["options"][name] != as_json(default)["options"][name], "the value must arrive"


def test_both_doors_report_the_flags_and_the_dataloader_json_in_one_list(tmp_path, capsys):
    path = tmp_path / "backends.json"
    path.write_text('[{"id": "a", "instance_data_dir": "/nowhere"}]', encoding="utf-8")
    assert train_sd2x.main(["--model_type=deepfloyd-lora", f"--data_backend_config={path}", "--lr_ned=1"]) == 2
    said = capsys.readouterr().err
    assert "There are 2 problems" in said and "/nowhere" in said and "did you mean --lr_end?" in said
    with pytest.raises(ConfigError) as caught:
        exports = {"MODEL_TYPE": "deepfloyd-lora", "DATALOADER_CONFIG": str(path), "LORA_RANK": "x"}
        command_line(["--lr_ned=1"], exports, frozenset(), "python")
    assert len(caught.value.problems) == 3


def test_the_config_holds_the_value_under_its_groups_name():
    config = load(["--model_type=deepfloyd-lora", "--lr_end=4e-6", "--output_dir=/tmp/out"]).config
    assert config.optimizer.lr_end == 4e-6 and config.run.output_dir == Path("/tmp/out")
