"""What was trained, loaded back: it samples as it did while it was trained."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    IFPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from helpers.config.families import ATTENTION, DEEPFLOYD_I, DEEPFLOYD_II, STABLE_DIFFUSION
from helpers.models.bitfit import BIASES_FILE, BitFit
from helpers.models.denoiser import Denoiser
from helpers.models.facts import metadata
from helpers.models.fingerprints import fingerprint_unet
from helpers.models.lora import LORA_FILE, LoRA
from helpers.models.lora_files import bare_unet, weights_of
from helpers.models.published import architecture
from helpers.models.results import AdapterError, load_adapter, read_adapter, require_fits, scheduler_changes

ADAPTERS = {
    "lora": (LoRA(rank=4, alpha=2, dropout=0.0, targets="attention"), LORA_FILE),
    "dora": (LoRA(rank=4, alpha=4, dropout=0.0, targets="attention", dora=True), LORA_FILE),
    "bitfit": (BitFit(), BIASES_FILE),
}


@pytest.mark.parametrize("of_the_folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_loaded_with_the_scheduler_that_it_needs(
    unet_in, pipeline, origin, moved, output_of, tmp_path, kind, of_the_folder
):
    adapter, file = ADAPTERS[kind]
    adapter = replace(adapter, origin=replace(origin, variance_type="fixed_small"))
    unet = unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(moved(unet)), tmp_path)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    facts = load_adapter(pipeline, tmp_path if of_the_folder else tmp_path / file)
    assert (facts.kind, facts.variance_type) == (kind, "fixed_small")
    assert pipeline.scheduler.config.variance_type == "fixed_small"
    assert pipeline.scheduler.config.sample_max_value == 1.5
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet))


@pytest.mark.parametrize("values", [
    {"rslora": True, "alpha": 3}, {"ranks": {"to_q": 1, "add_k_proj": 8}}, {"dora": True, "ranks": {"to_out.0": 2}},
    {"targets": "attention+conv", "dora": True, "rslora": True, "ranks": {"conv1": 3}},
])
def test_an_adapter_of_any_kind_is_loaded_as_diffusers_loads_it(
    unet_in, pipeline, origin, moved, output_of, tmp_path, values
):
    adapter, unet = replace(ADAPTERS["lora"][0], origin=origin, **values), unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(moved(unet)), tmp_path)
    assert read_adapter(tmp_path).repairs == ()
    load_adapter(pipeline, tmp_path)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), atol=0, rtol=0)


def test_a_variance_that_was_trained_is_sampled_with_whatever_the_base_does(unet_in, pipeline, origin, tmp_path):
    adapter = replace(ADAPTERS["lora"][0], origin=origin)
    unet = unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, variance_type=None)
    load_adapter(pipeline, tmp_path, "subject")
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.get_active_adapters() == ["subject"]


# Files of other trainers

@pytest.fixture
def trained(unet_in, moved):
    """IF's UNet with a LoRA as other trainers attach it, whose weights were moved."""

    def trained(**values):
        unet = unet_in()
        unet.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": list(ATTENTION)} | values))
        return moved(unet)

    return trained


