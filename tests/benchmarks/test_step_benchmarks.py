"""The benchmarks run, on a CPU and at tiny sizes, and say what they measured on."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import gpu_train, released_gradients, step_overhead
from benchmarks.step_overhead import DEMO
from benchmarks.synthetic import random_batch, random_parts
from helpers.diffusion.draws import Draws
from helpers.diffusion.objective import EpsilonObjective, VelocityObjective
from helpers.models.published import architecture


def test_step_overhead_compares_both_loops(tmp_path):
    output = tmp_path / "result.json"
    result = step_overhead.main(["--batch=2", "--steps=2", "--rounds=2", f"--output={output}"])
    assert json.loads(output.read_text()) == result
    assert result["bare_seconds_a_step"] > 0 and result["our_seconds_a_step"] > 0
    assert -0.9 < result["overhead"] < 2
    assert result["machine"].keys() >= {"device", "torch", "commit"}


def test_released_gradients_compares_memory_and_time(tmp_path):
    output = tmp_path / "result.json"
    options = ["--batch=2", "--steps=1", "--rounds=1", f"--architecture={DEMO / 'unet' / 'config.json'}"]
    with released_gradients.cut_finely():
        result = released_gradients.main([*options, f"--output={output}"])
    assert json.loads(output.read_text()) == result
    plain, released = result["memory"].values()
    assert released["gradients_gb"] < 0.3 * plain["gradients_gb"] and released["peak_gb"] < 1.01 * plain["peak_gb"]
    for case in (plain, released):
        assert case["peak_gb"] == pytest.approx(case["estimated_gb"], rel=0.03)
    assert 0.2 < result["time"]["ratio"] < 5


def test_gpu_train_reports_memory_and_speed_of_each_case(tmp_path):
    output = tmp_path / "result.json"
    options = ["--no-full_size", "--steps=1", f"--output={output}"]
    gpu_train.main([*options, "--only", "I-M lora b4"])
    result = gpu_train.main([*options, "--only", "II-M full b4 checkpointed"])
    assert json.loads(output.read_text()) == result
    assert result["cases"].keys() == {"I-M lora b4", "II-M full b4 checkpointed"}, "what was measured before is kept"
    for row in result["cases"].values():
        assert 0 < row["estimated_gb"] < 1 and row["samples_a_second"] > 0
        told = torch.cuda.is_available()
        assert ("peak_gb" in row) == told, "of a CPU it would be the most that any case before took"
        assert row["batch"] == 4 and row["shrunk"]
    lora, full = result["cases"].values()
    assert lora["trained_parameters"] < lora["parameters"] and full["trained_parameters"] == full["parameters"]


def test_gpu_train_measures_a_base_of_few_bits(tmp_path):
    options = ["--no-full_size", "--steps=1", "--batch=1", f"--output={tmp_path / 'result.json'}"]
    names = ["I-XL lora b4", "I-XL lora b4 int8", "I-XL lora b4 nf4 checkpointed"]
    cases = gpu_train.main([*options, "--only", *names])["cases"]
    assert set(cases) == set(names) and all(row["samples_a_second"] > 0 for row in cases.values())
    full, int8, nf4 = (cases[name] for name in names)
    assert full["parameters"] == int8["parameters"] == nf4["parameters"]
    assert full["trained_parameters"] == int8["trained_parameters"]
    assert full["estimated_gb"] > int8["estimated_gb"] > nf4["estimated_gb"]


def test_gpu_train_measures_models_of_latents(tmp_path):
    """In both precisions one after the other, and predicting v."""
    options = ["--no-full_size", "--steps=1", "--batch=1", f"--output={tmp_path / 'result.json'}"]
    names = ["SD-1.5 lora b4", "SD-1.5 lora b4 mixed", "SD-2.1 full b4 checkpointed", "III-x4 lora b4"]
    cases = gpu_train.main([*options, "--only", *names])["cases"]
    assert set(cases) == set(names)
    assert all(row["samples_a_second"] > 0 and row["estimated_gb"] > 0 for row in cases.values())
    pure, mixed, full, _ = (cases[name] for name in names)
    assert mixed["estimated_gb"] > pure["estimated_gb"] and mixed["trained_parameters"] == pure["trained_parameters"]
    assert full["trained_parameters"] == full["parameters"]


@pytest.mark.parametrize(
    ("model", "channels", "edge", "width", "objective"),
    [
        ("SD-1.5", 8, 64, 768, EpsilonObjective),
        ("SD-2.1", 8, 96, 1024, VelocityObjective),
        ("III-x4", 11, 128, 1024, VelocityObjective),
    ],
)
def test_batches_of_latents_are_what_their_cache_would_hold(model, channels, edge, width, objective):
    """Of 512 and 768 px, for the published architecture at narrow widths; stage III's with their images."""
    [case] = [case for case in gpu_train.CASES if case.name == f"{model} lora b4"]
    config = UNet2DConditionModel.load_config(architecture(case.hub_id))
    small = gpu_train.shrunk(config) | {key: config[key] for key in ("sample_size", "cross_attention_dim")}
    prediction = gpu_train.PREDICTIONS.get(model, "epsilon")
    parts = random_parts(case.family, small, torch.bfloat16, torch.device("cpu"), prediction)
    batch = random_batch(parts, 2, torch.device("cpu"))
    assert batch.images.dtype == torch.float16 and batch.images.shape == (2, channels, edge, edge)
    assert batch.prompt_embeds.dtype == torch.bfloat16 and batch.prompt_embeds.shape == (2, 77, width)
    x = parts.spec.space.encode(batch.images, Draws(torch.Generator().manual_seed(0)))
    assert x.shape == (2, 4, edge, edge) and 0.9 < x.std() < 1.1
    assert isinstance(parts.objective, objective)


def test_gpu_train_measures_compiled_cases(tmp_path):
    """With the whole UNet as one graph, which torch.compile refuses where it cannot follow; the graph as it is."""
    options = ["--no-full_size", "--steps=1", "--batch=1", "--backend=eager", f"--output={tmp_path / 'result.json'}"]
    result = gpu_train.main([*options, "--only", "I-M lora b4 compiled"])
    assert result["cases"]["I-M lora b4 compiled"]["seconds_a_step"] > 0


def test_gpu_train_goes_on_after_a_case_that_does_not_fit(tmp_path, monkeypatch):
    def does_not_fit(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_train, "random_parts", does_not_fit)
    result = gpu_train.main(["--no-full_size", f"--output={tmp_path / 'result.json'}", "--only", "I-M lora b4"])
    row = result["cases"]["I-M lora b4"]
    assert row["out_of_memory"] and row["estimated_gb"] > 0


def test_gpu_train_has_the_cases_that_users_ask_about():
    names = [case.name for case in gpu_train.CASES]
    assert len(names) == len(set(names))
    for name in ("I-M lora b4", "I-M full b4", "I-XL lora b4", "II-M lora b4 checkpointed", "I-M lora b64 compiled",
                 "I-XL lora b4 int8", "I-XL lora b4 nf4 checkpointed"):  # fmt: skip
        assert name in names
    for model in ("SD-1.5", "SD-2.1", "III-x4"):
        for case in ("lora b4", "lora b4 mixed", "lora b4 checkpointed", "lora b4 compiled", "full b4 checkpointed"):
            assert f"{model} {case}" in names
    for name in ("I-M full b4 released", "I-XL full b4 checkpointed released adafactor"):
        assert name in names
    with pytest.raises(SystemExit):
        gpu_train.main(["--only", "I-S*"])
