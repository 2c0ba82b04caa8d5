"""The whole cascade by `inference.py`, on tiny models: what comes out, from what, and how much is held at a time."""

from __future__ import annotations

import errno
import gc
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from helpers.images.recipes import read_recipe, save_png
from helpers.inference.placement import Budget
from helpers.models import offloading
from helpers.models.text import T5

COMPONENTS = ("T5EncoderModel", "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "IFSafetyChecker")

PLAIN = dict.fromkeys(("prompt", "stage1", "stage2", "upscaler", "size", "steps"))
"""Flags that a replay takes from its recipe."""


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_prompt_becomes_a_picture_of_the_size_that_was_asked_for(draw):
    drawn = draw(size="96x64", save_stages="true")
    assert drawn.code == 0, drawn.said
    names = [path.name for path in drawn.files]
    assert names == ["a_photo_of_a_red_circle_42_24x16.png", "a_photo_of_a_red_circle_42_96x64.png"]
    assert [Image.open(path).size for path in drawn.files] == [(24, 16), (96, 64)]


def test_a_replay_of_any_picture_has_the_same_bytes(draw, tmp_path):
    """Of pictures that were made in batches, the recipe names those that were made beside it."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"circle": "a photo of a red circle", "square": "a photo of a blue square"}', "utf-8")
    drawn = draw(prompt=None, prompts=prompts, num_images=3, save_stages="true", negative_prompt="green")
    assert drawn.code == 0 and len(drawn.files) == 12, drawn.said
    for name in ("square_44_64x64.png", "circle_43_16x16.png"):
        again = draw(**PLAIN, replay=drawn.output / name, output=tmp_path / "again")
        assert again.code == 0 and [path.name for path in again.files] == [name], again.said
        assert "The same bytes as" in again.said
        assert again.files[0].read_bytes() == (drawn.output / name).read_bytes()


def test_a_replay_of_what_was_changed_is_refused_by_its_name(draw, tmp_path, tiny_model, tiny_stage2):
    own = shutil.copytree(tiny_stage2, tmp_path / "stage2")
    [picture] = draw(stage2=own).files
    weights = own / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000:] = bytes(1000)
    weights.write_bytes(content)
    refused = draw(**PLAIN, replay=picture)
    assert refused.code == 2 and "its unet" in refused.said and "--stage2" in refused.said
    typed = draw(**{**PLAIN, "stage2": tiny_stage2}, replay=picture)
    assert typed.code == 0 and (pixels(typed.files[0]) == pixels(picture)).all()
    varied = draw(**{**PLAIN, "stage2": own}, replay=picture)
    assert varied.code == 0 and "it will differ" in varied.said and "Not quite the picture in" in varied.said
    shutil.rmtree(own)
    gone = draw(**PLAIN, replay=picture)
    assert gone.code == 2 and "there is no folder" in gone.said


@pytest.mark.parametrize("change", [
    {"version": 2}, {"index": 7}, {"pictures": []}, {"strange": 1}, {"dtype": "fp64"},
    {"options": {"output": "/tmp/elsewhere"}}, {"options": {"steps": "1000000"}}, {"options": {"stage1": "none"}},
    {"stages": [{"stage": "stage1", "model": {}, "adapters": [], "size": "99999x99999", "batch": 1}]},
    {"stages": "x" * 1000},
], ids=str)  # fmt: skip
def test_a_recipe_that_anyone_may_have_written_is_refused_in_words(draw, tmp_path, recipe, change):
    own = {**recipe, **change}
    if "options" in change:
        own["options"] = {**recipe["options"], **change["options"]}
    path = tmp_path / "strange.png"
    save_png(Image.new("RGB", (8, 8)), path, own)
    refused = draw(**PLAIN, replay=path)
    assert refused.code == 2 and not refused.files and "Traceback" not in refused.said


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, embeds_of_module) -> dict:
    """Of a picture of stage I."""
    import inference

    output = tmp_path_factory.mktemp("recipe")
    flags = {"prompt": "a photo of a red circle", "stage1": tiny_model, "stage2": "none", "upscaler": "none"}
    flags |= {"size": "16x16", "steps": 1, "cache_dir": embeds_of_module, "output": output}
    assert inference.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    [path] = output.iterdir()
    return read_recipe(path)


@pytest.fixture(scope="module")
def embeds_of_module(embeds):
    return embeds


def test_one_component_at_a_time_is_held(draw, tmp_path):
    """Whatever computes, no other model's weights are there: neither on the device nor beside it."""
    held: list[set[str]] = []

    def look(module: torch.nn.Module, _: object) -> None:
        # Estimates of memory pass through models on the meta device, once a process.
        if type(module).__name__ in COMPONENTS and not next(module.parameters()).is_meta:
            models = [one for one in gc.get_objects() if type(one).__name__ in COMPONENTS]
            real = {type(one).__name__ for one in models if not next(one.parameters()).is_meta}
            count = sum(not next(one.parameters()).is_meta for one in models)
            held.append(real if count == 1 else {*real, "several"})

    gc.collect()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        drawn = draw(vram=6, cache_dir=tmp_path / "new", guidance=3)
    finally:
        hook.remove()
    assert drawn.code == 0, drawn.said
    assert held == [{"T5EncoderModel"}] + 4 * [{"UNet2DConditionModel"}]


def test_a_prompt_is_encoded_once_for_all_stages_and_all_time(draw, tmp_path, monkeypatch):
    texts: list[str] = []
    load = T5.load

    class Counted:
        def __init__(self, *arguments: object) -> None:
            self.encoder = load(*arguments)
            self.length, self.length_of = self.encoder.length, self.encoder.length_of

        def __call__(self, batch):
            texts.extend(batch)
            return self.encoder(batch)

    monkeypatch.setattr(T5, "load", lambda *arguments: Counted(*arguments))
    flags = {"prompt": "A Photo of a red circle", "cache_dir": tmp_path / "new", "guidance": 3}
    assert draw(**flags).code == 0
    assert sorted(texts) == ["", "a photo of a red circle"]
    assert draw(**flags).code == 0 and len(texts) == 2


def test_a_picture_hangs_on_its_own_seed_alone(draw):
    together = draw(seed=7, num_images=3)
    [alone] = draw(seed=8, output=together.output / "alone").files
    same = together.output / "a_photo_of_a_red_circle_8_64x64.png"
    assert np.abs(pixels(alone) - pixels(same)).max() <= 2
    assert np.abs(pixels(alone) - pixels(together.output / "a_photo_of_a_red_circle_7_64x64.png")).max() > 50


def test_a_stage_alone_makes_of_a_picture_what_the_cascade_makes(draw):
    small, large = draw(save_stages="true").files
    upscaled = draw(image=small, stage1=None, size=None, output=small.parent / "upscaled")
    assert upscaled.code == 0, upscaled.said
    assert [Image.open(path).size for path in upscaled.files] == [(64, 64)]
    assert (pixels(upscaled.files[0]) == pixels(large)).all()


def test_a_folder_of_images_of_several_sizes_is_upscaled_and_each_replays(draw, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("wide", (25, 16, 3)), ("tall", (16, 24, 3)), ("even", (16, 16, 3))):
        Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "note.txt").write_text("no image", "utf-8")
    drawn = draw(image=folder, prompt=None, stage1=None, size=None)
    assert drawn.code == 0, drawn.said
    assert {path.name for path in drawn.files} == {"wide_42_64x96.png", "tall_42_96x64.png", "even_42_64x64.png"}
    wide = drawn.output / "wide_42_64x96.png"
    again = draw(**PLAIN, replay=wide, output=tmp_path / "again")
    assert again.code == 0 and again.files[0].read_bytes() == wide.read_bytes(), again.said
    Image.new("RGB", (16, 25)).save(folder / "wide.png")
    changed = draw(**PLAIN, replay=wide)
    assert changed.code == 2 and "was changed" in changed.said
    cut_short = folder / "even.png"
    cut_short.write_bytes(cut_short.read_bytes()[:200])
    damaged = draw(image=folder, prompt=None, stage1=None, size=None)
    assert damaged.code == 2 and "--image" in damaged.said and "even.png" in damaged.said and not damaged.files


