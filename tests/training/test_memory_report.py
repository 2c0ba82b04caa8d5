import pytest

from helpers.config.load import load
from helpers.models.families import SPECS
from helpers.models.published import ARCHITECTURES
from helpers.sizes import Size
from helpers.training import memory_report
from helpers.training.memory import Memory, estimate

SPEC = SPECS["deepfloyd-i"]
SIZE = Size(64, 64)
SPARING = {
    "model_type": "deepfloyd-lora",
    "base_model_precision": "nf4",
    "gradient_checkpointing": True,
    "train_batch_size": 1,
}
FLAGS = {"model_type": "deepfloyd-full", "mixed_precision": "bf16", "train_batch_size": 4}


def config_of(**flags: object):
    return load([f"--{name}={value}" for name, value in {**FLAGS, **flags}.items()]).config


def test_all_parts_are_named_and_the_largest_is_marked():
    memory = Memory(int(1.5e9), int(2e7), int(4e7), 0, int(3e9), int(4.5e9))
    lines = memory_report.describe(memory, 4, Size(96, 64)).splitlines()
    assert "batch of 4" in lines[0] and "96x64" in lines[0]
    assert [line.split()[:3] for line in lines[1:6]] == [
        ["weights", "1.50", "GB"],
        ["gradients", "20.0", "MB"],
        ["optimizer", "40.0", "MB"],
        ["EMA", "0.0", "MB"],
        ["activations", "3.00", "GB"],
    ]
    assert [line for line in lines if "largest" in line] == [lines[5]]
    assert "4.50 GB at one time" in lines[6]
    line = memory_report.in_a_line(memory, 4, Size(96, 64))
    assert "4.50 GB" in line and "3.00 GB" in line and "activations" in line and "\n" not in line


def test_a_gpu_that_is_too_small_is_told_with_what_each_option_would_bring(tiny_model):
    architecture = tiny_model / "unet" / "config.json"
    config = config_of(optimizer="adamw", use_ema=True)
    needed = estimate(memory_report.setup_of(config, SPEC, architecture, SIZE)).peak
    assert "GPU" not in memory_report.report(config, SPEC, architecture, SIZE, needed)
    assert "GPU" not in memory_report.report(config, SPEC, architecture, SIZE, None)
    lines = memory_report.report(config, SPEC, architecture, SIZE, needed - 1).splitlines()[1:]
    assert "free" in lines[0]
    for option in ("USE_GRADIENT_CHECKPOINTING=true", "TRAIN_BATCH_SIZE=1", "GRADIENT_ACCUMULATION_STEPS=4",
                   "PURE_BF16=true", "OPTIMIZER=adamw_bf16", "OPTIMIZER=adamw8bit", "USE_EMA=false",
                   "MODEL_TYPE=deepfloyd-lora"):  # fmt: skip
        assert any(option in line for line in lines[1:]), option
    brought = [float(line.split()[1]) for line in lines[1:]]
    assert brought == sorted(brought) and len(brought) == 6


@pytest.mark.parametrize("count, words", [
    (4, "takes 3.03 GB, 4 at a time (VAE_BATCH_SIZE=1, --vae_batch_size, makes that 1.01 GB)"),
    (1, "takes 1.01 GB, 1 at a time"),
])
def test_a_dry_run_tells_what_the_vae_takes_before_the_training(count, words):
    config = config_of(model_type="lora", vae_batch_size=count, dry_run=True)
    architecture = ARCHITECTURES / "stable-diffusion-v1_unet.json"
    said = memory_report.report(config, SPECS["sd"], architecture, Size(512, 512), None)
    assert f"for images that are not cached yet, their VAE: a published one {words}" in said.splitlines()[-2]


def test_what_is_used_already_is_not_proposed_again():
    flags = {**SPARING, "pure_bf16": True}
    assert list(memory_report.savings(config_of(**flags))) == []
    for used, proposed in (("no_change", "int8"), ("int8", "nf4")):
        [(words, changed)] = memory_report.savings(config_of(**{**flags, "base_model_precision": used}))
        assert words.startswith(f"BASE_MODEL_PRECISION={proposed} (--base_model_precision)")
        assert changed.lora.base_model_precision == proposed
    released = {"optimizer_release_gradients": True, "max_grad_norm": 0}
    small = {**flags, **released, "optimizer": "adamw8bit", "model_type": "deepfloyd-full"}
    small |= {"base_model_precision": "no_change"}
    assert [words.split("=")[0] for words, _ in memory_report.savings(config_of(**small))] == ["MODEL_TYPE"]
    [(words, changed)] = memory_report.savings(config_of(**{**flags, "pure_bf16": False, "optimizer": "lion"}))
    assert "OPTIMIZER=lion" in words and changed.training.pure_bf16


