"""The flags of `inference.py`: checked in a second, all problems at once, by the rules of the trainer's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers.config.inference import read_prompts, read_request
from helpers.config.inference_options import INFERENCE_ROWS, InferenceOptions, plain
from helpers.config.paths import ROOT
from helpers.config.problems import ConfigError


def problems(*flags: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_request(flags)
    return caught.value.problems


def test_a_prompt_is_enough_and_the_cascade_is_the_published_one():
    request = read_request(["--prompt", "a photo of a cat"])
    chain = request.chain()
    assert chain["stage1"] == "DeepFloyd/IF-I-M-v1.0" and chain["stage2"] == "DeepFloyd/IF-II-M-v1.0"
    assert chain["upscaler"] == "stabilityai/stable-diffusion-x4-upscaler"


@pytest.mark.parametrize("flags, stages", [
    (["--stage2=none", "--upscaler=none"], ["stage1"]),
    (["--upscaler=none"], ["stage1", "stage2"]),
    (["--stage1=2.1"], ["stage1"]),
    (["--stage1=2.1", "--upscaler=x4"], ["stage1", "upscaler"]),
    (["--image=README.md"], ["upscaler"]),
    (["--image=README.md", "--stage2=ii-large-1.2b"], ["stage2"]),
    (["--image=README.md", "--stage2=ii-large-1.2b", "--upscaler=x4"], ["stage2", "upscaler"]),
], ids=str)  # fmt: skip
def test_which_stages_work(flags, stages):
    assert list(read_request(["--prompt=x", *flags]).chain()) == stages


def test_all_problems_are_told_at_once():
    told = "\n".join(problems("--promt=x", "--prompt=a", "--steps=fast28", "--size=9:1", "--guidance=0", "--vram=7"))
    for flag in ("--promt", "--steps", "--size", "--guidance", "--vram"):
        assert flag in told
    assert "did you mean --prompt?" in told


@pytest.mark.parametrize("flags, words", [
    ([], "--prompt: is not set"),
    (["--prompt="], "--prompt: is not set"),
    (["--prompts=README.md", "--image=docs/demo.png"], "--prompts: found beside --image"),
    (["--prompt=x", "--stage1=ii-medium-450m"], "type it after --stage2"),
    (["--prompt=x", "--stage2=i-medium-400m"], "type it after --stage1"),
    (["--prompt=x", "--stage1=i-medium-400"], "did you mean i-medium-400m?"),
    (["--prompt=x", "--stage1=none", "--stage2=none", "--upscaler=none"], "name at least one model"),
    (["--prompt=x", "--stage1=none"], "has nothing to upscale"),
    (["--image=README.md", "--stage1=i-medium-400m"], "--stage1 none"),
    (["--prompt=x", "--stage1=model.ckpt"], "a pickled file"),
    (["--prompt=x", "--stage1=model.safetensors"], "there is no file"),
    (["--prompt=x", "--stage2=model.safetensors"], "a single file: type the path of a folder"),
    (["--prompt=x", "--prediction_type=epsilon"], "--prediction_type: found it, but --stage1 is no single"),
    (["--prompt=x", "--single_file_config=a/b"], "--single_file_config: found it, but --stage1 is no single"),
    (["--prompt=x", "--stage1=./nowhere"], "there is no folder"),
    (["--prompt=x", "--stage1=docs"], "no model_index.json"),
    (["--prompt=x", "--steps=10,20", "--stage2=none", "--upscaler=none"], "2 values for 1 stage"),
    (["--prompt=x", "--guidance=7,4,9", "--upscaler=none"], "3 values for 2 stages"),
    (["--prompt=x", "--steps=smart50", "--scheduler=dpm++"], "which is for ddpm"),
    (["--prompt=x", "--stage2=none", "--upscaler=none", "--noise_level=3"], "nothing is upscaled"),
    (["--prompt=x", "--stage1_lora=nowhere.safetensors"], "there is no file or folder"),
    (["--prompt=x", "--stage1_lora_scale=0.5"], "no --stage1_lora"),
    (["--prompt=x", "--output=a.png", "--num_images=2"], "for several pictures"),
    (["--prompt=x", "--output=README.md"], "is a file"),
    (["--prompts=nowhere.txt"], "cannot be read"),
    (["--replay=nowhere.png"], "there is no file"),
    (["--replay=docs/demo.png", "--prompt=x", "--seed=3"], "leave it out"),
    (["--replay=docs/demo.png", "--demo"], "leave --demo out"),
    (["--prompt=x", "--device=gpu"], "cuda:1"),
    (["--prompt=x", "--size=64x64,96x64"], "one size"),
    (["--prompt=x", "--stage1_lora=README.md:11"], "at most 10"),
    (["--prompt=x", "--image=docs/nothing.png"], "there is no file or folder"),
], ids=str)  # fmt: skip
def test_each_slip_is_told_with_what_to_type(flags, words):
    assert words in "\n".join(problems(*flags))


def test_a_training_s_folder_is_a_model_or_says_that_it_is_an_adapter(tmp_path):
    whole = tmp_path / "full" / "pipeline"
    whole.mkdir(parents=True)
    (whole / "model_index.json").write_text("{}", "utf-8")
    assert read_request(["--prompt=x", f"--stage1={whole.parent}"]).chain()["stage1"] == str(whole)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "pytorch_lora_weights.safetensors").touch()
    assert "type it after --stage1_lora" in problems("--prompt=x", f"--stage1={adapter}")[0]


def test_an_adapter_s_base_takes_the_place_of_the_default(tmp_path):
    adapter = tmp_path / "a.safetensors"
    adapter.touch()
    request = read_request(["--prompt=x", f"--stage1_lora={adapter}:0.5", "--stage1_lora_scale=2"])
    [weighed] = request.options.stage1_lora
    assert (weighed.path, weighed.scale) == (str(adapter), 0.5)
    assert request.chain({"stage1": "DeepFloyd/IF-I-L-v1.0"})["stage1"] == "DeepFloyd/IF-I-L-v1.0"
    assert list(request.chain({"stage1": "CompVis/stable-diffusion-v1-4"})) == ["stage1"]


@pytest.mark.parametrize("name, content, prompts", [
    ("a.txt", "a cat\n\n  a dog \n", {"a cat": "a cat", "a dog": "a dog"}),
    ("a.json", '["a cat", "a dog"]', {"a cat": "a cat", "a dog": "a dog"}),
    ("a.json", '{"cat": "a photo of a cat"}', {"cat": "a photo of a cat"}),
])  # fmt: skip
def test_a_file_of_prompts(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content, "utf-8")
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize("name, content", [
    ("a.txt", b"\n \n"), ("a.txt", b"\xff\xfe"), ("a.json", b"{}"), ("a.json", b"[1]"), ("a.json", b"["),
    ("a.txt", b"x" * 20_001), ("a.json", b'["' + b"x" * 20_001 + b'"]'),
])  # fmt: skip
def test_a_file_without_prompts_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="--prompts"):
        read_prompts(tmp_path / name)


def test_what_an_option_comes_to_can_be_typed_again():
    said = {"size": "3:2", "steps": "smart50,super27,30", "guidance": "7,4.5,9", "noise_level": "250,20", "seed": 3}
    options = InferenceOptions(**said)
    again = InferenceOptions(**{name: plain(getattr(options, name)) for name in said})
    assert again == options and json.dumps({name: plain(getattr(options, name)) for name in said})


def test_every_option_has_words_for_its_default():
    assert all(row.default_words or row.field.default is not None or name in {
        "prompt", "prompts", "image", "stage1_lora", "stage2_lora", "upscaler_lora", "variant", "replay"
    } for name, row in INFERENCE_ROWS.items())  # fmt: skip


def test_a_slip_is_told_without_loading_torch():
    program = (
        "import sys; from helpers.config.inference import read_request\n"
        "try: read_request(['--promt=x'])\nexcept ValueError as error: print(error)\n"
        "print({'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "did you mean --prompt?" in ran.stdout and ran.stdout.endswith("set()\n")


def test_the_demo_draws_what_an_adapter_has_learned_through_all_stages(tmp_path):
    (tmp_path / "one.safetensors").touch()
    learned = read_request(["--demo", f"--stage1_lora={tmp_path / 'one.safetensors'}"])
    assert learned.options.prompt == "a photo of a purple heart"
    assert list(learned.chain()) == ["stage1", "stage2", "upscaler"]


def test_a_value_of_the_demo_gives_way_to_what_is_typed():
    demo = read_request(["--demo"])
    assert demo.options.prompt == "a photo of a red circle" and demo.chain()["stage1"].endswith("examples/demo/model")
    typed = read_request(["--demo", "--prompt=a photo of a blue square", "--stage2=none", "--upscaler=none"])
    assert typed.options.prompt == "a photo of a blue square" and list(typed.chain()) == ["stage1"]
    assert len(typed.options.steps) == 1