def test_nothing_is_overwritten(draw, tmp_path):
    first, second = draw(stage2="none", size="16x16").files, draw(stage2="none", size="16x16").files
    assert first[0].name == "a_photo_of_a_red_circle_42_16x16.png"
    assert second[0].name == "a_photo_of_a_red_circle_42_16x16-2.png"
    assert first[0].read_bytes() == second[0].read_bytes()
    single = tmp_path / "one.png"
    assert draw(stage2="none", size="16x16", output=single).code == 0 and single.exists()
    refused = draw(stage2="none", size="16x16", output=single)
    assert refused.code == 2 and "exists already" in refused.said


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "unipc", "ddpm"])
def test_every_sampler_draws_with_a_learned_variance_at_hand(draw, scheduler):
    drawn = draw(scheduler=scheduler, steps=3)
    assert drawn.code == 0 and len(drawn.files) == 1, drawn.said


def test_stable_diffusion_draws_too(draw, tiny_sd):
    drawn = draw(stage1=tiny_sd, stage2=None, upscaler=None, size="128x64")
    assert drawn.code == 0 and [Image.open(path).size for path in drawn.files] == [(128, 64)], drawn.said
    again = draw(**PLAIN, replay=drawn.files[0], output=drawn.output / "again")
    assert again.files[0].read_bytes() == drawn.files[0].read_bytes()


