import pytest
import torch

from helpers.training.optimizers import OPTIMIZERS, AdamSettings

ADAM = AdamSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0)
STEPS = 1000


def movement(name: str, dtype: torch.dtype, lr: float) -> torch.Tensor:
    """How far each of many weights of a LoRA's usual size moves, under noisy gradients that each pull one way."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter((torch.randn(8192, generator=generator) * 0.01).to(torch.bfloat16).to(dtype))
    pull = torch.randn(8192, generator=generator)
    start = weights.detach().double()
    optimizer = OPTIMIZERS[name]([weights], lr, ADAM)
    for _ in range(STEPS):
        weights.grad = (pull + torch.randn(8192, generator=generator)).to(dtype)
        optimizer.step()
    return weights.detach().double() - start


def kept(name: str, dtype: torch.dtype, lr: float) -> float:
    """The share of the movement that AdamW makes in float32 from the same gradients."""
    intended = movement("adamw", torch.float32, lr)
    return (movement(name, dtype, lr) @ intended / (intended @ intended)).item()


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 4e-5, 1e-4])
def test_adamw_bf16_keeps_99_percent_of_the_intended_movement(lr):
    assert kept("adamw_bf16", torch.bfloat16, lr) == pytest.approx(1, abs=0.01)


def test_a_slower_second_moment_loses_movement_in_bfloat16_which_is_why_it_is_refused(monkeypatch):
    monkeypatch.setitem(globals(), "ADAM", AdamSettings(0.9, 0.999, 1e-8, 0.0))
    assert kept("adamw_bf16", torch.bfloat16, 1e-5) < 0.97


def test_plain_adamw_loses_movement_in_bfloat16_which_is_why_that_pairing_is_refused():
    assert kept("adamw", torch.bfloat16, 1e-5) < 0.75


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weight_decay_shrinks_weights_that_have_no_gradient(name):
    weights = torch.nn.Parameter(torch.ones(8))
    optimizer = OPTIMIZERS[name]([weights], 0.1, AdamSettings(0.9, 0.999, 1e-8, weight_decay=0.5))
    weights.grad = torch.zeros_like(weights)
    optimizer.step()
    assert weights.detach().tolist() == pytest.approx([0.95] * 8)
