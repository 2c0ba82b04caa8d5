import pytest
import torch

from helpers.training import rounding
from helpers.training.ema import EMA
from helpers.training.memory import Ledger

DECAY = 0.9


def parameters(dtype: torch.dtype = torch.float32, value: float = 1.0) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full(shape, value, dtype=dtype)) for shape in ((3, 2), (4,))]


def fill(weights: list[torch.nn.Parameter], value: float) -> None:
    with torch.no_grad():
        for parameter in weights:
            parameter.fill_(value)


def average_of(ema: EMA) -> list[float]:
    return [tensor.mean().item() for tensor in ema.state()["weights"]]


def test_it_is_the_moving_average_of_the_weights_after_each_step():
    weights = parameters()
    ema = EMA(weights, DECAY)
    average = 0.0
    for update in range(1, 200):
        fill(weights, update % 7)
        ema.update()
        keeps = min(DECAY, update / (9 + update)) if update > 1 else 0.0
        average = keeps * average + (1 - keeps) * (update % 7)
        assert average_of(ema) == pytest.approx([average] * 2, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_takes_the_memory_of_a_chunk_and_gives_what_the_whole_would(monkeypatch, dtype):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((50, 40), (10,), (30,))]
    whole, chunked = EMA(weights, DECAY), EMA(weights, DECAY)
    for _ in range(3):
        for parameter in weights:
            parameter.data.normal_()
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "CHUNK", 64)
            ledger = Ledger([*weights, *chunked.state()["weights"]])
            with ledger:
                chunked.update()
        whole.update()
    assert all(torch.equal(left, right) for left, right in zip(whole.state()["weights"], chunked.state()["weights"]))
    assert ledger.most_activations <= 64 * 8 + 16


@pytest.mark.parametrize("steps", [20, 200, 1000])
def test_even_a_short_run_leaves_its_start_behind(steps):
    """With a decay of 0.999 from the beginning, 37 % of the average would be the start after 1000 steps."""
    weights = parameters(value=0.0)
    ema = EMA(weights, 0.999)
    ema.update()
    fill(weights, 1.0)
    for _ in range(steps):
        ema.update()
    assert 1 - average_of(ema)[0] < 1e-3


def test_the_average_of_bfloat16_weights_is_float32_and_loses_nothing():
    weights = parameters(torch.bfloat16)
    ema = EMA(weights, 0.999)
    for _ in range(20_000):
        ema.update()
    fill(weights, 1 + 2**-7)
    for _ in range(1000):
        ema.update()
    assert {tensor.dtype for tensor in ema.state()["weights"]} == {torch.float32}
    assert average_of(ema) == pytest.approx([1 + 2**-7 * (1 - 0.999**1000)] * 2, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_block_the_average_is_in_place_and_after_it_the_weights_even_after_an_error(dtype):
    weights = parameters(dtype, 2.0)
    ema = EMA(weights, DECAY)
    for parameter in weights:
        parameter.data.uniform_()
    own = [parameter.detach().clone() for parameter in weights]
    with pytest.raises(RuntimeError), ema.in_place():
        assert all((parameter == 2.0).all() and parameter.dtype == dtype for parameter in weights)
        raise RuntimeError
    assert all(torch.equal(left, right) for left, right in zip(own, weights))
    assert average_of(ema) == [2.0, 2.0]


def test_it_goes_on_from_its_state_bit_for_bit():
    weights = parameters()
    ema = EMA(weights, 0.99)
    for _ in range(5):
        fill(weights, torch.rand(()).item())
        ema.update()
    state = {key: value if key == "updates" else [one.clone() for one in value] for key, value in ema.state().items()}
    again = EMA(weights, 0.99)
    again.restore(state)
    for _ in range(5):
        fill(weights, torch.rand(()).item())
        ema.update()
        again.update()
    assert all(torch.equal(left, right) for left, right in zip(ema.state()["weights"], again.state()["weights"]))
    assert ema.state()["updates"] == again.state()["updates"] == 10