@pytest.fixture
def stage1_alone(draw):
    """Of 16 px, with one step more than none."""
    return lambda **flags: draw(**{"stage2": "none", "size": "16x16", **flags})


@pytest.mark.parametrize("kind", ["lora", "bitfit"])
def test_an_adapter_acts_and_its_base_need_not_be_typed(stage1_alone, adapter_on, tiny_model, kind):
    output = adapter_on(tiny_model, "deepfloyd-i", kind)
    options = {"pretrained_model_name_or_path": str(tiny_model)}
    (output / "run.json").write_text(json.dumps({"options": options}), "utf-8")
    [without] = stage1_alone().files
    adapted = stage1_alone(stage1=None, stage1_lora=output)
    assert adapted.code == 0, adapted.said
    assert np.abs(pixels(adapted.files[0]) - pixels(without)).max() > 20
    again = stage1_alone(**PLAIN, replay=adapted.files[0])
    assert again.code == 0 and again.files[0].read_bytes() == adapted.files[0].read_bytes(), again.said


def test_the_scale_of_an_adapter_is_between_none_and_all_of_it(stage1_alone, adapter_on, tiny_model):
    output = adapter_on(tiny_model, "deepfloyd-i")
    without, none, half, scaled, whole = (
        pixels(stage1_alone(**flags).files[0])
        for flags in (
            {},
            {"stage1_lora": f"{output}:0"},
            {"stage1_lora": f"{output}:0.5"},
            {"stage1_lora": output, "stage1_lora_scale": 0.5},
            {"stage1_lora": f"{output}"},
        )
    )
    assert np.abs(none - without).max() <= 1 and (half == scaled).all()
    assert np.abs(half - without).mean() < np.abs(whole - without).mean()


def test_an_adapter_without_the_variance_changes_how_the_picture_is_sampled(stage1_alone, adapter_on, tiny_model):
    trained, fixed = (adapter_on(tiny_model, "deepfloyd-i", trains_variance=trains) for trains in (True, False))
    first, second = (pixels(stage1_alone(stage1_lora=output).files[0]) for output in (trained, fixed))
    assert (first != second).any()  # the same layers: only the scheduler differs


def test_an_adapter_of_another_stage_or_base_is_refused_before_weights_load(
    stage1_alone, adapter_on, tiny_model, tiny_stage2, smaller_model, monkeypatch
):
    monkeypatch.setattr(T5, "load", None)
    wrong_stage = stage1_alone(stage1_lora=adapter_on(tiny_stage2, "deepfloyd-ii"), prompt="never seen")
    assert wrong_stage.code == 2 and "--stage2_lora" in wrong_stage.said
    wrong_base = stage1_alone(stage1_lora=adapter_on(smaller_model, "deepfloyd-i"), prompt="never seen")
    assert wrong_base.code == 2 and "--stage1_lora" in wrong_base.said
    wrong_model = stage1_alone(stage1=tiny_stage2, prompt="never seen")
    assert wrong_model.code == 2 and "type it after --stage2" in wrong_model.said


def test_an_adapter_of_the_text_encoder_too_acts_on_the_text(draw, adapter_on, tiny_sd, tmp_path):
    output = adapter_on(tiny_sd, "sd", text_encoder_rank=4)
    flags = {"stage1": tiny_sd, "stage2": None, "upscaler": None, "size": "64x64"}
    whole, half = (draw(**flags, stage1_lora=lora) for lora in (output, f"{output}:0.5"))
    assert whole.code == half.code == 0, whole.said + half.said
    [unet_alone] = draw(**flags, stage1_lora=adapter_on(tiny_sd, "sd")).files
    assert (pixels(whole.files[0]) != pixels(half.files[0])).any()
    assert (pixels(whole.files[0]) != pixels(unet_alone)).any()


def test_all_three_stages(draw, tiny_stage3, tmp_path):
    drawn = draw(upscaler=tiny_stage3, size="256x256", save_stages="true")
    assert drawn.code == 0, drawn.said
    assert sorted(Image.open(path).size[0] for path in drawn.files) == [16, 64, 256]
    last = drawn.output / "a_photo_of_a_red_circle_42_256x256.png"
    again = draw(**PLAIN, replay=last, output=tmp_path / "again")
    assert again.files[0].read_bytes() == last.read_bytes()
    middle = drawn.output / "a_photo_of_a_red_circle_42_64x64.png"
    alone = draw(image=middle, stage1=None, stage2=None, upscaler=tiny_stage3, size=None, output=tmp_path / "alone")
    assert alone.code == 0 and (pixels(alone.files[0]) == pixels(last)).all(), alone.said


