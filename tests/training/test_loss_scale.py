import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss

from helpers.config.load import load
from helpers.data.collate import Batch
from helpers.data.sampler import Position, Use
from helpers.data.scan import Record
from helpers.models.adapters import trainable_parameters
from helpers.models.families import SPECS
from helpers.sizes import Size
from helpers.training import assembly
from helpers.training.loop import LEAST_SCALE, NonFiniteLoss, Run, train
from helpers.training.step import training_loss
from helpers.validation.render import Rendered, Sampling, Validation
from helpers.validation.sheet import Cell
from tests.test_trainer import assert_equal
from tests.training.test_loop import gradient_norms, snapshot, stop_at

FULL = {"model_type": "full", "lora_rank": None}


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory) -> Path:
    """What training and sampling read of a Stable Diffusion, with random weights."""
    torch.manual_seed(0)
    folder, widths = tmp_path_factory.mktemp("sd"), (16, 32)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def make_run(small_sd):
    """A run in float16 over the small model, beginning at a loss scale; keyword arguments are options."""

    def make(steps: int = 4, scale: float = 2.0**10, **options: object) -> Run:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        values = {
            "model_type": "lora", "mixed_precision": "fp16", "report_to": "none", "lora_rank": 2, "learning_rate": 1e-2,
            "lr_scheduler": "constant", **options,
        }  # fmt: skip
        config = load([f"--{name}={value}" for name, value in values.items() if value is not None]).config
        spec, accelerator = SPECS[config.family.key], assembly.create_accelerator(config)
        run = assembly.create_run(config, spec, small_sd, assembly.adapter_of(config), accelerator, steps)
        if run.scaler.is_enabled():
            run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": scale, "growth_interval": 3})
        return run

    return make


def batches(spoilt: set[int] = frozenset()):
    """Different random batches, each with the position after it; in those of the numbers `spoilt` a caption is NaN."""
    generator = torch.Generator().manual_seed(5)
    for number in itertools.count(1):
        mean, std = torch.randn(2, 2, 4, 8, 8, generator=generator)
        text = torch.randn(2, 77, 16, generator=generator).bfloat16()
        if number in spoilt:
            text[1, 3, 5] = torch.nan
        records = [Record("set", Path(f"/images/{number}{letter}.png"), letter, Size(64, 64), ()) for letter in "ab"]
        uses = tuple(Use(record, None, (0, 0, 64, 64), "a caption", False) for record in records)
        yield Position(0, number), Batch(torch.cat([mean, 0.1 * std.abs()], 1).half(), text, uses)


def weights(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable_parameters(run.denoiser)]


@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
def test_it_computes_in_float16_and_trains_float32_weights_as_float32_does(make_run, options):
    outputs, trained, norms = [], {}, {}
    for precision in ("fp16", "no"):
        run = make_run(2, mixed_precision=precision, max_grad_norm=0, **options)
        frozen = {parameter.dtype for parameter in run.denoiser.parameters() if not parameter.requires_grad}
        assert {parameter.dtype for parameter in trainable_parameters(run.denoiser)} == {torch.float32}
        assert frozen == (set() if options else {torch.float16 if precision == "fp16" else torch.float32})
        run.parts.unet.register_forward_hook(lambda unet, args, output: outputs.append(output.sample.dtype))
        norms[precision] = gradient_norms(run)
        train(run, batches())
        trained[precision] = torch.cat([one.flatten() for one in weights(run)])
    assert outputs == [torch.float16] * 2 + [torch.float32] * 2
    assert norms["fp16"] == pytest.approx(norms["no"], rel=0.02)
    start = torch.cat([one.flatten() for one in weights(make_run(2, **options))])
    assert mse_loss(trained["fp16"], trained["no"]) < 0.05 * mse_loss(trained["no"], start)


def test_it_is_the_gradient_without_the_scale_that_is_clipped(make_run):
    norms = {}
    for limit in (0, 1e-3, 1e3):
        run = make_run(2, max_grad_norm=limit)
        norms[limit] = gradient_norms(run)
        train(run, batches())
    assert min(norms[0]) > 2e-3
    assert norms[1e-3] == pytest.approx([1e-3] * 2, rel=1e-3)
    assert norms[1e3] == pytest.approx(norms[0])


