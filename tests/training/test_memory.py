from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from helpers.config.load import load
from helpers.config.optimizers import OPTIMIZERS as FACTS
from helpers.config.options import Config
from helpers.data.collate import Batch
from helpers.libraries import is_installed
from helpers.models import loading
from helpers.models.adapters import trainable_parameters
from helpers.models.controlnet import ControlNet
from helpers.models.families import SPECS
from helpers.models.full import Full
from helpers.models.gradient_checkpointing import checkpoint_everything
from helpers.models.lora import LoRA
from helpers.models.parts import Parts
from helpers.sizes import Size
from helpers.training import assembly, memory_report, released, rounding
from helpers.training.memory import STATE_BYTES, UPDATE_BYTES, AsOnCuda, Ledger, Setup, estimate
from helpers.training.optimizers import OPTIMIZERS, AdamSettings
from helpers.training.released import Released
from helpers.training.step import training_loss

SPEC = SPECS["deepfloyd-i"]
SIZE = Size(64, 64)


def config_of(**flags: object) -> Config:
    return load(["--model_type=deepfloyd-lora", *(f"--{name}={value}" for name, value in flags.items())]).config


def bytes_of(tensors: object) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors that an optimizer keeps, also where it has another one inside."""
    state = getattr(optimizer, "_inner", optimizer).state_dict()["state"]
    return [one for one in tree_leaves(state) if isinstance(one, torch.Tensor)]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return bytes_of({tensor.untyped_storage()._cdata: tensor for tensor in state_of(optimizer)}.values())


@pytest.mark.parametrize(
    "flags",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "no", "use_dora": True, "optimizer": "adafactor"},
        {"mixed_precision": "bf16", "lora_targets": "attention+conv", "use_ema": True},
        {"mixed_precision": "bf16", "pure_bf16": True, "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "base_model_precision": "int8"},
        {"mixed_precision": "bf16", "pure_bf16": True, "base_model_precision": "nf4"},
        {"mixed_precision": "no", "model_type": "deepfloyd-full", "use_ema": True},
        {"mixed_precision": "bf16", "model_type": "deepfloyd-full"},
        {"mixed_precision": "bf16", "pure_bf16": True, "model_type": "deepfloyd-full"},
        {"mixed_precision": "bf16", "model_type": "deepfloyd-full", "use_bitfit": True},
    ],
    ids=lambda flags: " ".join(f"{value}" for value in flags.values()),
)
def test_all_but_the_activations_is_exact_to_the_byte(tiny_model, flags):
    config = config_of(**flags, train_batch_size=1)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = assembly.create_accelerator(config)
    run = assembly.create_run(config, SPEC, tiny_model, assembly.adapter_of(config), accelerator, 1)
    unet, width = run.parts.unet.train(), run.parts.unet.config.encoder_hid_dim
    with accelerator.autocast():
        output = run.denoiser(
            torch.randn(1, 3, 64, 64).to(unet.dtype), torch.tensor([5]), torch.randn(1, 77, width).to(unet.dtype)
        )
    accelerator.backward(output.float().square().mean())
    gradients = bytes_of(parameter.grad for parameter in unet.parameters() if parameter.grad is not None)
    run.optimizer.step()
    memory = estimate(memory_report.setup_of(config, SPEC, tiny_model / "unet" / "config.json", SIZE))
    assert memory.weights == bytes_of(unet.parameters())
    assert memory.gradients == gradients
    assert memory.optimizer == state_bytes(run.optimizer.optimizer)
    assert memory.ema == (bytes_of(run.ema.state()["weights"]) if run.ema else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_what_an_optimizer_keeps_and_works_with_is_told_for_each(name, dtype):
    facts = FACTS[name]
    if facts.package and not is_installed(facts.package):
        pytest.skip(f"{facts.package} is not installed")
    if facts.lost_in_bf16 and dtype == torch.bfloat16:
        pytest.skip("this pairing is refused")
    shapes = [(3,), (4095,), (4096,), (4097,), (64, 64), (63, 65), (40, 30, 3, 3), (1 << 18,), (512, 512)]
    parameters = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    optimizer = OPTIMIZERS[name](parameters, 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.01))
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        ledger = Ledger([*parameters, *gradients, *state_of(optimizer)])
        with ledger:
            optimizer.step()
    assert STATE_BYTES[name](parameters) == state_bytes(optimizer)
    working = UPDATE_BYTES[name](parameters)
    if name != "ao_adamw8bit":  # whose step is compiled on a GPU, and not here
        assert 0.8 * working <= ledger.most_activations <= 1.01 * working


def test_every_optimizer_has_its_figures():
    assert STATE_BYTES.keys() == UPDATE_BYTES.keys() == OPTIMIZERS.keys()


def setup(model: Path, **values: object) -> Setup:
    usual = Setup(
        architecture=model / "unet" / "config.json",
        adapter=LoRA(4, 4, 0.0, "attention"),
        weights=torch.float32,
        trained=torch.float32,
        autocast=False,
        optimizer="adamw",
        ema=False,
        checkpointing=False,
        batch_size=2,
        size=SIZE,
        tokens=77,
    )
    return replace(usual, **values)


def counted_on_the_cpu(parts: Parts, setup: Setup) -> Ledger:
    """What really lives during a training step's forward and backward pass, besides weights and optimizer."""
    unet, height, width = parts.unet.train(), setup.size.height, setup.size.width
    setup.adapter.attach(parts.denoiser, setup.trained)
    if setup.checkpointing:
        checkpoint_everything(unet)
    optimizer = begun(setup.optimizer, trainable_parameters(unet))
    ledger = Ledger([*unet.parameters(), *state_of(optimizer)])
    for parameter in trainable_parameters(unet):
        parameter.register_post_accumulate_grad_hook(ledger.count_as_gradient)
    released = Released(optimizer) if setup.releases else None
    images = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
    if parts.spec.space.component:
        images = torch.rand(2, 11, height, width).half()
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    batch = Batch(images, torch.randn(2, 77, width).bfloat16(), (None, None))
    with ledger:
        with torch.autocast("cpu", torch.bfloat16) if setup.autocast else nullcontext():
            loss, _ = training_loss(parts, parts.denoiser, batch, torch.Generator())
        if released:
            released.begin(loss)
        loss.backward()
    return ledger


