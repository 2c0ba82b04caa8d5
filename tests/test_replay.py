"""A validation picture is made again from what its training left: the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from helpers.config.paths import ROOT
from helpers.images.recipes import read_recipe
from helpers.replay import draw_again
from helpers.training import run_json
from helpers.validation.recipe import NotReplayable

PURE = {"mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adamw_bf16"}
FULL = {"model_type": "deepfloyd-full", "lora_rank": None}
SD = {"model_type": "lora", "resolution": 64}
STAGE2 = {"model_type": "deepfloyd-stage2-lora", "resolution": 64, "num_eval_images": 3, "validation_noise_level": 100}
KINDS = {
    "lora": ({"use_ema": True, "validation_prompt": None, "validation_prompt_library": "LIBRARY"}, "model"),
    "pure bf16": ({**PURE, "use_dora": True}, "model"),
    "int8": ({"mixed_precision": "bf16", "base_model_precision": "int8"}, "model"),
    "bf16": ({"mixed_precision": "bf16", "use_ema": True, "lora_dropout": 0.2}, "model"),
    "full": ({**FULL, **PURE, "use_ema": True, "train_variance": False}, "model"),
    "stage II": (STAGE2, "stage2"),
    "text encoder": ({**SD, "train_text_encoder": True, "use_ema": True, "validation_guidance_rescale": 0.3}, "sd"),
    "controlnet": ({**SD, "model_type": "full", "lora_rank": None, "controlnet": True, "num_eval_images": 2}, "sd"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trained(trainer, tmp_path, cache, smaller_model, tiny_stage2, tiny_sd, photos) -> Callable[..., Path]:
    """Train one of the kinds for two steps; gives the output folder."""
    bases = {"model": smaller_model, "stage2": tiny_stage2, "sd": tiny_sd}
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"cat": "a cat", "dog": "a dog\nin the snow"}), "utf-8")

    def train(kind: str, **more: object) -> Path:
        flags, base = KINDS[kind]
        entries = [{"id": "photos", "instance_data_dir": str(photos), "caption_strategy": "textfile", "resolution": 64}]
        if "controlnet" in flags:
            controls = shutil.copytree(photos, tmp_path / "controls")
            entries.append({"id": "controls", "dataset_type": "conditioning", "instance_data_dir": str(controls)})
        data = tmp_path / "replayed.json"
        data.write_text(json.dumps(entries), "utf-8")
        drawn = {"validation_prompt_library": library} if "validation_prompt_library" in flags else {}
        common = {"validation_prompt": "a fox", "validation_negative_prompt": "blurry", "validation_resolution": "64"}
        flags = {**common, "learning_rate": 0.1, "lr_scheduler": "constant", **flags}
        flags |= {"pretrained_model_name_or_path": bases[base], "data_backend_config": data}
        assert trainer(**{**flags, **drawn, "cache_dir": cache, **more}) == 0
        return tmp_path / "output"

    return train


def again(image: Path, output: Path) -> bytes:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return draw_again(image, read_recipe(image), output).read_bytes()


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def pictures_of(output: Path, step: int) -> list[Path]:
    return sorted((output / "validation_images" / f"step_{step}").glob("*_*x*.png"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_made_again_to_the_byte_and_its_recipe_tells_no_path(trained, tmp_path, photos, kind):
    output = trained(kind)
    before = files_of(output)
    (first, *_), (*_, last) = pictures_of(output, 0), pictures_of(output, 2)
    assert again(first, tmp_path / "a.png") == first.read_bytes()
    assert again(last, tmp_path / "b.png") == last.read_bytes()
    before_it = output / "validation_images" / "step_0" / last.name
    assert Image.open(before_it).tobytes() != Image.open(last).tobytes(), "the weights show"
    assert files_of(output) == before, "nothing is written where the training lies"
    told = json.dumps(read_recipe(last))
    assert [path for path in (tmp_path, photos, ROOT, Path.home()) if str(path) in told] == []
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert again(last, tmp_path / "c.png") == last.read_bytes(), "the result has the last step's weights"
    run_json.write(output, json.loads((output / "run.json").read_text()), finished=3)
    with pytest.raises(NotReplayable, match="checkpoint-2, which in .* is not there.*CHECKPOINTING_LIMIT=0"):
        again(last, tmp_path / "d.png")


def test_what_is_not_there_any_more_is_told_and_what_can_be_made_anew_is(trained, tmp_path, tiny_stage2, photos):
    own, model = shutil.copytree(photos, tmp_path / "own"), shutil.copytree(tiny_stage2, tmp_path / "model")
    output = trained("stage II", pretrained_model_name_or_path=model, cache_dir=tmp_path / "cache")
    picture = pictures_of(output, 2)[0]
    made, recipe = picture.read_bytes(), read_recipe(picture)
    shutil.rmtree(tmp_path / "cache")
    assert again(picture, tmp_path / "a.png") == made, "captions are encoded again"
    moved = output.rename(tmp_path / "moved")
    picture = moved / picture.relative_to(output)
    assert again(picture, tmp_path / "b.png") == made
    elsewhere = shutil.copy(picture, tmp_path / "copy.png")
    with pytest.raises(NotReplayable, match="no training in 'output'.*picture back into validation_images/step_2"):
        again(elsewhere, tmp_path / "c.png")
    data = tmp_path / "replayed.json"
    data.write_text(data.read_text("utf-8").replace(str(photos), str(own)), "utf-8")
    shown = recipe["together"][1]
    (own / shown["image"]["path"]).write_bytes(b"another")
    with pytest.raises(NotReplayable, match="dataset 'photos': .* is another image by now: put back"):
        again(picture, tmp_path / "c.png")
    (own / shown["image"]["path"]).unlink()
    with pytest.raises(NotReplayable, match="dataset 'photos': .* cannot be read .No such file.*: put back"):
        again(picture, tmp_path / "c.png")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1_000_000:] = bytes(1_000_000)
    weights.write_bytes(content)
    with pytest.raises(NotReplayable, match="whose weights are others than those"):
        again(picture, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_options_of_the_training_that_changed_are_told(trained, tmp_path, capsys):
    output = trained("lora", max_train_steps=1)
    picture, options = pictures_of(output, 1)[0], output / "run.json"
    told = options.read_text("utf-8")
    assert '"mixed_precision": "no"' in told
    options.write_text(told.replace('"mixed_precision": "no"', '"mixed_precision": "bf16"'), "utf-8")
    again(picture, tmp_path / "a.png")
    said = capsys.readouterr().out
    assert "was made with precision 'no', and its training has 'bf16' now: another one may come out" in said


def test_a_run_below_the_project_is_found_from_anywhere(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.config.paths.ROOT", tmp_path)
    output = trained("pure bf16", max_train_steps=1)
    picture = pictures_of(output, 0)[0]
    assert read_recipe(picture)["output_dir"] == "output"
    elsewhere = shutil.copy(picture, tmp_path / "copy.png")
    (output / "validation_images").rename(tmp_path / "away")
    assert again(elsewhere, tmp_path / "a.png") == elsewhere.read_bytes()
