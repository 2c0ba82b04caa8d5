import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.data.collate import Batch
from helpers.data.sampler import Position, Use
from helpers.data.scan import Record
from helpers.diffusion.draws import Draws
from helpers.models.adapters import trainable_parameters
from helpers.processes import Processes
from helpers.sizes import Size
from helpers.training import adamw_bf16, rounding
from helpers.training.loop import Every, NonFiniteLoss, Run, require_finite, train
from helpers.training.step import StepLoss, training_loss
from tests.test_trainer import assert_equal


def batches(count: int | None = None):
    """Different random batches, each with the position after it."""
    generator = torch.Generator().manual_seed(5)
    for number in itertools.count(1) if count is None else range(1, count + 1):
        images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)
        text = torch.randn(2, 77, 64, generator=generator).bfloat16()
        yield Position(0, number), Batch(images, text, (None, None))


def stop_at(step: int) -> Callable[[Run], None]:
    def stop(run: Run) -> None:
        run.requests.stop = 2 if run.step == step else None

    return stop


def differ(left: object, right: object) -> bool:
    try:
        assert_equal(left, right)
    except AssertionError:
        return True
    return False


def gradient_norms(run: Run) -> list[float]:
    """The norm of all gradients at each optimizer step, collected while the run trains."""
    norms: list[float] = []

    def collect(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    run.optimizer.optimizer.register_step_pre_hook(collect)
    return norms


def test_gradients_are_clipped_to_the_norm_and_only_those_above_it(make_run):
    norms = {}
    for limit in (0, 1e-3, 1e6):
        run = make_run(max_grad_norm=limit)
        norms[limit] = gradient_norms(run)
        train(run, batches())
    assert min(norms[0]) > 2e-3
    assert norms[1e-3] == pytest.approx([1e-3] * 3, rel=1e-3)
    assert norms[1e6] == pytest.approx(norms[0])


def test_accumulated_gradients_are_the_mean_over_the_batches(make_run):
    run = make_run(1, gradient_accumulation_steps=3, max_grad_norm=0)
    norms = gradient_norms(run)
    train(run, batches())
    reference = make_run(1)
    losses = (training_loss(reference.parts, reference.denoiser, batch, reference.generator) for _, batch in batches(3))
    torch.stack([made.loss for made in losses]).mean().backward()
    gradients = [p.grad.flatten() for p in reference.denoiser.parameters() if p.grad is not None]
    assert norms == pytest.approx([torch.cat(gradients).norm().item()], rel=1e-4)
    assert (run.step, run.position) == (1, Position(0, 3))


def test_each_step_uses_the_schedules_rate(make_run):
    run = make_run(4, learning_rate=1e-3, lr_end=1e-4, lr_scheduler="linear")
    rates = []
    train(run, batches(), [lambda run: rates.append(run.optimizer.param_groups[0]["lr"])])
    assert rates == pytest.approx([1e-3, 7e-4, 4e-4, 1e-4])


def test_weights_are_averaged_once_an_optimizer_step(make_run):
    run = make_run(4, use_ema=True, gradient_accumulation_steps=3, learning_rate=1e-2)
    seen = []
    train(run, batches(), [lambda run: seen.append([p.detach().clone() for p in trainable_parameters(run.denoiser)])])
    assert run.ema.state()["updates"] == 4
    expected = seen[0]
    for update, weights in enumerate(seen[1:], 2):
        expected = [(update * old + 9 * new) / (9 + update) for old, new in zip(expected, weights)]
    with run.averaged_weights():
        for parameter, average in zip(trainable_parameters(run.denoiser), expected):
            torch.testing.assert_close(parameter.detach(), average, rtol=1e-4, atol=1e-7)


def test_without_averaging_the_weights_stay_in_place(make_run):
    run = make_run(1)
    before = [p.detach().clone() for p in trainable_parameters(run.denoiser)]
    with run.averaged_weights():
        assert all(torch.equal(old, new) for old, new in zip(before, trainable_parameters(run.denoiser)))
    assert run.state()["ema"] is None


def test_averaging_that_is_switched_on_later_begins_there_and_switched_off_is_dropped_and_both_are_said(
    make_run, capsys
):
    plain, averaging = make_run(4), make_run(4, use_ema=True)
    for run in (plain, averaging):
        train(run, itertools.islice(batches(), 2), [stop_at(2)])
    started = make_run(4, use_ema=True)
    for parameter in trainable_parameters(started.denoiser):
        parameter.data.add_(1.0)  # as the weights of the checkpoint, which are loaded before
    started.restore(plain.state())
    assert "USE_EMA" in capsys.readouterr().out
    assert started.ema.state()["updates"] == 0
    pairs = zip(started.ema.state()["weights"], trainable_parameters(started.denoiser))
    assert all(torch.equal(average, parameter) for average, parameter in pairs)
    stopped = make_run(4)
    stopped.restore(averaging.state())
    assert "dropped" in capsys.readouterr().out and stopped.state()["ema"] is None


def test_dropout_and_gradient_checkpointing_are_at_work_while_training(make_run):
    run = make_run(1, lora_dropout=0.5, gradient_checkpointing=True)
    calls = []
    run.parts.unet.up_blocks[-1].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    modes = []
    train(run, batches(), [lambda run: modes.extend(m.training for m in run.denoiser.modules() if hasattr(m, "p"))])
    assert modes and all(modes)
    assert len(calls) == 2, "checkpointing computes a block's forward pass once more on the way back"


def test_a_signal_ends_the_run_after_the_step_in_progress(make_run):
    run = make_run(100)
    train(run, batches(), [stop_at(2)])
    assert run.step == 2 and not run.finished


def test_a_signal_that_comes_while_the_processes_agree_on_none_is_not_lost(make_run):
    class Interrupted(Processes):
        def highest(self, number: int) -> int:
            if run.step == 1:
                run.requests.stop = 15
            return number

    run = make_run(steps=6)
    run.processes = Interrupted()
    train(run, batches())
    assert (run.step, run.requests.stop) == (2, 15)


def test_periodic_work_comes_every_so_many_steps_and_after_the_last(make_run):
    run, done = make_run(5), {2: [], 0: [], 5: []}
    train(run, batches(), [Every(steps, lambda run, steps=steps: done[steps].append(run.step)) for steps in done])
    assert done == {2: [2, 4, 5], 0: [5], 5: [5]}


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16", "pure_bf16": True}], ids=["float32", "pure bf16"])
def test_gradients_that_are_nan_end_a_run(make_run, monkeypatch, options):
    """With CUDA's NaN, 0x7FFFFFFF: rounded stochastically it must not become a weight of 0, which looks sound."""

    def as_on_cuda(tensors: list[torch.Tensor]) -> torch.Tensor:
        values = rounding.flat(tensors)
        values.view(torch.int32)[values.isnan()] = 0x7FFFFFFF
        return values

    def spoil(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad.fill_(torch.nan)

    monkeypatch.setattr(adamw_bf16, "flat", as_on_cuda)
    run = make_run(1, **options)
    run.optimizer.optimizer.register_step_pre_hook(spoil)
    train(run, batches())
    assert all(parameter.isnan().all() for parameter in trainable_parameters(run.denoiser))
    with pytest.raises(NonFiniteLoss):
        require_finite(run)


def spoilt(numbers: set[int]):
    """The same batches, of images that have names; in those of these numbers the second caption's embedding is NaN."""
    size = Size(64, 64)
    for position, batch in batches():
        if position.batch in numbers:
            batch.prompt_embeds[1, 3, 5] = torch.nan
        records = [Record("set", Path(f"/images/{position.batch}{letter}.png"), letter, size, ()) for letter in "ab"]
        uses = [Use(record, None, (0, 0, 64, 64), f"caption of {record.path.name}", False) for record in records]
        yield position, Batch(batch.images, batch.prompt_embeds, tuple(uses))


def snapshot(run: Run) -> dict[str, object]:
    return {"weights": [p.detach().clone() for p in trainable_parameters(run.denoiser)], **copy.deepcopy(run.state())}


@pytest.mark.parametrize(
    "options",
    [{"use_ema": True}, {"mixed_precision": "bf16", "pure_bf16": True}, {"max_grad_norm": 0},
     {"gradient_accumulation_steps": 2}],
    ids=["average", "pure bf16", "not clipped", "accumulation"],
)
def test_a_step_that_is_not_finite_changes_nothing_and_names_what_it_came_from(make_run, capfd, options):
    run, seen = make_run(3, learning_rate=1e-2, lr_scheduler="constant", **options), []
    bad = 2 * run.accelerator.gradient_accumulation_steps  # the last batch of the second step
    train(run, spoilt({bad}), [lambda run: seen.append(snapshot(run))])
    first, second, third = seen
    for kept in ("weights", "optimizer", "ema", "rng"):
        assert_equal(first[kept], second[kept])
        assert kept == "rng" or first[kept] is None or differ(second[kept], third[kept])
    assert [state["skipped_in_a_row"] for state in seen] == [0, 1, 0]
    assert (second["step"], third["position"]) == (2, (0, bad // 2 * 3))
    said = capfd.readouterr().err
    assert "Step 2 is skipped, 1 in a row: the loss is nan (computed in torch." in said
    assert f"/images/{bad}b.png, timestep " in said
    assert f"'caption of {bad}b.png', whose embedding is not finite" in said
    assert f"'caption of {bad}a.png'\n" in said and f"/images/{bad - 1}" not in said


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_skipped_too(make_run, capfd, value):
    run, seen = make_run(2, lr_scheduler="constant"), []
    [parameter, *_] = trainable_parameters(run.denoiser)
    spoil = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
    train(run, spoilt(set()), [lambda run: spoil.remove(), lambda run: seen.append(snapshot(run))])
    fresh = snapshot(make_run(2))
    assert_equal(seen[0]["weights"], fresh["weights"])
    assert differ(seen[1]["weights"], fresh["weights"])
    said = capfd.readouterr().err
    assert "but the gradient's norm is" in said and "/images/1a.png" in said


@pytest.mark.parametrize("limit", [0, 2])
def test_more_skipped_steps_in_a_row_than_allowed_end_the_run_also_where_it_was_resumed_between(make_run, limit):
    bad = {2, 4, 5, 6, 7}
    run, steps = make_run(20, max_nonfinite_steps=limit), []
    with pytest.raises(NonFiniteLoss, match=r"(?s)Step \d: the loss is nan.*MAX_NONFINITE_STEPS.*intact"):
        train(run, spoilt(bad), [lambda run: steps.append(run.step)])
    last = {0: 1, 2: 5}[limit]
    assert steps[-1] == last
    if limit:
        stopped, resumed = make_run(20, max_nonfinite_steps=limit), make_run(20, max_nonfinite_steps=limit)
        train(stopped, spoilt(bad), [stop_at(4)])
        resumed.restore(stopped.state())
        with pytest.raises(NonFiniteLoss):
            train(resumed, itertools.islice(spoilt(bad), 4, None), [lambda run: steps.append(run.step)])
        assert steps[-1] == last


@pytest.mark.parametrize("mixed, pure", [("bf16", False), ("bf16", True)])
def test_noise_of_low_timesteps_survives_bf16_training(make_run, mixed, pure):
    """What the UNet is fed at t = 0 differs from the image by more than its rounding."""
    run = make_run(1, mixed_precision=mixed, pure_bf16=pure)
    fed = []
    run.parts.unet.register_forward_pre_hook(lambda module, args: fed.append((args[0].float(), args[1])))
    _, batch = next(batches())
    x = run.parts.spec.space.encode(batch.images, Draws(run.generator))
    found = False
    for _ in range(60):
        training_loss(run.parts, run.denoiser, batch, run.generator) if pure else _autocast_loss(run, batch)
        x_t, t = fed.pop()
        for sample, image, step in zip(x_t, x, t.tolist()):
            if step <= 20:
                found = True
                assert (sample - image).std() > 0.5 * run.parts.schedule.sqrt_one_minus_alphas_cumprod[step]
    assert found


def _autocast_loss(run: Run, batch: Batch) -> StepLoss:
    with run.accelerator.autocast():
        return training_loss(run.parts, run.denoiser, batch, run.generator)


def test_loss_options_reach_the_step(make_run):
    """Each changes the loss of the same batch from the same generator, and none does where it is off."""
    [(_, batch)] = batches(1)

    def loss(**options: object) -> float:
        run = make_run(1, **options)
        return training_loss(run.parts, run.denoiser, batch, run.generator).loss.item()

    plain = loss()
    assert loss() == plain
    later = {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 1000, "timestep_bias_begin": 990}
    changed = [loss(snr_gamma=0.1), loss(snr_gamma=0.1, soft_min_snr=True), loss(noise_offset=0.5), loss(**later)]
    assert len({plain, *changed}) == 5
