"""Updates in the backward pass give what a plain step gives, in less memory."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import Parameter

from helpers.models.adapters import trainable_parameters
from helpers.training import released, rounding
from helpers.training.loop import NonFiniteLoss, Run, train
from helpers.training.released import Arrivals, Released, buckets_of
from helpers.training.rounding import chunks_of, slices, whole
from tests.test_trainer import assert_equal
from tests.training.test_loop import batches, differ, snapshot, spoilt, stop_at

FULL = {"model_type": "deepfloyd-full", "lora_rank": None, "max_grad_norm": 0, "learning_rate": 1e-2,
        "lr_scheduler": "constant"}  # fmt: skip
RELEASED = {**FULL, "optimizer_release_gradients": True}
PURE = {"mixed_precision": "bf16", "pure_bf16": True}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """As many buckets of the tiny model as a real one has, and parameters that are larger than a chunk."""
    monkeypatch.setattr(rounding, "CHUNK", 1 << 13)
    monkeypatch.setattr(released, "BUCKET", 1 << 15)


def weights_of(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable_parameters(run.denoiser)]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "adam_weight_decay": 0.5, "use_ema": True},
        {"optimizer": "adamw", "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"optimizer": "adamw_bf16", **PURE, "use_ema": True, "adam_weight_decay": 0.5, "gradient_checkpointing": True},
        {"optimizer": "adamw8bit", **PURE},
        {"optimizer": "lion"},
        {"optimizer": "adafactor", **PURE},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_weights_state_average_and_random_numbers_are_those_of_the_plain_step_to_the_bit(make_run, options):
    ended = []
    for kind in (FULL, RELEASED):
        run = make_run(3, **kind, **options)
        before = weights_of(run)
        train(run, batches())
        assert sum(map(differ, before, weights_of(run))) > 0.95 * len(before)
        ended.append(snapshot(run))
    assert run.released.updated == run.released.count == len(before)
    assert_equal(*ended)


@pytest.mark.parametrize("kinds", [(RELEASED, RELEASED), (FULL, RELEASED), (RELEASED, FULL)])
def test_a_run_goes_on_bit_for_bit_also_where_it_begins_or_ends_to_release_its_gradients(make_run, kinds):
    whole_run, first, second = (make_run(3, **kind, **PURE, use_ema=True) for kind in (RELEASED, *kinds))
    train(whole_run, batches())
    train(first, batches(), [stop_at(2)])
    saved = snapshot(first)
    for parameter, value in zip(trainable_parameters(second.denoiser), saved.pop("weights")):
        parameter.data.copy_(value)
    second.restore(copy.deepcopy(saved))
    train(second, itertools.islice(batches(), 2, None))
    assert_equal(snapshot(whole_run), snapshot(second))


def test_gradients_never_lie_in_memory_together(make_run):
    largest = {}
    for name, kind in (("plain", FULL), ("released", RELEASED)):
        run, seen = make_run(2, **kind), []
        parameters = trainable_parameters(run.denoiser)

        def look(_: Parameter) -> None:
            seen.append(sum(one.grad.nbytes for one in parameters if one.grad is not None))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(look)
        train(run, batches())
        largest[name] = max(seen)
    assert largest["plain"] == sum(parameter.nbytes for parameter in parameters)
    assert largest["released"] < 0.25 * largest["plain"]


def test_a_loss_that_is_not_finite_changes_nothing(make_run, capfd):
    run, seen = make_run(3, **RELEASED, use_ema=True), []
    train(run, spoilt({2}), [lambda run: seen.append(snapshot(run))])
    first, second, third = seen
    for kept in ("weights", "optimizer", "ema"):
        assert_equal(first[kept], second[kept])
        assert differ(second[kept], third[kept])
    assert [state["skipped_in_a_row"] for state in seen] == [0, 1, 0]
    assert "Step 2 is skipped, 1 in a row: the loss is nan" in capfd.readouterr().err


def test_a_loss_that_is_infinite_changes_nothing_though_its_gradients_may_be_finite(make_run, monkeypatch):
    run = make_run(1, **RELEASED)
    before, begin = weights_of(run), run.released.begin
    monkeypatch.setattr(run.released, "begin", lambda loss: begin(loss * torch.inf))
    train(run, spoilt(set()))
    assert_equal(before, weights_of(run))
    assert run.skipped_in_a_row == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, PURE], ids=["float32", "pure bf16"])
def test_a_gradient_that_is_not_finite_stops_the_updates_from_there_on_and_that_is_told(
    make_run, capfd, options, value
):
    run, seen = make_run(2, **RELEASED, use_ema=True, **options), []
    before, average = weights_of(run), copy.deepcopy(run.ema.state())
    names = [name for name, _ in run.denoiser.named_parameters()]
    last, first = names.index("unet.conv_out.weight"), names.index("unet.conv_in.weight")
    middle = names.index("unet.mid_block.resnets.0.conv1.weight")
    parameter = list(run.denoiser.parameters())[middle]
    spoil = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
    train(run, spoilt(set()), [lambda run: spoil.remove(), lambda run: seen.append(snapshot(run))])
    moved = [differ(*pair) for pair in zip(before, seen[0]["weights"])]
    assert moved[last] and not moved[first] and not moved[middle]
    assert 0.1 < sum(moved) / len(moved) < 0.9
    assert all(weight.isfinite().all() for weight in seen[0]["weights"])
    assert_equal(seen[0]["ema"], average)
    assert [state["skipped_in_a_row"] for state in seen] == [1, 0]
    said = capfd.readouterr().err
    assert f"Step 1 is skipped, 1 in a row, but for {sum(moved)} of {len(moved)} tensors that were updated" in said
    assert "but the gradient's norm is" in said and "/images/1a.png" in said
    assert all(differ(*pair) for pair in zip(before, weights_of(run))), "the next step is as any other"


def test_too_many_such_steps_in_a_row_end_the_run(make_run):
    run = make_run(9, **RELEASED, max_nonfinite_steps=1)
    with pytest.raises(NonFiniteLoss, match="MAX_NONFINITE_STEPS"):
        train(run, spoilt({2, 3, 4}))
    assert run.step == 2


def sizes_of_chunks(parameters: list[Parameter], pieces_of) -> list[list[int]]:
    pieces = [piece for parameter in parameters for piece in pieces_of(parameter)]
    return [[piece.numel() for piece in pieces[chunk]] for chunk in chunks_of(pieces)]


@pytest.mark.parametrize("pieces_of", [slices, whole])
@pytest.mark.parametrize("seed", range(5))
def test_buckets_are_all_parameters_in_order_cut_where_a_chunk_ends(monkeypatch, pieces_of, seed):
    monkeypatch.setattr(rounding, "CHUNK", 40)
    monkeypatch.setattr(released, "BUCKET", 100)
    counts = torch.randint(1, 150, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    parameters = [Parameter(torch.zeros(count)) for count in counts]
    buckets = buckets_of(parameters, pieces_of)
    assert list(map(id, itertools.chain(*buckets))) == list(map(id, parameters))
    of_each = [chunk for bucket in buckets for chunk in sizes_of_chunks(bucket, pieces_of)]
    assert of_each == sizes_of_chunks(parameters, pieces_of)
    sizes = [sum(parameter.numel() for parameter in bucket) for bucket in buckets]
    assert min(sizes[:-1]) >= 100 and max(sizes) < 100 + 150 + 40


def test_a_parameter_without_a_gradient_holds_its_bucket_back_until_the_step(monkeypatch):
    monkeypatch.setattr(released, "BUCKET", 1)
    monkeypatch.setattr(rounding, "CHUNK", 8)
    ended = []
    for releases in (False, True):
        weights = [Parameter(torch.ones(4)) for _ in range(4)]  # two buckets
        optimizer = torch.optim.AdamW(weights, 0.1)
        updates = Released(optimizer) if releases else None
        for passed in range(3):
            used = weights if passed == 1 else weights[1:]
            loss = sum((number + 1) * (one**2).sum() for number, one in enumerate(used))
            if releases:
                updates.begin(loss)
            loss.backward()
            if releases:
                assert updates.updated == (4 if passed == 1 else 2)
                assert [one.grad is None for one in weights] == [True, passed == 1, True, True]
            optimizer.step()
            optimizer.zero_grad()
        ended.append(weights)
    assert_equal(*([one.detach() for one in weights] for weights in ended))


def test_a_bucket_is_complete_once_in_each_pass_whatever_came_in_the_one_before():
    weights, complete = [Parameter(torch.ones(2)) for _ in range(2)], []
    arrivals = Arrivals([weights], complete.append)
    weights[0].sum().backward()
    assert complete == []
    arrivals.restart()
    (weights[0].sum() + weights[1].sum()).backward()
    assert len(complete) == 1
