import pytest
import torch

from helpers.training import rounding
from helpers.training.rounding import InFloat32, stochastically_rounded


def test_rounding_is_exact_on_average_and_to_a_neighbour():
    values = torch.full((200_000,), 1 + 0.3 * 2**-7)
    rounded = stochastically_rounded(values, torch.bfloat16, torch.Generator().manual_seed(0)).double()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean().item() == pytest.approx(values[0].item(), abs=2e-5)
    negative = stochastically_rounded(-values, torch.bfloat16, torch.Generator().manual_seed(0)).double()
    assert torch.equal(negative, -rounded)
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), -float("inf")]).repeat(10_000)
    assert torch.equal(stochastically_rounded(exact, torch.bfloat16, torch.Generator()).float(), exact)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -0x7FFFFF])
def test_nan_stays_nan_whatever_its_bits(bits):
    """CUDA computes 0x7FFFFFFF, to which noise would add up to -0.0; -1 is 0xFFFFFFFF."""
    values = torch.full((10_000,), bits, dtype=torch.int32).view(torch.float32)
    assert stochastically_rounded(values, torch.bfloat16, torch.Generator()).isnan().all()


def momentum(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.5)


@pytest.mark.parametrize("elementwise, states", [(True, 5), (False, 3)])
def test_another_optimizer_sees_each_parameter_in_float32_and_its_step_reaches_the_weights(
    monkeypatch, elementwise, states
):
    # Chunks of two parameters, and of one that is larger than a chunk; the rounding of these values is exact.
    monkeypatch.setattr(rounding, "CHUNK", 12)
    weights = [torch.nn.Parameter(torch.ones(shape).bfloat16()) for shape in ((5,), (7,), (5, 6), (2,))]
    optimizer = InFloat32(weights, 0.25, momentum, elementwise)
    for number in (1, 2):
        for parameter in weights[:3]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert all((parameter == {1: 0.75, 2: 0.375}[number]).all() for parameter in weights[:3])
    assert (weights[3] == 1).all(), "without a gradient a weight stays"
    kept = [state["momentum_buffer"] for state in optimizer.state_dict()["inner"]["state"].values()]
    assert [buffer.dtype for buffer in kept] == [torch.float32] * states
    assert sum(buffer.numel() for buffer in kept) == 42


def test_between_steps_it_holds_no_second_copy_of_the_weights():
    weights = [torch.nn.Parameter(torch.ones(100).bfloat16())]
    optimizer = InFloat32(weights, 0.25, momentum, elementwise=True)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    [stand_in] = optimizer._inner.param_groups[0]["params"]
    assert stand_in.numel() == 0 and stand_in.grad is None
