from typing import get_args

import pytest
import torch
from torch.utils._pytree import tree_leaves

from helpers.config.optimizers import OPTIMIZERS as FACTS
from helpers.config.options import OptimizerOptions
from helpers.libraries import is_installed
from helpers.training import checkpoints, rounding
from helpers.training.adamw_bf16 import AdamWBf16
from helpers.training.memory import Ledger
from helpers.training.optimizers import OPTIMIZERS, AdamSettings, restore_state

STEPS = 1000
LOSING = [name for name, facts in FACTS.items() if facts.lost_in_bf16]
without_torchao = pytest.mark.skipif(not is_installed("torchao"), reason="torchao is not among the requirements")


def named(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=without_torchao) if "ao" in name else name for name in names]


def test_the_table_of_options_names_just_these_optimizers():
    assert set(OPTIMIZERS) == set(FACTS) == set(get_args(OptimizerOptions.model_fields["optimizer"].annotation))


def moved(
    name: str,
    dtype: torch.dtype,
    lr: float,
    scale: float,
    gradient: float = 1,
    decay: float = 0,
    steps: int = STEPS,
    rows: int = 128,
    beta2: float = 0.999,
) -> torch.Tensor:
    """How far each of many weights of size `scale` moves, under noisy gradients that each pull one way."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 64)
    start = (torch.randn(shape, generator=generator).sign() * scale).to(torch.bfloat16)
    weights = torch.nn.Parameter(start.to(dtype, copy=True))
    pull = torch.randn(shape, generator=generator)
    optimizer = OPTIMIZERS[name]([weights], lr, AdamSettings(0.9, beta2, 1e-8, decay))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(steps):
            weights.grad = (gradient * (pull + torch.randn(shape, generator=generator))).to(dtype)
            optimizer.step()
    return weights.detach().double().flatten() - start.double().flatten()


def kept(name: str, lr: float, scale: float, intended_by: str | None = None, **options: float) -> float:
    """The share of the movement that `intended_by`, or the same optimizer, makes in float32 from the same gradients."""
    intended = moved(intended_by or name, torch.float32, lr, scale, **options)
    return (moved(name, torch.bfloat16, lr, scale, **options) @ intended / (intended @ intended)).item()


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4])
def test_adamw_bf16_keeps_99_percent_of_the_intended_movement(lr, scale):
    """Small weights, as a LoRA's, and weights of 1, as a norm's; with PyTorch's usual betas."""
    # Where a step is far below a weight's resolution few weights move in any one step, so the mean needs many of them.
    rows = 4096 if lr / scale <= 1e-6 else 512 if lr / scale <= 1e-5 else 128
    assert kept("adamw_bf16", lr, scale, "adamw", rows=rows) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("lr, scale", [(1e-6, 0.01), (1e-5, 0.01), (1e-4, 0.01), (1e-4, 1.0)])
@pytest.mark.parametrize("name", named([name for name in OPTIMIZERS if name not in [*LOSING, "adamw_bf16"]]))
def test_each_optimizer_offered_with_pure_bf16_keeps_99_percent_of_the_intended_movement(name, lr, scale):
    rows = 128 if name == "ao_adamw8bit" else 512  # on a CPU its step takes long
    assert kept(name, lr, scale, steps=300, rows=rows) == pytest.approx(1, abs=0.01)


def test_moments_of_8_bits_make_the_movement_of_float32_moments_at_a_low_beta2():
    """Not at 0.999 or 0.99, where they make 6 to 7 % less, which the guide says; float32 weights do not change that."""
    shares = [kept("adamw8bit", 1e-4, 0.01, "adamw", beta2=beta2, steps=300) for beta2 in (0.95, 0.999)]
    assert shares == [pytest.approx(1, abs=0.01), pytest.approx(0.93, abs=0.05)]


def test_plain_adamw_loses_movement_in_bfloat16_which_is_why_that_pairing_is_refused():
    assert kept("adamw", 1e-5, 0.01) < 0.75
    assert kept("adamw", 1e-5, 1.0) == 0


def test_prodigy_does_not_move_in_bfloat16_which_is_why_that_pairing_is_refused():
    assert moved("prodigy", torch.float32, 1.0, 0.01, steps=100).abs().mean() > 1e-3
    assert moved("prodigy", torch.bfloat16, 1.0, 0.01, steps=100).abs().mean() < 1e-5