def begun(name: str, parameters: list[Parameter]) -> torch.optim.Optimizer:
    """An optimizer after a first step, with all the state that it keeps."""
    optimizer = OPTIMIZERS[name](parameters, 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.01))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"adapter": Full()},
        {"weights": torch.bfloat16, "trained": torch.bfloat16},
        {"weights": torch.bfloat16, "autocast": True},
        {"adapter": Full(), "autocast": True},
        {"adapter": Full(), "autocast": True, "size": Size(16, 16)},  # where autocast's copies of weights weigh most
        {"adapter": LoRA(4, 4, 0.0, "attention", dora=True)},
        {"adapter": LoRA(4, 4, 0.0, "attention", base_precision="int8"), "weights": torch.bfloat16, "autocast": True},
        {"adapter": LoRA(4, 4, 0.0, "attention", base_precision="nf4")},
    ],
    ids=["lora fp32", "full fp32", "lora pure bf16", "lora mixed", "full mixed", "small full mixed", "dora fp32",
         "int8 mixed", "nf4 fp32"],
)
def test_the_activations_are_those_of_real_tensors(tiny_model, monkeypatch, values, checkpointing):
    monkeypatch.setattr(AsOnCuda, "IN_FLOAT32", set())  # the CPU's autocast leaves these as they are
    wanted = setup(tiny_model, checkpointing=checkpointing, **values)
    real = counted_on_the_cpu(loading.load(SPEC, tiny_model, wanted.weights), wanted)
    assert estimate(wanted).activations == pytest.approx(real.most_activations, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [LoRA(4, 4, 0.0, "attention+conv", dora=True), Full()], ids=["dora", "full"])