@pytest.mark.parametrize("options", [
    {"use_ema": True}, {"max_grad_norm": 0}, {"gradient_accumulation_steps": 2}, FULL, {"optimizer": "adamw8bit"},
], ids=["average", "not clipped", "accumulation", "full", "8 bits"])  # fmt: skip
def test_a_scale_that_is_too_high_falls_and_then_it_trains_as_if_it_had_begun_there(make_run, capfd, options):
    run, seen, scales = make_run(100, 2.0**30, **options), [], []
    train(run, batches(), [
        lambda run: scales.append(run.scaler.get_scale()),
        lambda run: seen.append(snapshot(run)),
        lambda run: stop_at(run.step if len(scales) > 2 and scales[-1] == scales[-3] else 0)(run),
    ])  # fmt: skip
    falls = run.step - 2
    assert falls >= 3 and scales == [2.0 ** (29 - i) for i in range(falls)] + [scales[-1]] * 2
    assert_equal(seen[falls - 1]["weights"], weights(make_run(**options)))
    assert not any(state["skipped_in_a_row"] for state in seen)
    said = capfd.readouterr().err
    assert said.count("finds the loss scale and trains nothing") == falls and "skipped" not in said
    assert "Step 1 finds" in said and "1,073,741,824, which becomes 536,870,912." in said

    right, passes = make_run(100, scales[-1], **options), run.accelerator.gradient_accumulation_steps
    given = batches()
    with torch.no_grad():
        for _, batch in itertools.islice(given, falls * passes):  # draws the same random numbers
            training_loss(right.parts, right.denoiser, batch, right.generator)
    right.step = falls
    train(right, given, [stop_at(falls + 2)])
    assert_equal(weights(right), seen[-1]["weights"])
    if right.ema:
        assert_equal(right.ema.state(), seen[-1]["ema"])
        assert right.ema.state()["updates"] == 2


@pytest.mark.parametrize("stopped_at", [1, 3])
def test_a_run_that_goes_on_has_the_scale_of_before_and_rises_at_the_same_step(make_run, stopped_at):
    """It rises after three good steps: the fourth, or the fifth where the first overflows."""
    whole = make_run(6, 2.0**10, lora_dropout=0.5)
    scales = []
    train(whole, batches(), [lambda run: scales.append(run.scaler.get_scale())])
    assert scales == [2.0**10] * 2 + [2.0**11] * 3 + [2.0**12]
    parts, resumed = make_run(6, 2.0**10, lora_dropout=0.5), make_run(6, 2.0**4, lora_dropout=0.5)
    train(parts, batches(), [stop_at(stopped_at)])
    saved = snapshot(parts)
    for parameter, value in zip(trainable_parameters(resumed.denoiser), saved.pop("weights")):
        parameter.data.copy_(value)
    resumed.restore(saved)
    train(resumed, itertools.islice(batches(), stopped_at, None))
    assert_equal(snapshot(whole), snapshot(resumed))


def test_a_loss_that_is_nan_is_told_leaves_the_scale_alone_and_ends_the_run(make_run, capfd):
    run, seen = make_run(20, max_nonfinite_steps=2), []
    with pytest.raises(NonFiniteLoss, match=r"(?s)Step 4: the loss is nan \(computed in torch.float16.*PRECISION=bf16"):
        train(run, batches({2, 3, 4}), [lambda run: seen.append(snapshot(run))])
    assert run.scaler.get_scale() == 2.0**10
    for kept in ("weights", "optimizer", "loss_scale"):
        assert_equal(seen[0][kept], seen[2][kept])
    said = capfd.readouterr().err
    assert "Step 2 is skipped, 1 in a row: the loss is nan" in said and "/images/2b.png" in said
    assert "loss scale" not in said


def test_a_gradient_that_no_scale_makes_finite_ends_the_run_once_the_scale_is_at_its_least(make_run, capfd):
    run, steps = make_run(50, 2.0**3, max_nonfinite_steps=1), []
    before = weights(run)
    [parameter, *_] = trainable_parameters(run.denoiser)
    parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), torch.inf))
    with pytest.raises(NonFiniteLoss, match=r"(?s)Step 5: the loss is .* but the gradient's norm is .*PRECISION=bf16"):
        train(run, batches(), [lambda run: steps.append((run.scaler.get_scale(), run.skipped_in_a_row))])
    assert steps == [(4, 0), (2, 0), (LEAST_SCALE, 0), (LEAST_SCALE, 1)]
    assert_equal(before, weights(run))
    said = capfd.readouterr().err
    assert re.findall(r"Step (\d) (?:finds|is skipped)", said) == ["1", "2", "3", "4"] and "/images/4a.png" in said


@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
def test_pictures_are_made_in_float16_by_the_unet_and_in_float32_by_the_vae(make_run, small_sd, tmp_path, options):
    run, dtypes = make_run(**options), {"unet": set(), "vae": set()}
    size = Size(64, 64)
    sampling = Sampling(small_sd, (size,), lambda text: torch.zeros(77, 16), "", 2, 5.0, 1, noise_scheduler="ddim")

    def render(run: Run, folder: Path) -> Rendered:
        pipeline = sampling.pipeline(run)
        pipeline.unet.unet.conv_out.register_forward_hook(lambda layer, args, output: dtypes["unet"].add(output.dtype))
        pipeline.vae.decoder.register_forward_hook(lambda decoder, args, output: dtypes["vae"].add(output.dtype))
        [picture] = sampling.images(pipeline, size, [torch.ones(77, 16)])
        return Rendered([[Cell(picture, "made")]])

    validation = Validation(tmp_path, SimpleNamespace(titles={}, render=render))
    validation(run)
    assert validation.is_done(0)
    assert dtypes == {"unet": {torch.float16}, "vae": {torch.float32}}