@pytest.mark.parametrize("lr, decay", [(1e-3, 0.1), (4e-5, 1.0)])
def test_weight_decay_is_kept_too(lr, decay):
    shrunk = -(moved("adamw_bf16", torch.bfloat16, lr, 1.0, gradient=0, decay=decay).abs().mean()).item()
    assert shrunk == pytest.approx((1 - lr * decay) ** STEPS - 1, rel=0.05)


@pytest.mark.parametrize("name", named([name for name in OPTIMIZERS if name != "prodigy"]))
def test_the_first_step_is_of_the_size_of_the_learning_rate_and_decay_is_decoupled(name):
    """So one learning rate means the same to all of them."""
    rate, decay = 1e-3, 10.0
    assert moved(name, torch.float32, rate, 1.0, steps=1).abs().mean().item() == pytest.approx(rate, rel=0.25)
    shrunk = moved(name, torch.float32, rate, 1.0, gradient=0, decay=decay, steps=10).abs().mean().item()
    assert shrunk == pytest.approx(1 - (1 - rate * decay) ** 10, rel=0.01)


PAIRINGS = [(name, torch.float32) for name in OPTIMIZERS] + [
    (name, torch.bfloat16) for name in OPTIMIZERS if name not in LOSING
]


def steps(name: str, weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + number)  # as the loop sets the schedule's rate
        generator = torch.Generator().manual_seed(number)
        for parameter in weights:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


class NoWeights:
    def save_weights(self, unet, folder):
        pass


@pytest.mark.parametrize(
    "name, dtype", [pytest.param(*pair, marks=without_torchao) if "ao" in pair[0] else pair for pair in PAIRINGS]
)
def test_each_optimizer_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, name, dtype):
    settings = AdamSettings(0.9, 0.99, 1e-8, 0.01)
    torch.manual_seed(0)
    shapes = ((64, 128), (64,), (8, 4, 3, 3))  # the first is large enough for a state of 8 bits
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    start = [parameter.detach().clone() for parameter in weights]
    optimizer = OPTIMIZERS[name](weights, 1e-3, settings)
    steps(name, weights, optimizer, range(3))
    state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    folder = checkpoints.save(tmp_path, 3, NoWeights(), None, state, keep=0)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in weights]
    steps(name, weights, optimizer, range(3, 6))

    saved = checkpoints.load_state(folder)
    again = OPTIMIZERS[name](resumed, 1e-3, settings)
    restore_state(again, saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    steps(name, resumed, again, range(3, 6))
    assert all(torch.equal(left, right) for left, right in zip(weights, resumed))
    assert all((left != right).any() for left, right in zip(weights, start))


SHRINKING = [pair for pair in PAIRINGS if pair[0] != "prodigy"]  # whose first steps are too small to show a decay


@pytest.mark.parametrize(
    "name, dtype", [pytest.param(*pair, marks=without_torchao) if "ao" in pair[0] else pair for pair in SHRINKING]
)
def test_each_optimizer_goes_on_with_another_weight_decay_than_it_was_saved_with(name, dtype):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(64, 128).to(dtype))]
    optimizer = OPTIMIZERS[name](weights, 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.0))
    steps(name, weights, optimizer, range(3))
    start, sizes = weights[0].detach().clone(), []
    for decay in (0.0, 100.0):
        resumed = [torch.nn.Parameter(start.clone())]
        again = OPTIMIZERS[name](resumed, 1e-3, AdamSettings(0.9, 0.99, 1e-8, decay))
        restore_state(again, optimizer.state_dict())
        steps(name, resumed, again, range(3, 40))
        sizes.append(resumed[0].detach().float().abs().mean().item())
    assert sizes[1] < 0.95 * sizes[0]


@pytest.mark.parametrize("name", named([name for name in OPTIMIZERS if name not in LOSING]))
def test_a_gradient_that_is_nan_leaves_no_weight_that_looks_sound_but_is_not(name):
    """It becomes NaN, or stays as it was (bitsandbytes leaves it out), and never 0."""
    weights = torch.nn.Parameter(torch.full((64, 128), 0.5).bfloat16())
    optimizer = OPTIMIZERS[name]([weights], 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.01))
    weights.grad = torch.full_like(weights, torch.nan)
    optimizer.step()
    assert (weights.isnan() | (weights > 0.49)).all()