def test_to_release_gradients_is_proposed_where_that_can_be_and_accumulation_is_not_beside_it():
    def proposed(**flags: object) -> str:
        return " ".join(words for words, _ in memory_report.savings(config_of(**flags)))

    words = "OPTIMIZER_RELEASE_GRADIENTS=true (--optimizer_release_gradients) with MAX_GRAD_NORM=0"
    assert words in proposed() and "GRADIENT_ACCUMULATION_STEPS" in proposed()
    for flags in ({"model_type": "deepfloyd-lora"}, {"use_bitfit": True}, {"gradient_accumulation_steps": 2},
                  {"optimizer": "prodigy"}, {"model_type": "full", "mixed_precision": "fp16"}):  # fmt: skip
        assert words not in proposed(**flags)
    beside = {"optimizer_release_gradients": True, "max_grad_norm": 0}
    assert words not in proposed(**beside) and "GRADIENT_ACCUMULATION_STEPS" not in proposed(**beside)
    assert words not in " ".join(words for words, _ in memory_report.savings(config_of(), processes=2))
    *_, (last, lora) = memory_report.savings(config_of(**beside))
    assert "MODEL_TYPE" in last and not lora.optimizer.optimizer_release_gradients


def test_from_prodigy_another_optimizer_is_proposed_with_a_rate_of_its_own():
    [(words, _)] = memory_report.savings(config_of(**SPARING, pure_bf16=False, optimizer="prodigy", learning_rate=1))
    assert "OPTIMIZER=adamw_bf16 (--optimizer) with LEARNING_RATE=4e-05 (--learning_rate)" in words


def test_where_nothing_saves_memory_smaller_images_are_named_if_they_can_be(tiny_model):
    flags = {**SPARING, "pure_bf16": True}
    for size, proposed in ((SIZE, False), (Size(96, 64), True)):
        said = memory_report.report(config_of(**flags), SPEC, tiny_model / "unet" / "config.json", size, 1)
        assert "smaller model" in said and ("RESOLUTION" in said) == proposed


def test_a_dry_run_names_the_text_encoder_unless_it_is_kept_off_the_gpu(tiny_model):
    for device, named in (("auto", True), ("cpu", False)):
        config = config_of(dry_run=True, text_encoder_device=device)
        said = memory_report.report(config, SPEC, tiny_model / "unet" / "config.json", SIZE, None)
        assert ("TEXT_ENCODER_DEVICE" in said) == named


def test_what_is_proposed_are_configs_that_the_front_door_takes():
    for _, changed in memory_report.savings(config_of()):
        training = changed.training
        flags = {name: getattr(training, name) for name in ("train_batch_size", "pure_bf16", "mixed_precision")}
        assert config_of(**flags, model_type=changed.model.model_type, optimizer=changed.optimizer.optimizer)


def test_a_dry_run_tells_the_memory_of_a_local_model(trainer, capsys):
    assert trainer(dry_run=True) == 0
    said = capsys.readouterr().out
    assert "a batch of 2 at 64x64" in said and "activations" in said and "the largest" in said


@pytest.mark.parametrize(
    "flags, gigabytes",
    [({"pretrained_model_name_or_path": "DeepFloyd/IF-I-M-v1.0"}, 0.75), ({"model_flavour": "i-xlarge-4.3b"}, 8.65)],
)
def test_a_dry_run_tells_the_memory_of_a_published_model_without_a_download(trainer, capsys, flags, gigabytes):
    flags = {"pretrained_model_name_or_path": None, **flags, "mixed_precision": "bf16", "pure_bf16": True}
    assert trainer(dry_run=True, lora_rank=32, **flags) == 0
    [weights] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  weights")]
    assert float(weights.split()[1]) == gigabytes


def test_a_dry_run_says_where_it_cannot_tell(trainer, capsys):
    assert trainer(dry_run=True, pretrained_model_name_or_path="someone/their-if") == 0
    assert "memory needed is not known" in capsys.readouterr().out


def test_a_real_run_tells_it_in_a_line_where_there_is_a_gpu_to_hold_it_against(trainer, tmp_path, monkeypatch, capsys):
    assert trainer(max_train_steps=1) == 0
    assert "Training will need" not in capsys.readouterr().out
    monkeypatch.setattr(memory_report, "free_on_gpu", lambda: 1000)
    assert trainer(max_train_steps=1, output_dir=tmp_path / "again", gradient_checkpointing=True) == 0
    said = capsys.readouterr().out
    assert "Training will need about " in said and "The GPU has 0.0 MB free" in said
    assert "TRAIN_BATCH_SIZE=1" in said and "USE_GRADIENT" not in said


def test_float16_takes_what_bfloat16_takes_and_beside_it_bfloat16_is_not_proposed():
    taken, proposed = {}, {}
    for precision in ("fp16", "bf16"):
        config = config_of(model_type="lora", mixed_precision=precision, train_batch_size=1)
        spec, architecture = SPECS["sd"], ARCHITECTURES / "stable-diffusion-v1_unet.json"
        taken[precision] = estimate(memory_report.setup_of(config, spec, architecture, Size(512, 512)))
        proposed[precision] = " ".join(words for words, _ in memory_report.savings(config))
    assert taken["fp16"] == taken["bf16"]
    assert "PURE_BF16" in proposed["bf16"] and "PURE_BF16" not in proposed["fp16"]