def as_diffusers_example_saves(unet, folder):
    """The last lines of its LoRA script for IF; legacy SimpleTuner's are the same."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    IFPipeline.save_lora_weights(folder, unet_lora_layers=layers, text_encoder_lora_layers=None)


def written(folder, state):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / LORA_FILE, {"format": "pt"})


def of_processors(unet, prefix):
    """The names of when adapters were attention processors: `unet.mid_block.attentions.0.processor.to_q_lora.down`."""
    state = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        layer, _, side = name.partition(".lora_")
        attention, _, projection = layer.replace("to_out.0", "to_out").rpartition(".")
        end = {"A.weight": "down", "B.weight": "up"}[side]
        state[f"{prefix}{attention}.processor.{projection}_lora.{end}.weight"] = tensor
    return state


FORMS = {
    "diffusers' example": as_diffusers_example_saves,
    "processors": lambda unet, folder: written(folder, of_processors(unet, "unet.")),
    "processors, bare": lambda unet, folder: written(folder, of_processors(unet, "")),
    "bare": lambda unet, folder: written(folder, get_peft_model_state_dict(unet)),
    "peft's prefix": lambda unet, folder: written(
        folder, {f"unet.base_model.model.{name}": one for name, one in get_peft_model_state_dict(unet).items()}
    ),
    "a whole state": lambda unet, folder: written(
        folder, {f"unet.{name}": one for name, one in unet.state_dict().items() if ".lora_" in name}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_another_trainers_lora_is_repaired_and_gives_what_was_trained(
    trained, pipeline, tiny_model, output_of, tmp_path, form
):
    unet = trained()
    FORMS[form](unet, tmp_path / "lora")
    adapter = read_adapter(tmp_path / "lora")
    count = sum(name.endswith(".base_layer.weight") for name in unet.state_dict())
    assert f"{count} of {count} are used" in adapter.repairs[0]
    assert "does not tell its alpha: taken as its rank, 4," in adapter.repairs[1]
    assert adapter.facts is None and adapter.base is None
    assert load_adapter(pipeline, adapter, "subject") is None
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), atol=0, rtol=0)
    pipeline.set_adapters("subject", 0.0)
    plain = IFPipeline.from_pretrained(tiny_model).unet
    torch.testing.assert_close(output_of(pipeline.unet), output_of(plain))


def test_without_the_repair_two_thirds_of_the_layers_are_lost_in_silence(trained, pipeline, output_of, tmp_path):
    unet = trained()
    as_diffusers_example_saves(unet, tmp_path)
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        pipeline.load_lora_weights(tmp_path)
    assert (output_of(pipeline.unet) - output_of(unet)).abs().max() > 1e-2


def test_another_trainers_dora_is_repaired_too(trained, pipeline, output_of, tmp_path):
    unet = trained(use_dora=True)
    as_diffusers_example_saves(unet, tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.kind == "a DoRA"
    load_adapter(pipeline, adapter)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), atol=0, rtol=0)


def test_what_peft_saved_itself_has_its_alpha_beside_it(unet_in, pipeline, moved, output_of, tmp_path):
    config = LoraConfig(r=4, lora_alpha=10, target_modules=list(ATTENTION), rank_pattern={"to_q": 2})
    model = get_peft_model(unet_in(), config)
    moved(model).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert len(adapter.repairs) == 1 and "names" in adapter.repairs[0]
    load_adapter(pipeline, adapter)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(model.base_model.model))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="adapter_config.json beside it cannot be read"):
        read_adapter(tmp_path)


def test_what_diffusers_saves_with_its_metadata_needs_no_repair(trained, pipeline, output_of, tmp_path):
    unet = trained(lora_alpha=10, use_rslora=True)
    config = unet.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(unet)
    IFPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    adapter = read_adapter(tmp_path)
    assert adapter.repairs == () and adapter.maker == "diffusers"
    load_adapter(pipeline, adapter)
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), atol=0, rtol=0)


def test_what_a_file_says_beside_its_scale_does_not_reach_peft(trained, pipeline, tmp_path):
    """peft imports the module that `megatron_core` names, for one."""
    unet = trained()
    config = unet.peft_config["default"].to_dict() | {"megatron_config": {}, "megatron_core": "antigravity"}
    config |= {"init_lora_weights": "eva", "modules_to_save": ["conv_in"], "layer_replication": [[0, 9]]}
    IFPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config
    )
    load_adapter(pipeline, tmp_path, "subject")
    loaded = pipeline.unet.peft_config["subject"]
    assert loaded.megatron_config is None and loaded.megatron_core == LoraConfig().megatron_core
    assert loaded.modules_to_save is None and loaded.layer_replication is None and loaded.lora_alpha == 4


def test_the_maker_and_the_base_are_read_from_the_card_beside_the_file(trained, tmp_path):
    as_diffusers_example_saves(trained(), tmp_path)
    assert read_adapter(tmp_path).maker == "diffusers"
    (tmp_path / "README.md").write_text('---\ntags:\n- simpletuner\nbase_model: "DeepFloyd/IF-I-XL-v1.0"\n---\n# x\n')
    adapter = read_adapter(tmp_path)
    assert (adapter.maker, adapter.base) == ("simpletuner", "DeepFloyd/IF-I-XL-v1.0")
    (tmp_path / "README.md").write_bytes(b"\xff base_model: /etc/passwd\nbase_model: ../../x\n")
    assert read_adapter(tmp_path).base is None


# What cannot be used

def lora_of(path, unet, extra=(), stored=None, rank=1, fill=0.01):
    """A file with a LoRA of a UNet's attentions as peft names it, with other tensors put into it or over it."""
    layers = {name: one for name, one in weights_of(unet).items() if name.endswith(ATTENTION)}
    state = {f"unet.{name}.lora_A.weight": torch.full((rank, *one[1:]), fill) for name, one in layers.items()}
    state |= {f"unet.{name}.lora_B.weight": torch.full((one[0], rank), fill) for name, one in layers.items()}
    state = {name: tensor for name, tensor in (state | dict(extra)).items() if tensor is not None}
    save_file(state, path, {"format": "pt"} | (stored or {}))
    return path