@without_torchao
def test_torchaos_rounding_makes_0_of_cudas_nan_which_is_why_its_step_is_looked_after(monkeypatch):
    from torchao.optim.adam import _AdamBase
    from torchao.optim.quant_utils import _fp32_to_bf16_sr

    def step(self: _AdamBase, closure: None) -> None:
        [weights] = self.param_groups[0]["params"]
        weights.data = _fp32_to_bf16_sr(torch.full(weights.shape, 0x7FFFFFFF, dtype=torch.int32).view(torch.float32))
        assert (weights == 0).all()

    monkeypatch.setattr(_AdamBase, "step", step)
    weights = torch.nn.Parameter(torch.ones(64, 64).bfloat16())
    weights.grad = torch.full_like(weights, torch.nan)
    OPTIMIZERS["ao_adamw8bit"]([weights], 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.01)).step()
    assert weights.isnan().all()


def test_in_float32_adamw_bf16_is_plain_adamw():
    both = []
    for name in ("adamw", "adamw_bf16"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        optimizer = OPTIMIZERS[name](list(model.parameters()), 1e-2, AdamSettings(0.9, 0.999, 1e-8, 0.1))
        for _ in range(20):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        both.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_adamw_bf16_keeps_everything_in_bfloat16(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(size).bfloat16()) for size in (5, 7, 30)]
    optimizer = AdamWBf16(weights, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    monkeypatch.setattr(rounding, "CHUNK", 12)  # two chunks: one of two parameters, one of one larger than a chunk
    for parameter in weights:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in weights]
    optimizer.step()
    assert {tensor.dtype for state in optimizer.state.values() for tensor in state.values()} == {torch.bfloat16}
    assert all((old != new).any() for old, new in zip(before, weights))


@pytest.mark.parametrize("name", ["adamw_bf16", "adamw8bit", "lion"])
def test_a_large_parameter_is_updated_in_slices_as_it_would_be_at_once(monkeypatch, name):
    """The same but for the random rounding, which takes other bits, in little memory."""
    sliced, whole = [], []
    for movement, chunk in ((sliced, 1 << 12), (whole, 1 << 30)):
        monkeypatch.setattr(rounding, "CHUNK", chunk)
        weights = torch.nn.Parameter(torch.full((100, 1050), 0.01).bfloat16())
        optimizer = OPTIMIZERS[name]([weights], 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.0))
        steps(name, [weights], optimizer, range(3))
        ledger = Ledger([weights, weights.grad, *tensors_of(optimizer.state_dict())])
        with ledger:
            optimizer.step()
        movement += [weights.detach().float() - 0.01, ledger.most_activations]
    assert (sliced[0] - whole[0]).abs().max() <= 2**-11, "weights and moments were rounded four times"
    assert (sliced[0] - whole[0]).mean().abs() < 1e-3 * whole[0].abs().mean()
    assert sliced[1] < whole[1] / 20


def tensors_of(state: object) -> list[torch.Tensor]:
    return [one for one in tree_leaves(state) if isinstance(one, torch.Tensor)]


def state_bytes(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    """Bytes of state a parameter, of a weight of this shape."""
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype))]
    optimizer = OPTIMIZERS[name](weights, 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.01))
    steps(name, weights, optimizer, range(1))
    seen = {one.data_ptr(): one.nbytes for one in tensors_of(optimizer.state_dict())}
    return sum(seen.values()) / weights[0].numel()


@pytest.mark.parametrize(
    "name, expected", [("adamw_bf16", 4), ("adamw8bit", 2), ("adafactor", 0), ("lion", 4)]
)
@pytest.mark.parametrize("shape", [(512, 512), (128, 128, 3, 3), (512, 512, 1, 1)])
def test_what_the_state_takes_with_pure_bf16(name, expected, shape):
    assert state_bytes(name, torch.bfloat16, shape) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_takes_convolutions_as_matrices(dtype):
    start = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    both = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())]
    for weights in both:
        optimizer = OPTIMIZERS["adafactor"]([weights], 1e-3, AdamSettings(0.9, 0.99, 1e-8, 0.01))
        for number in range(3):
            gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(number))
            weights.grad = gradient.reshape(weights.shape).to(dtype)
            optimizer.step()
    assert both[0].shape == start.shape and both[0].grad.shape == start.shape
    assert torch.equal(both[0].flatten(1), both[1]) and not torch.equal(both[0], start)
