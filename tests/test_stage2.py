"""Stage II end to end: trained on images and their low-resolution copies, judged by how it makes them large again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, IFSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file

from helpers.models.facts import read_adapter_facts
from helpers.training.loop import Run
from helpers.validation.eval_images import Upscales
from helpers.validation.render import Rendered

ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture
def stage2(trainer, tiny_stage2, tmp_path):
    """The trainer on the tiny stage II, with images of 64 px from 16 px."""
    data = tmp_path / "data.json"

    def run(**flags: object) -> int:
        flags = {
            "model_type": "deepfloyd-stage2-lora",
            "pretrained_model_name_or_path": tiny_stage2,
            "resolution": 64,
            "validation_resolution": "64",
            "num_eval_images": 2,
            "data_backend_config": data,
            **flags,
        }
        return trainer(**flags)

    def dataset(photos: Path, **keys: object) -> None:
        entry = {"id": "photos", "instance_data_dir": str(photos), "crop": True, "caption_strategy": "textfile", **keys}
        data.write_text(json.dumps([entry]), "utf-8")

    run.dataset = dataset
    return run


@pytest.fixture(autouse=True)
def default_dataset(stage2, photos):
    stage2.dataset(photos)


def test_the_adapter_loads_in_diffusers_completely(stage2, tmp_path, tiny_stage2):
    assert stage2(learning_rate=1e-2) == 0
    trained = load_file(tmp_path / "output" / ADAPTER)
    assert all(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    pipeline = IFSuperResolutionPipeline.from_pretrained(tiny_stage2)
    pipeline.load_lora_weights(tmp_path / "output")
    loaded = {name for name, _ in pipeline.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(trained)
    facts = read_adapter_facts(tmp_path / "output" / ADAPTER)
    assert (facts.family, facts.pipeline) == ("deepfloyd-ii", "IFSuperResolutionPipeline")
    assert (facts.kind, facts.rank, facts.variance_type) == ("lora", 4, "learned_range")


@pytest.mark.parametrize("trained, variance", [(True, "learned_range"), (False, "fixed_small")])
def test_full_tuning_moves_the_unet_and_writes_a_pipeline_with_the_scheduler_that_fits(
    stage2, tmp_path, tiny_stage2, trained, variance
):
    flags = {"model_type": "deepfloyd-stage2", "lora_rank": None, "learning_rate": 1e-3, "adam_weight_decay": 0}
    assert stage2(**flags, train_variance=trained, num_eval_images=0) == 0
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "output" / "pipeline")
    assert type(tuned) is IFSuperResolutionPipeline
    assert tuned.image_noising_scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert tuned.scheduler.config.variance_type == variance
    base = DiffusionPipeline.from_pretrained(tiny_stage2).unet.state_dict()
    moved = {name: (tensor != base[name]).any() for name, tensor in tuned.unet.state_dict().items()}
    assert sum(moved.values()) > 0.95 * len(moved)
    weight, before = tuned.unet.conv_out.weight, base["conv_out.weight"]
    assert (weight[:3] != before[:3]).any() and (weight[3:] != before[3:]).any() == trained


def test_it_trains_in_pure_bf16_with_checkpointing_on_images_of_several_aspects(stage2, photos, tmp_path, capfd):
    stage2.dataset(photos, crop_aspect="preserve")
    flags = {"mixed_precision": "bf16", "pure_bf16": True, "gradient_checkpointing": True, "optimizer": "adamw_bf16"}
    assert stage2(**flags, validation_resolution="64,96x64", max_train_steps=4) == 0
    assert "80x64" in capfd.readouterr().out
    step = tmp_path / "output" / "validation_images" / "step_4"
    sizes = {Image.open(path).size for path in step.glob("photos_*.png")}
    assert sizes == {(64, 64), (96, 64)}


@pytest.mark.parametrize(
    "flags",
    [{}, {"use_dora": True}, {"model_type": "deepfloyd-stage2", "lora_rank": None}],
    ids=["lora", "dora", "full"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage2, tmp_path, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"learning_rate": 1e-3, "checkpointing_steps": 2, "max_train_steps": 4, **flags}
    assert stage2(output_dir=whole, **common) == 0
    assert stage2(output_dir=parts, **common) == 0
    shutil.rmtree(parts / "checkpoint-4")
    assert stage2(output_dir=parts, **common) == 0
    files = [path.relative_to(whole) for path in (whole / "checkpoint-4").rglob("*.safetensors")]
    assert len(files) == 2, "the state, and the weights"
    for file in files:
        one, two = load_file(whole / file), load_file(parts / file)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), file


def test_eval_images_stay_the_same_in_every_run_and_are_scored(stage2, tmp_path, photos):
    runs = {}
    for name, flags in {"one": {}, "two": {"seed": 7}, "three": {"validation_seed": 7}}.items():
        assert stage2(output_dir=tmp_path / name, max_train_steps=1, **flags) == 0
        runs[name] = json.loads((tmp_path / name / "eval_images.json").read_text())
    assert runs["one"] == runs["two"] != runs["three"]
    assert len(set(runs["one"]["photos"])) == 2
    step = tmp_path / "one" / "validation_images" / "step_1"
    scores = json.loads((step / "psnr.json").read_text())
    assert len(scores) == 2 and all(5 < score["output"] < score["bicubic"] < 60 for score in scores.values())
    assert {path.stem for path in step.glob("photos_*.png")} == scores.keys()


def test_eval_images_that_vanish_while_it_trains_are_left_out_and_training_goes_on(
    stage2, tmp_path, photos, capfd, monkeypatch
):
    folder = shutil.copytree(photos, tmp_path / "vanishing")
    stage2.dataset(folder)
    render = Upscales.render

    def then_delete_one(self: Upscales, run: Run, output: Path) -> Rendered:
        rendered = render(self, run, output)
        next(image.path for image in self.eval_images if image.path.exists()).unlink()
        return rendered

    monkeypatch.setattr(Upscales, "render", then_delete_one)
    assert stage2(validation_steps=1, max_train_steps=2) == 0
    said = "".join(capfd.readouterr())
    steps = tmp_path / "output" / "validation_images"
    scores = [json.loads((steps / f"step_{step}" / "psnr.json").read_text()) for step in (0, 1)]
    assert [len(score) for score in scores] == [2, 1] and scores[1].keys() < scores[0].keys()
    assert f"The eval image {folder}" in said and "No such file" in said
    assert "Validation at step 2 failed, training goes on" in said and "none of the eval images can be read" in said
    assert (tmp_path / "output" / ADAPTER).exists()


def test_only_images_that_fill_the_validation_size_are_upscaled_to_it(stage2, tmp_path, capfd):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, edge in enumerate((80, 80, 80, 128)):
        Image.new("RGB", (edge, edge), "red").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red square")
    stage2.dataset(folder)
    assert stage2(validation_resolution="64,128", max_train_steps=1, num_eval_images=2) == 0
    said = capfd.readouterr().out
    assert "1 of 2 eval images at 128x128 (NUM_EVAL_IMAGES, --num_eval_images): 3 images do not fill it" in said
    step = tmp_path / "output" / "validation_images" / "step_1"
    assert len(list(step.glob("*_64x64.png"))) == 2
    [large] = step.glob("*_128x128.png")
    assert large.name.startswith("photos_3_")
    scores = json.loads((step / "psnr.json").read_text(), parse_constant=pytest.fail)
    assert all(score["output"] < score["bicubic"] == 100 for score in scores.values()), "flat, so bicubic is exact"
    assert stage2(output_dir=tmp_path / "none", validation_resolution="144", max_train_steps=1) == 0
    assert "No image fills any size of VALIDATION_RESOLUTION" in capfd.readouterr().out


def test_psnr_is_a_curve_in_tensorboard(stage2, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert stage2(report_to="tensorboard", max_train_steps=2, validation_steps=1) == 0
    events = EventAccumulator(str(next((tmp_path / "output" / "logs").rglob("events.*")).parent)).Reload()
    assert [event.step for event in events.Scalars("validation/psnr")] == [0, 1, 2]
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("validation/psnr/photos_")]) == 2


def test_validation_prompts_are_not_drawn_which_is_said(stage2, tmp_path, capfd):
    assert stage2(validation_prompt="a fox", max_train_steps=1) == 0
    assert "validation prompts are not drawn" in capfd.readouterr().out
    assert stage2(output_dir=tmp_path / "none", num_eval_images=0, max_train_steps=1) == 0
    assert "NUM_EVAL_IMAGES (--num_eval_images) is 0" in capfd.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ({"resolution": 48}, "stage II makes images of 64 pixels and more out of a quarter of that: type 64"),
    ({"resolution": 72}, "needs a multiple of 16 pixels: type 64 or 80"),
    ({"validation_resolution": "64x48"}, "found 64x48, DeepFloyd IF stage II makes images of 64 pixels and more"),
    ({"validation_resolution": "72"}, "instead of 72 type 64 or 80"),
    ({"use_dora": "true", "model_type": "deepfloyd-stage2", "lora_rank": None}, "use_dora"),
])
def test_wrong_sizes_are_refused_before_training(stage2, capfd, flags, words):
    assert stage2(**flags) == 2
    assert words in capfd.readouterr().err


def test_a_dataset_of_the_wrong_resolution_is_named(stage2, photos, capfd):
    stage2.dataset(photos, resolution=32)
    assert stage2() == 2
    said = capfd.readouterr().err
    assert "'photos'" in said and 'key "resolution": found 32, DeepFloyd IF stage II makes images of 64' in said


def test_published_weights_need_256_px(stage2, capfd):
    assert stage2(pretrained_model_name_or_path="DeepFloyd/IF-II-M-v1.0") == 2
    assert "makes images of 256 pixels and more out of a quarter of that: type 256" in capfd.readouterr().err


def test_weights_of_the_other_stage_are_refused(stage2, tiny_model, tmp_path, capfd):
    before = set(tmp_path.rglob("*"))
    assert stage2(pretrained_model_name_or_path=tiny_model) == 2
    said = capfd.readouterr().err
    assert "they are DeepFloyd IF stage I: set MODEL_TYPE (--model_type) to deepfloyd-lora or deepfloyd-full" in said
    assert stage2(model_type="deepfloyd-lora", num_eval_images=None) == 2
    assert "they are DeepFloyd IF stage II: set MODEL_TYPE" in capfd.readouterr().err
    assert set(tmp_path.rglob("*")) == before, "refused before an image is scanned or a caption is encoded"


def test_areas_whose_edges_fall_below_the_smallest_are_left_out_in_words(stage2, tmp_path, capfd):
    folder = tmp_path / "wide"
    folder.mkdir()
    for name, size in (("square", (90, 90)), ("wide", (180, 100))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a red picture")
    stage2.dataset(folder, crop_aspect="preserve", resolution=0.004096, resolution_type="area")
    assert stage2(dry_run=True) == 0
    said = capfd.readouterr().out
    assert "180x100 would be trained at 80x48, with an edge below the 64 pixels that the model needs" in said
    assert "1 images used" in said and "buckets: 64x64 (1)" in said


def test_small_images_are_left_out_and_a_folder_of_them_is_refused(stage2, tmp_path, photos, capfd):
    folder = tmp_path / "small"
    folder.mkdir()
    for name, edge in (("small", 48), ("large", 80)):
        Image.new("RGB", (edge, edge), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a red square")
    stage2.dataset(folder)
    assert stage2(max_train_steps=1) == 0
    assert "48x48 is smaller than its training size 64x64" in capfd.readouterr().out
    (folder / "large.png").unlink()
    assert stage2(output_dir=tmp_path / "second") == 2
    assert "smaller than its training size" in capfd.readouterr().err