Q = "unet.mid_block.attentions.0.to_q"
SPOILT = {
    "a bias": ({f"{Q}.lora_B.bias": torch.zeros(64)}, "to_q.lora_B.bias', which is no part"),
    "another kind": ({f"{Q}.hada_w1_a": torch.zeros(4)}, "hada_w1_a', which is no part"),
    "weights": ({"unet.conv_in.weight": torch.zeros(3, 3)}, "conv_in.weight', which is no part"),
    "another part": ({"transformer.x.lora_C.weight": torch.zeros(3, 3)}, "which is no part"),
    "an alpha of its own": ({f"{Q}.alpha": torch.zeros(1)}, "to_q.alpha', which is no part"),
    "half a layer": ({f"{Q}.lora_B.weight": None}, "only one of the two matrices of unet.mid_block.attentions.0.to_q"),
    "one magnitude": ({f"{Q}.lora_magnitude_vector": torch.ones(64)}, "magnitudes of some layers, but not of"),
    "another rank": ({f"{Q}.lora_B.weight": torch.zeros(64, 3)}, "do not fit each other"),
    "scalars": ({f"{Q}.lora_B.weight": torch.zeros(64)}, "do not fit each other"),
    "twice": ({f"{Q}.lora.up.weight": torch.zeros(64, 1)}, "mid_block.attentions.0.to_q twice"),
    "NaN": ({f"{Q}.lora_B.weight": torch.full((64, 1), torch.nan)}, "not all finite numbers: its training broke down"),
    "infinity": ({f"{Q}.lora_A.weight": torch.full((1, 64), torch.inf).half()}, "not all finite numbers"),
    "whole numbers": ({f"{Q}.lora_B.weight": torch.zeros(64, 1, dtype=torch.int8)}, "of torch.int8: it is no adapter"),
    "kohya's DoRA": ({"lora_unet_x.dora_scale": torch.ones(1)}, "magnitudes, which diffusers leaves out"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_is_not_wholly_known_is_refused_and_never_loaded_in_part(unet_in, tmp_path, name):
    extra, words = SPOILT[name]
    if name == "kohya's DoRA":
        save_file(extra, tmp_path / LORA_FILE)
    else:
        lora_of(tmp_path / LORA_FILE, unet_in(), extra)
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path)


@pytest.mark.parametrize("said, words", [
    ("{", "cannot be read"), ("[]", "cannot be read"), ('{"unet.r": 1}', "lora_alpha"),
    ('{"unet.lora_alpha": 1, "unet.r": 7}', "says rank 7 of .*whose matrices have rank 1"),
    ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(x+x+)+y": 1}}', "no layer's name"),
    ('{"unet.lora_alpha": Infinity}', "lora_alpha: Input should be a finite number[)].$"),
    ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q": NaN}}', "to_q: Input should be a finite number[)].$"),
    ("[" * 100_000, "cannot be read"),
])
def test_metadata_that_cannot_be_read_are_refused(unet_in, tmp_path, said, words):
    lora_of(tmp_path / LORA_FILE, unet_in(), stored={"lora_adapter_metadata": said})
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path)


def test_damaged_facts_are_refused(unet_in, origin, tmp_path):
    facts = metadata(origin, kind="lora") | {"floydtuner.rank": "many"}
    lora_of(tmp_path / LORA_FILE, unet_in(), stored=facts)
    with pytest.raises(AdapterError, match="facts of itself are damaged .rank: "):
        read_adapter(tmp_path)
    lora_of(tmp_path / LORA_FILE, unet_in(), stored=metadata(origin, kind="controlnet"))
    with pytest.raises(AdapterError, match="it is 'controlnet': the adapters of a UNet are lora, dora, bitfit"):
        read_adapter(tmp_path)


