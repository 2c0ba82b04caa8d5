import pytest
import torch

from helpers.training import adamw_bf16
from helpers.training.adamw_bf16 import AdamWBf16, stochastically_rounded
from helpers.training.optimizers import OPTIMIZERS, AdamSettings

STEPS = 1000


def moved(name: str, dtype: torch.dtype, lr: float, scale: float, gradient: float = 1, decay: float = 0) -> torch.Tensor:
    """How far each of many weights of size `scale` moves, under noisy gradients that each pull one way."""
    generator = torch.Generator().manual_seed(0)
    # Where a step is far below a weight's resolution few weights move in any one step, so the mean needs many of them.
    count = 1 << (18 if lr / scale <= 1e-5 else 13)
    start = (torch.randn(count, generator=generator).sign() * scale).to(torch.bfloat16)
    weights = torch.nn.Parameter(start.to(dtype, copy=True))
    pull = torch.randn(count, generator=generator)
    optimizer = OPTIMIZERS[name]([weights], lr, AdamSettings(0.9, 0.999, 1e-8, decay))
    for _ in range(STEPS):
        weights.grad = (gradient * (pull + torch.randn(count, generator=generator))).to(dtype)
        optimizer.step()
    return weights.detach().double() - start.double()


def kept(name: str, lr: float, scale: float, **options: float) -> float:
    """The share of the movement that AdamW makes in float32 from the same gradients."""
    intended = moved("adamw", torch.float32, lr, scale, **options)
    return (moved(name, torch.bfloat16, lr, scale, **options) @ intended / (intended @ intended)).item()


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4])
def test_adamw_bf16_keeps_99_percent_of_the_intended_movement(lr, scale):
    """Small weights, as a LoRA's, and weights of 1, as a norm's; with PyTorch's usual betas."""
    assert kept("adamw_bf16", lr, scale) == pytest.approx(1, abs=0.01)


def test_plain_adamw_loses_movement_in_bfloat16_which_is_why_that_pairing_is_refused():
    assert kept("adamw", 1e-5, 0.01) < 0.75
    assert kept("adamw", 1e-5, 1.0) == 0


@pytest.mark.parametrize("lr, decay", [(1e-3, 0.1), (4e-5, 1.0)])
def test_weight_decay_is_kept_too(lr, decay):
    shrunk = -(moved("adamw_bf16", torch.bfloat16, lr, 1.0, gradient=0, decay=decay).abs().mean()).item()
    assert shrunk == pytest.approx((1 - lr * decay) ** STEPS - 1, rel=0.05)


def test_in_float32_it_is_plain_adamw():
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


def test_everything_is_kept_in_bfloat16(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(size).bfloat16()) for size in (5, 7, 30)]
    optimizer = AdamWBf16(weights, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    monkeypatch.setattr(adamw_bf16, "CHUNK", 12)  # two chunks: one of two parameters, one of one larger than a chunk
    for parameter in weights:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in weights]
    optimizer.step()
    assert {tensor.dtype for state in optimizer.state.values() for tensor in state.values()} == {torch.bfloat16}
    assert all((old != new).any() for old, new in zip(before, weights))


def test_rounding_is_exact_on_average_and_to_a_neighbour():
    values = torch.full((200_000,), 1 + 0.3 * 2**-7)
    rounded = stochastically_rounded(values, torch.bfloat16, torch.Generator().manual_seed(0)).double()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean().item() == pytest.approx(values[0].item(), abs=2e-5)
    negative = stochastically_rounded(-values, torch.bfloat16, torch.Generator().manual_seed(0)).double()
    assert torch.equal(negative, -rounded)
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf")])
    assert torch.equal(stochastically_rounded(exact, torch.bfloat16, torch.Generator()).float(), exact)