def test_those_of_stage_2_are_too(tiny_stage2, adapter, checkpointing):
    wanted = setup(tiny_stage2, adapter=adapter, checkpointing=checkpointing)
    real = counted_on_the_cpu(loading.load(SPECS["deepfloyd-ii"], tiny_stage2, wanted.weights), wanted)
    assert estimate(wanted).activations == pytest.approx(real.most_activations, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_those_of_stage_3_are_too(tiny_stage3, checkpointing):
    wanted = setup(tiny_stage3, channels=4, adapter=Full(), checkpointing=checkpointing)
    real = counted_on_the_cpu(loading.load(SPECS["deepfloyd-iii"], tiny_stage3, wanted.weights), wanted)
    assert estimate(wanted).activations == pytest.approx(real.most_activations, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer, dtype", [
    ("adamw", torch.float32), ("adamw_bf16", torch.bfloat16), ("adafactor", torch.bfloat16),
])
def test_gradients_that_are_released_count_while_they_are_there(
    tiny_model, monkeypatch, optimizer, dtype, checkpointing
):
    monkeypatch.setattr(rounding, "CHUNK", 1 << 15)
    monkeypatch.setattr(released, "BUCKET", 1 << 16)
    values = {"weights": dtype, "trained": dtype, "optimizer": optimizer, "checkpointing": checkpointing}
    wanted = setup(tiny_model, adapter=Full(), size=Size(16, 16), releases=True, **values)
    parts = loading.load(SPEC, tiny_model, dtype)
    real, told = counted_on_the_cpu(parts, wanted), estimate(wanted)
    largest = max(parameter.nbytes for parameter in parts.unet.parameters())
    live, plain = told.peak - told.weights - told.optimizer, estimate(replace(wanted, releases=False))
    assert told.gradients == real.most_gradients
    assert 0.97 * live < real.most < 1.03 * live + largest, "for the norm a CPU copies a gradient, which a GPU does not"
    assert told.gradients < 0.3 * plain.gradients and told.peak < plain.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("values", [{}, {"weights": torch.bfloat16, "autocast": True}], ids=["fp32", "mixed"])
def test_a_controlnet_beside_the_unet_is_counted_too(tiny_sd, monkeypatch, values, checkpointing):
    monkeypatch.setattr(AsOnCuda, "IN_FLOAT32", set())
    edge = 32  # of x
    sizes = {"size": Size(edge, edge), "channels": 4, "checkpointing": checkpointing}
    wanted = setup(tiny_sd, adapter=ControlNet(), **sizes, **values)
    parts = loading.load(SPECS["sd"], tiny_sd, wanted.weights)
    denoiser = parts.denoiser.train()
    wanted.adapter.attach(denoiser, wanted.trained)
    for net in denoiser.nets if checkpointing else ():
        checkpoint_everything(net)
    trained = trainable_parameters(denoiser)
    ledger = Ledger(denoiser.parameters())
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(ledger.count_as_gradient)
    control = torch.randint(256, (2, 8 * edge, 8 * edge, 3), dtype=torch.uint8)
    text = torch.randn(2, 77, parts.unet.config.cross_attention_dim).bfloat16()
    with ledger:
        with torch.autocast("cpu", torch.bfloat16) if wanted.autocast else nullcontext():
            batch = Batch(torch.rand(2, 8, edge, edge).half(), text, (None, None), control=control)
            loss, _ = training_loss(parts, denoiser, batch, torch.Generator())
        loss.backward()
    memory = estimate(wanted)
    assert memory.activations == pytest.approx(ledger.most_activations, rel=0.03)
    assert memory.weights == bytes_of(denoiser.parameters())
    assert memory.gradients == bytes_of(parameter.grad for parameter in trained)


def test_what_saves_memory_saves_it_in_the_estimate(tiny_model):
    plain = estimate(setup(tiny_model))
    assert plain.largest == "activations"
    assert plain.weights + plain.activations < plain.peak <= sum(plain.parts.values())
    assert estimate(setup(tiny_model, checkpointing=True)).activations < 0.4 * plain.activations
    assert estimate(setup(tiny_model, batch_size=4)).activations == pytest.approx(2 * plain.activations, rel=0.05)
    assert estimate(setup(tiny_model, size=Size(96, 64))).activations > 1.4 * plain.activations
    for precision, part in (("int8", 0.3), ("nf4", 0.2)):
        kept = estimate(setup(tiny_model, adapter=LoRA(4, 4, 0.0, "attention", base_precision=precision)))
        assert kept.weights < part * plain.weights and kept.activations < plain.activations
    accumulating = estimate(setup(tiny_model, accumulates=True))
    assert accumulating.peak == sum(accumulating.parts.values())
    mixed = {"weights": torch.bfloat16, "autocast": True}
    pure = {"weights": torch.bfloat16, "trained": torch.bfloat16}
    assert 0.45 * plain.activations < estimate(setup(tiny_model, **pure)).activations < 0.55 * plain.activations
    assert 0.55 * plain.activations < estimate(setup(tiny_model, **mixed)).activations < plain.activations