def test_what_an_adapter_says_of_itself_is_shown_on_one_line(unet_in, origin, tmp_path):
    facts = metadata(replace(origin, base_model="a\x1b[31m\nb"), kind="lora")
    lora_of(tmp_path / LORA_FILE, unet_in(), stored=facts)
    assert read_adapter(tmp_path).kind.endswith(r"trained on a\x1b[31m\nb")


class Malice:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", [LORA_FILE, "pytorch_lora_weights.bin", "lora.ckpt"])
def test_a_pickled_file_is_refused_in_words_and_not_opened(tmp_path, name):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Malice(tmp_path / "executed")))
    for path in (folder, folder / name):
        with pytest.raises(AdapterError, match="is a pickled file.*never opened.*same adapter as .safetensors"):
            read_adapter(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "of git LFS: run `git lfs pull`"),
    (b"", "no safetensors file, or it is damaged"),
    (b"<html>not found</html>", "no safetensors file, or it is damaged"),
    (None, "no safetensors file, or it is damaged"),
])
def test_a_damaged_file_is_refused_in_words(unet_in, tmp_path, content, words):
    path = lora_of(tmp_path / LORA_FILE, unet_in())
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path)


@pytest.mark.parametrize("files, words", [
    ((), "neither pytorch_lora_weights.safetensors nor"),
    (("dog.safetensors",), "Is it 'dog.safetensors' in it"),
    (("pipeline/model_index.json",), "pipeline is a whole model: name it as the stage's weights"),
    (("model_index.json",), "is a whole model"),
])
def test_a_folder_without_an_adapter_is_named_with_what_may_be_meant(pipeline, tmp_path, files, words):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(AdapterError, match=f"no adapter in {tmp_path}: .*{words}"):
        load_adapter(pipeline, tmp_path)
    with pytest.raises(AdapterError, match="no such file or folder"):
        read_adapter(tmp_path / "nothing")


def test_biases_beside_an_adapter_that_renamed_the_layers_are_refused(unet_in, pipeline, origin, tmp_path):
    adapter, unet = replace(BitFit(), origin=origin), unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path)
    ADAPTERS["lora"][0].attach(Denoiser(pipeline.unet), torch.float32)
    with pytest.raises(AdapterError, match="before any LoRA"):
        load_adapter(pipeline, tmp_path)


def test_an_adapter_beside_another_one_is_loaded_and_one_of_another_size_is_not(unet_in, pipeline, tmp_path):
    lora_of(tmp_path / "a.safetensors", pipeline.unet)
    lora_of(tmp_path / "b.safetensors", pipeline.unet, rank=2)
    lora_of(tmp_path / "c.safetensors", pipeline.unet, {f"{Q}.lora_A.weight": torch.zeros(1, 7)})
    load_adapter(pipeline, tmp_path / "a.safetensors", "a")
    load_adapter(pipeline, tmp_path / "b.safetensors", "b")
    assert set(pipeline.get_list_adapters()["unet"]) == {"a", "b"}
    with pytest.raises(AdapterError, match="1 of 42 of its layers have other sizes, such as mid_block"):
        load_adapter(pipeline, tmp_path / "c.safetensors", "c")
    with pytest.raises(AdapterError, match="already in use"):
        load_adapter(pipeline, tmp_path / "a.safetensors", "a")


@pytest.mark.parametrize("name", ["lora_unet_mid_block_attentions_0_nonsense", "lora_unet_output_blocks_99_1_to_q"])
def test_a_layer_that_diffusers_finds_no_place_for_is_refused(tiny_sd, tmp_path, name):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, requires_safety_checker=False)
    known, edge = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 64
    state = {f"{layer}.lora_down.weight": torch.zeros(2, edge) for layer in (known, name)}
    state |= {f"{layer}.lora_up.weight": torch.zeros(edge, 2) for layer in (known, name)}
    save_file(state, tmp_path / LORA_FILE)
    with pytest.raises(AdapterError, match="1 of its 2 layers"):
        load_adapter(pipeline, tmp_path)
    assert pipeline.get_list_adapters() == {}


# Which base, which stage