def test_a_disk_that_is_full_ends_with_its_own_code(stage1_alone, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("helpers.images.recipes.write_whole", full)
    ended = stage1_alone()
    assert ended.code == 4 and "Traceback" not in ended.said


def test_ctrl_c_ends_in_words(stage1_alone, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.inference.cascade.sample", interrupt)
    ended = stage1_alone()
    assert ended.code == 130 and "stay" in ended.said


def test_a_dry_run_of_published_models_downloads_nothing_and_tells_memory(draw):
    told = draw(stage1=None, stage2=None, size="3:2", steps=None, vram=6, dry_run="true")
    assert told.code == 0 and not told.files, told.said
    for size in ("96x64", "384x256"):
        assert size in told.said
    assert "DeepFloyd/IF-I-M-v1.0" in told.said and "smart50" in told.said and "GB" in told.said


@pytest.fixture
def checked_model(tmp_path, tiny_model):
    """The tiny stage I with a safety checker, which names all pictures or none, and a watermark."""

    def make(names_all: bool):
        folder = shutil.copytree(tiny_model, tmp_path / f"checked-{names_all}")
        tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**tower, "image_size": 16, "patch_size": 8, "projection_dim": 8}
        checker = IFSafetyChecker(CLIPConfig(vision_config=vision, text_config=tower, projection_dim=8))
        for head in (checker.p_head, checker.w_head):
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.constant_(head.bias, 1.0 if names_all else 0.0)
        checker.save_pretrained(folder / "safety_checker")
        crop = {"shortest_edge": 16}
        extractor = CLIPImageProcessor(size=crop, crop_size={"height": 16, "width": 16})
        extractor.save_pretrained(folder / "feature_extractor")
        marker = IFWatermarker()
        marker.watermark_image = torch.full((62, 62, 4), 255.0)
        marker.save_pretrained(folder / "watermarker")
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        index["safety_checker"] = ["deepfloyd_if", "IFSafetyChecker"]
        (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
        return folder

    return make


def test_the_safety_checker_and_the_watermark_act_where_they_are_switched_on(stage1_alone, checked_model):
    named, passed = checked_model(True), checked_model(False)
    [plain] = stage1_alone(stage1=named).files
    assert pixels(plain).any()
    black = stage1_alone(stage1=named, safety_checker="true")
    assert black.code == 0 and not pixels(black.files[0]).any() and "Safety checker: on" in black.said, black.said
    shown = stage1_alone(stage1=passed, safety_checker="true")
    assert (pixels(shown.files[0]) == pixels(plain)).all()
    marked = stage1_alone(stage1=passed, watermark="true", size="64x64")
    [unmarked] = stage1_alone(stage1=passed, size="64x64").files
    assert (pixels(marked.files[0]) != pixels(unmarked)).any()
    lacking = stage1_alone(safety_checker="true")
    assert lacking.code == 2 and "--safety_checker" in lacking.said


def test_what_comes_to_the_device_layer_by_layer_makes_the_same_picture(draw, monkeypatch, tiny_stage3, tmp_path):
    """Text encoder and UNets; the VAE decodes in tiles then, which are told apart from a whole picture in recipes."""
    flags = {"upscaler": tiny_stage3, "size": "256x256", "save_stages": "true"}
    grouped: list[str] = []
    in_groups = offloading.in_groups

    def counting(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        grouped.append(type(model).__name__)
        return in_groups(model, device)

    for module in ("helpers.inference.stages", "helpers.models.text"):
        monkeypatch.setattr(f"{module}.in_groups", counting)
    with monkeypatch.context() as patch:
        patch.setattr("helpers.inference.plan.budget_of", lambda *_: Budget(1, "next to nothing"))
        layered = draw(**flags, cache_dir=tmp_path / "new")
    assert layered.code == 0, layered.said
    assert grouped == ["T5EncoderModel", "CLIPTextModel"] + 3 * ["UNet2DConditionModel"]
    whole = draw(**flags, output=tmp_path / "whole")
    for size in ("16x16", "64x64"):
        name = f"a_photo_of_a_red_circle_42_{size}.png"
        assert (pixels(layered.output / name) == pixels(whole.output / name)).all()
    last = layered.output / "a_photo_of_a_red_circle_42_256x256.png"
    assert read_recipe(last)["stages"][-1]["tiled"]
    assert grouped == grouped[:5]


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_drawn(stage1_alone, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    refused = stage1_alone(output=tmp_path / "file" / "pictures")
    assert refused.code == 2 and "--output" in refused.said and "steps" not in refused.said


def test_too_little_memory_ends_in_words(stage1_alone, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("helpers.inference.cascade.sample", full)
    ended = stage1_alone()
    assert ended.code == 2 and "--vram" in ended.said
