"""A text encoder in training: its gradients, its learning rate, its state, its memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.nn import Parameter

from helpers.config.load import load
from helpers.config.optimizers import OPTIMIZERS as FACTS
from helpers.data.collate import Batch
from helpers.data.sampler import Position, Use
from helpers.data.scan import Record
from helpers.libraries import is_installed
from helpers.models import loading
from helpers.models.adapters import parameter_groups, trainable_parameters
from helpers.models.facts import origin_of
from helpers.models.families import SPECS
from helpers.models.gradient_checkpointing import checkpoint_everything, checkpoint_text_encoder
from helpers.models.parts import LossSettings
from helpers.models.published import ARCHITECTURES, LIKE, architecture, text_encoder_of
from helpers.sizes import Size
from helpers.training import assembly, memory, memory_report
from helpers.training.loop import NonFiniteLoss, Run, train
from helpers.training.memory import Ledger, estimate
from helpers.training.optimizers import OPTIMIZERS, RATE_FACTOR, AdamSettings, restore_state, set_rate
from helpers.training.step import training_loss
from tests.test_trainer import assert_equal

SPEC = SPECS["sd"]
ADAM = AdamSettings(0.9, 0.99, 1e-8, 0.01)


def config_of(**options: object):
    values = {"model_type": "lora", "train_text_encoder": True, "mixed_precision": "no", "report_to": "none",
              "lora_rank": 2, "text_encoder_lora_rank": 4, **options}
    return load([f"--{name}={value}" for name, value in values.items()]).config


@pytest.fixture
def make_run(tiny_sd) -> Callable[..., Run]:
    """A run over the tiny Stable Diffusion; keyword arguments are options."""

    def make(steps: int = 3, **options: object) -> Run:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        config = config_of(**options)
        accelerator = assembly.create_accelerator(config)
        return assembly.create_run(config, SPEC, tiny_sd, assembly.adapter_of(config), accelerator, steps)

    return make


@pytest.fixture
def batches(tiny_sd) -> Callable[[], Iterator[tuple[Position, Batch]]]:
    """Random moments with the tokens of three captions, each batch with the position after it."""
    tokens = SPEC.text.tokenizer(tiny_sd)(["a red circle", "", "a blue square"]).input_ids

    def batches() -> Iterator[tuple[Position, Batch]]:
        generator = torch.Generator().manual_seed(5)
        for number in itertools.count(1):
            moments = torch.randn(2, 8, 8, 8, generator=generator).half()
            text = tokens[torch.randint(3, (2,), generator=generator)]
            yield Position(0, number), Batch(moments, text, (None, None))

    return batches


def groups_of(run: Run) -> list[list[torch.Tensor]]:
    return [[one.detach().clone() for one in group] for group in parameter_groups(run.parts.denoiser)]


def test_one_step_moves_both_and_the_frozen_weights_of_neither(make_run, batches):
    run = make_run(1, learning_rate=1e-2)
    frozen = {name: one.clone() for name, one in run.parts.denoiser.named_parameters() if not one.requires_grad}
    before = groups_of(run)
    train(run, batches())
    for was, now in zip(before, groups_of(run)):
        moved = [not torch.equal(one, other) for one, other in zip(was, now)]
        assert sum(moved) >= len(moved) / 2, "B moves in the first step, A cannot yet"
    after = dict(run.parts.denoiser.named_parameters())
    assert all(torch.equal(one, after[name]) for name, one in frozen.items())


def test_the_loss_is_that_of_the_embeddings_that_the_encoder_gives(make_run, batches):
    run = make_run()
    _, batch = next(batches())
    run.denoiser.eval()
    with torch.no_grad():
        by_tokens = training_loss(run.parts, run.denoiser, batch, torch.Generator().manual_seed(1))
        embeds = run.parts.denoiser.embed(batch.prompt_embeds)
        run.parts.denoiser.text_encoder = None
        plain = Batch(batch.images, embeds, batch.uses)
        by_embeds = training_loss(run.parts, run.denoiser, plain, torch.Generator().manual_seed(1))
    assert torch.equal(by_tokens.loss, by_embeds.loss)


def test_the_text_encoder_has_a_learning_rate_of_its_own_on_the_same_schedule(make_run, batches):
    run = make_run(4, learning_rate=1e-2, text_encoder_learning_rate=1e-3, lr_scheduler="linear", lr_end=2e-3)
    rates = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    train(run, batches())
    assert [unet for unet, _ in rates] == [run.learning_rate.at(step) for step in range(4)]
    assert all(text == pytest.approx(unet / 10) for unet, text in rates)


def test_without_one_it_has_the_unets(make_run, batches):
    run = make_run(1, learning_rate=1e-2)
    train(run, batches())
    assert {group["lr"] for group in run.optimizer.param_groups} == {1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_steps_each_group_at_its_rate_and_goes_on_from_its_state(name, dtype):
    facts = FACTS[name]
    if facts.package and not is_installed(facts.package):
        pytest.skip(f"{facts.package} is not installed")
    if facts.lost_in_bf16 and dtype == torch.bfloat16:
        pytest.skip("this pairing is refused")
    factor = 1.0 if facts.one_rate else 0.0
    start = [torch.randn(5000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)]

    def make() -> tuple[list[Parameter], torch.optim.Optimizer]:
        parameters = [Parameter(one.clone()) for one in start]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], RATE_FACTOR: factor}]
        return parameters, OPTIMIZERS[name](groups, 1e-2, ADAM)

    def step(parameters: list[Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        set_rate(optimizer, 1e-2)
        optimizer.step()

    parameters, optimizer = make()
    step(parameters, optimizer, 10)
    assert all(not torch.equal(one, was) for one, was in zip(parameters[:2], start))
    assert torch.equal(parameters[2], start[2]) == (factor == 0)
    again, other = make()
    for one, parameter in zip(again, parameters):
        one.data.copy_(parameter)
    restore_state(other, copy.deepcopy(optimizer.state_dict()))
    for seed in (11, 12):
        step(parameters, optimizer, seed)
        step(again, other, seed)
    assert all(torch.equal(one, parameter) for one, parameter in zip(again, parameters))


@pytest.mark.parametrize("options", [
    {"lora_dropout": 0.3, "use_ema": True, "text_encoder_learning_rate": 1e-3},
    {"use_dora": True, "mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adamw_bf16"},
    {"mixed_precision": "bf16", "pure_bf16": True, "optimizer": "adafactor", "gradient_checkpointing": True},
], ids=["fp32", "pure bf16", "stand-ins"])
def test_a_run_that_goes_on_equals_one_that_never_stopped(make_run, batches, tmp_path, tiny_sd, options):
    origin = origin_of(str(tiny_sd), "sd", SPEC, tiny_sd, LossSettings())
    adapter = replace(assembly.adapter_of(config_of(**options)), origin=origin)
    through = make_run(4, learning_rate=1e-2, **options)
    train(through, batches())
    stopped = make_run(4, learning_rate=1e-2, **options)

    def stop(run: Run) -> None:
        run.requests.stop = 2 if run.step == 2 else None

    train(stopped, batches(), [stop])
    adapter.save_weights(stopped.parts.denoiser, tmp_path)
    state = stopped.state()
    resumed = make_run(4, learning_rate=1e-2, **options)
    adapter.load_weights(resumed.parts.denoiser, tmp_path)
    resumed.restore(state)
    train(resumed, itertools.islice(batches(), 2, None))
    assert_equal(groups_of(resumed), groups_of(through))
    assert_equal(resumed.state(), through.state())


def test_a_changed_rate_of_the_text_encoder_counts_from_where_a_run_goes_on(make_run, batches):
    before = make_run(1, learning_rate=1e-2, text_encoder_learning_rate=1e-3)
    train(before, batches())
    after = make_run(2, learning_rate=1e-2, text_encoder_learning_rate=5e-3, lr_scheduler="constant")
    after.restore(before.state())
    train(after, batches())
    assert [group["lr"] for group in after.optimizer.param_groups] == [1e-2, 5e-3]


def test_averaged_weights_are_in_place_in_the_text_encoder_too(make_run, batches):
    run = make_run(3, learning_rate=1e-2, use_ema=True)
    train(run, batches())
    own = groups_of(run)
    with run.averaged_weights():
        averaged = groups_of(run)
    assert any(not torch.equal(one, other) for one, other in zip(own[1], averaged[1]))
    assert_equal(groups_of(run), own)


def test_a_broken_step_names_its_captions(make_run, batches, tmp_path):
    run = make_run(2, max_nonfinite_steps=0)
    _, batch = next(batches())
    record = Record("set", tmp_path / "a.png", "0" * 32, Size(64, 64), ("a red circle",))
    uses = (Use(record, None, (0, 0, 64, 64), "a red circle", False),) * 2
    spoilt = Batch(torch.full_like(batch.images, torch.inf), batch.prompt_embeds, uses)
    with pytest.raises(NonFiniteLoss, match="a red circle") as told:
        train(run, iter([(Position(0, 1), spoilt)]))
    assert "embedding" not in str(told.value)


@pytest.mark.parametrize("options", [
    {}, {"use_dora": True, "optimizer": "adafactor"}, {"mixed_precision": "bf16", "use_ema": True},
    {"mixed_precision": "bf16", "pure_bf16": True, "gradient_checkpointing": True},
], ids=["fp32", "dora", "mixed", "pure bf16"])
def test_the_memory_that_is_told_has_the_text_encoder_in_it(make_run, batches, tiny_sd, options):
    config = config_of(**options, train_batch_size=2)
    run = make_run(1, **options, train_batch_size=2)
    sums = {}

    def see(run: Run) -> None:
        state = getattr(run.optimizer.optimizer, "_inner", run.optimizer.optimizer).state_dict()["state"]
        kept = (one for entry in state.values() for one in entry.values())
        sums["optimizer"] = sum(one.nbytes for one in kept if torch.is_tensor(one))

    train(run, batches(), [see])
    denoiser = run.parts.denoiser
    told = estimate(memory_report.setup_of(config, SPEC, tiny_sd / "unet" / "config.json", Size(64, 64)))
    assert told.weights == sum(one.nbytes for one in (*denoiser.parameters(), *denoiser.buffers()))
    assert told.gradients == sum(one.nbytes for one in trainable_parameters(denoiser))
    assert told.optimizer == sums["optimizer"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_are_those_of_real_tensors(tiny_sd, batches, checkpointing):
    config = config_of(train_batch_size=2, gradient_checkpointing=checkpointing)
    parts = loading.load(SPEC, tiny_sd, torch.float32, with_text_encoder=True)
    assembly.adapter_of(config).attach(parts.denoiser, torch.float32)
    if checkpointing:
        checkpoint_everything(parts.unet)
        checkpoint_text_encoder(parts.denoiser.text_encoder)
    ledger = Ledger([*parts.denoiser.train().parameters(), *parts.denoiser.buffers()])
    for parameter in trainable_parameters(parts.denoiser):
        parameter.register_post_accumulate_grad_hook(ledger.count_as_gradient)
    with ledger:
        loss, _ = training_loss(parts, parts.denoiser, next(batches())[1], torch.Generator())
        loss.backward()
    told = estimate(memory_report.setup_of(config, SPEC, tiny_sd / "unet" / "config.json", Size(64, 64)))
    assert told.activations == pytest.approx(ledger.most_activations, rel=0.03)


def test_checkpointing_the_text_encoder_changes_no_gradient(tiny_sd, batches):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        parts = loading.load(SPEC, tiny_sd, torch.float32, with_text_encoder=True)
        torch.manual_seed(0)
        assembly.adapter_of(config_of(lora_dropout=0.2)).attach(parts.denoiser, torch.float32)
        if checkpointing:
            checkpoint_text_encoder(parts.denoiser.text_encoder)
        parts.denoiser.train()
        torch.manual_seed(1)
        training_loss(parts, parts.denoiser, next(batches())[1], torch.Generator().manual_seed(2)).loss.backward()
        gradients.append([one.grad for one in parameter_groups(parts.denoiser)[1]])
    assert_equal(*gradients)
    assert all(one.abs().sum() > 0 for one in gradients[0][1::2])


@pytest.mark.parametrize("hub_id", sorted(LIKE))
def test_a_published_models_text_encoder_gives_what_its_unet_reads(hub_id):
    unet = architecture(hub_id)
    encoder = text_encoder_of(unet)
    assert encoder.parent == ARCHITECTURES
    with memory.META:
        made = SPEC.text.untrained(encoder)
    parameters = sum(one.numel() for one in made.parameters())
    assert parameters == {768: 123_060_480, 1024: 340_387_840}[made.config.hidden_size]
    assert f'"cross_attention_dim": {made.config.hidden_size}' in unet.read_text()


def test_what_saves_memory_is_also_not_to_train_it():
    ways = dict(memory_report.savings(config_of(text_encoder_learning_rate=1e-6)))
    [changed] = [config for words, config in ways.items() if words.startswith("TRAIN_TEXT_ENCODER=false")]
    assert not changed.lora.train_text_encoder and changed.lora.text_encoder_learning_rate is None