def config_of(hub_id):
    return dict(UNet2DConditionModel.load_config(architecture(hub_id)))


MEDIUM, LARGE, SECOND = "DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-I-L-v1.0", "DeepFloyd/IF-II-M-v1.0"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """LoRAs of published architectures, which tell nothing of themselves."""
    folder = tmp_path_factory.mktemp("published")
    names = (MEDIUM, LARGE, SECOND, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    unets = {name: bare_unet(config_of(name)) for name in names}
    return {name: lora_of(folder / f"{name.replace('/', '_')}.safetensors", unet) for name, unet in unets.items()}


def told(file, origin, **values):
    """The same file with facts."""
    adapter = read_adapter(file)
    target = file.with_name(f"told-{file.name}")
    save_file(load_file(file), target, metadata(replace(origin, **values), kind="lora", rank=1, alpha=1))
    assert adapter.facts is None
    return read_adapter(target)


@pytest.mark.parametrize("name", [MEDIUM, LARGE, SECOND])
def test_an_if_lora_that_tells_nothing_is_known_by_its_layers(files, name):
    adapter = read_adapter(files[name])
    assert adapter.base == name
    family = DEEPFLOYD_II if name == SECOND else DEEPFLOYD_I
    (note,) = require_fits(adapter, family.key, "/models/x", config_of(name), None, any_base=False)
    assert "does not tell what it was trained on; its layers fit /models/x" in note


@pytest.mark.parametrize("name, stage, words", [
    (LARGE, MEDIUM, f"^--stage1_lora.* 132 of 132 of its layers have other.*fits {LARGE}: type --stage1 {LARGE}"),
    (SECOND, MEDIUM, f"It fits {SECOND}, which is DeepFloyd IF stage II: type --stage2_lora "),
    (MEDIUM, SECOND, f"^--stage2_lora.*It fits {MEDIUM}, which is DeepFloyd IF stage I: type --stage1_lora "),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", MEDIUM, "Stable Diffusion 1.x/2.x: type --stage1 .* beside"),
])
def test_layers_that_do_not_fit_are_refused_with_what_they_fit(files, name, stage, words):
    family = DEEPFLOYD_II if stage == SECOND else DEEPFLOYD_I
    for any_base in (False, True):
        with pytest.raises(AdapterError, match=words):
            require_fits(read_adapter(files[name]), family.key, stage, config_of(stage), None, any_base)


def test_layers_that_fit_no_published_model_are_refused_too(pipeline, tmp_path):
    adapter = read_adapter(lora_of(tmp_path / "tiny.safetensors", pipeline.unet))
    with pytest.raises(AdapterError, match="^--mine: .*It fits no published model either"):
        require_fits(adapter, DEEPFLOYD_I.key, MEDIUM, config_of(MEDIUM), None, True, option="--mine")


def test_an_adapter_of_another_stage_is_refused_by_what_it_tells(files, origin):
    adapter = told(files[SECOND], origin, family=DEEPFLOYD_II.key, base_model=SECOND)
    words = f"is a LoRA of DeepFloyd IF stage II, trained on {SECOND}, and here one of DeepFloyd IF stage I is wanted"
    with pytest.raises(AdapterError, match=f"^--stage1_lora: .*{words}: type --stage2_lora .*told-"):
        require_fits(adapter, DEEPFLOYD_I.key, MEDIUM, config_of(MEDIUM), None, any_base=True)


BASES = [
    (MEDIUM, MEDIUM, None, True),
    (MEDIUM, "/models/IF-I-M-v1.0/", None, True),
    ("IF-I-M-v1.0", MEDIUM, None, True),
    ("my-if", "/other/my-if", None, True),
    (MEDIUM, "/models/medium", "abc", True),  # the same files by another name
    ("pipeline", "/output/pipeline", "abc", True),
    ("pipeline", "/another/pipeline", "xyz", False),  # as any full tuning calls its result
    ("my-if", MEDIUM, None, False),
    (MEDIUM, "/models/mine", "xyz", False),
    (MEDIUM, "/models/mine", None, False),
]


@pytest.mark.parametrize("trained_on, used_on, fingerprint, is_same", BASES)
def test_the_base_is_known_by_its_name_or_by_its_files(files, origin, trained_on, used_on, fingerprint, is_same):
    adapter = told(files[MEDIUM], origin, base_model=trained_on, base_fingerprint="abc")
    given = (adapter, DEEPFLOYD_I.key, used_on, config_of(MEDIUM), fingerprint)
    if is_same:
        assert require_fits(*given, any_base=False) == require_fits(*given, any_base=True) == ()
        return
    with pytest.raises(AdapterError, match=f"trained on {trained_on}, not on {used_on}.*--any_base true"):
        require_fits(*given, any_base=False)
    (note,) = require_fits(*given, any_base=True)
    assert f"was trained on {trained_on}, and is used on {used_on}" in note


def test_other_weights_of_the_same_name_are_told_of(files, origin):
    adapter = told(files[MEDIUM], origin, base_model=MEDIUM, base_fingerprint="abc")
    (note,) = require_fits(adapter, DEEPFLOYD_I.key, MEDIUM, config_of(MEDIUM), "of fp16", any_base=False)
    assert f"{MEDIUM} has other weights" in note and "variant" in note


def test_former_names_of_a_model_are_its_names(files, origin):
    sd = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    adapter = told(files[sd], origin, family=STABLE_DIFFUSION.key, base_model="runwayml/stable-diffusion-v1-5")
    assert require_fits(adapter, STABLE_DIFFUSION.key, sd, config_of(sd), None, any_base=False) == ()


def test_biases_of_another_model_are_refused(unet_in, origin, tiny_model, tmp_path):
    adapter, unet = replace(BitFit(), origin=origin), unet_in()
    adapter.attach(Denoiser(unet), torch.float32)
    adapter.save_weights(Denoiser(unet), tmp_path)
    biases = read_adapter(tmp_path)
    assert require_fits(biases, DEEPFLOYD_I.key, str(tiny_model), dict(unet.config), None, any_base=False) == ()
    with pytest.raises(AdapterError, match=f"is a BitFit of DeepFloyd IF stage I, .*does not fit {MEDIUM}: "):
        require_fits(biases, DEEPFLOYD_I.key, MEDIUM, config_of(MEDIUM), None, any_base=True)


def test_a_trainings_output_tells_its_base_and_the_bases_files(trainer, tiny_model, tmp_path):
    assert trainer(max_train_steps=1, checkpointing_steps=1) == 0
    output = tmp_path / "output"
    for path in (output, output / LORA_FILE, output / "checkpoint-1"):
        assert read_adapter(path).base == str(tiny_model)
    assert read_adapter(output).facts.base_fingerprint == fingerprint_unet(tiny_model, None)
    (tmp_path / "elsewhere").mkdir()
    copied = (output / LORA_FILE).rename(tmp_path / "elsewhere" / "dog.safetensors")
    assert read_adapter(copied).base is None
    run = json.loads((output / "run.json").read_text())
    run["options"]["pretrained_model_name_or_path"] = "/etc"
    (tmp_path / "elsewhere" / "run.json").write_text(json.dumps(run))
    assert read_adapter(copied).base is None, "run.json is of another adapter"


# What the scheduler is told

def test_the_scheduler_is_told_what_all_adapters_need(files, origin):
    foreign, other = read_adapter(files[MEDIUM]), read_adapter(files[LARGE])
    learned = told(files[MEDIUM], origin)
    fixed = told(files[LARGE], origin, variance_type="fixed_small")
    sd = read_adapter(files["stable-diffusion-v1-5/stable-diffusion-v1-5"])
    assert scheduler_changes([]) == scheduler_changes([sd]) == {}
    for adapters in ([foreign, other], [foreign, fixed], [sd, fixed]):
        assert scheduler_changes(adapters) == {"variance_type": "fixed_small"}
    assert scheduler_changes([sd, learned, learned]) == {"variance_type": "learned_range"}
    for one, two in ((learned, foreign), (fixed, learned)):  # one of them would be sampled with a broken variance
        with pytest.raises(AdapterError, match="cannot be sampled at once: .*variance_type=.*variance_type="):
            scheduler_changes([one, two])


def test_another_trainers_if_adapter_is_sampled_without_a_predicted_variance(trained, pipeline, tmp_path):
    as_diffusers_example_saves(trained(), tmp_path)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="learned_range")
    assert load_adapter(pipeline, tmp_path) is None
    assert pipeline.scheduler.config.variance_type == "fixed_small"
