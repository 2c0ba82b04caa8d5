"""What a recipe must be before anything is done by it: anyone may have written it."""

from __future__ import annotations

import pytest

from helpers.validation.recipe import NotReplayable, read

SHOWN = {"name": "a_cat", "prompt": "a cat"}
FILE = {"dataset": "photos", "path": "a/b.png", "content": "00"}
GOOD = {
    "version": 1, "kind": "validation", "model_type": "deepfloyd-lora", "base_model": "a/b", "base_fingerprint": "00",
    "pipeline": "IFPipeline", "output_dir": "output/x", "step": 2, "picture": "a_cat_96x64", "prompt": "a cat",
    "negative_prompt": "", "width": 96, "height": 64, "seed": 1, "inference_steps": 2, "guidance": 7.5,
    "guidance_rescale": 0, "scheduler": "ddpm", "scheduler_changes": {"variance_type": "fixed_small"},
    "precision": "no", "averaged": False, "device": "cpu", "together": [SHOWN], "versions": {"torch": "2.11"},
}  # fmt: skip


def test_a_good_one_is_read_and_gives_the_options_that_draw_it():
    recipe = read(GOOD)
    assert recipe.options["validation_resolution"] == "96x64" and recipe.options["use_ema"] is False
    assert "validation_noise_level" not in recipe.options and recipe.size == (96, 64)
    assert read({**GOOD, "noise_level": 100}).options["validation_noise_level"] == 100
    assert read({**GOOD, "output_dir": "~/a b"}).output_dir == "~/a b"


@pytest.mark.parametrize("change", [
    {"version": 2}, {"kind": "inference"}, {"step": -1}, {"step": "2"}, {"step": True}, {"width": 0}, {"seed": 1.5},
    {"picture": "../a_cat_96x64"}, {"picture": "other"}, {"picture": ""}, {"together": []}, {"together": [{}]},
    {"together": [{**SHOWN, "name": "../x"}]}, {"together": [{**SHOWN, "name": "a\0"}]}, {"together": "a_cat"},
    {"together": [{**SHOWN, "prompt": "\ud800"}]}, {"negative_prompt": "\ud800"},
    {"output_dir": "/etc"}, {"output_dir": "../x"}, {"output_dir": "a/../../x"}, {"output_dir": ""},
    {"together": [{**SHOWN, "image": {**FILE, "path": "../../secret"}}]},
    {"together": [{**SHOWN, "image": {**FILE, "path": "/etc/passwd"}}]},
    {"together": [{**SHOWN, "control": {**FILE, "path": "a\0"}}]},
    {"together": [SHOWN] * 2000}, {"output_dir": "x" * 300}, {"output_dir": "x/" * 3000},
    {"unknown": 1}, {"guidance": "7"}, {"averaged": 1}, {"prompt": None}, {"versions": []}, {"scheduler_changes": 1},
], ids=repr)  # fmt: skip
def test_any_other_is_refused_in_words(change):
    with pytest.raises(NotReplayable, match="recipe cannot be used"):
        read({**GOOD, **change})


@pytest.mark.parametrize("name", sorted(GOOD.keys() - {"version", "kind"}))
def test_one_that_lacks_something_is_refused_by_its_name(name):
    with pytest.raises(NotReplayable, match=name):
        read({key: value for key, value in GOOD.items() if key != name})
