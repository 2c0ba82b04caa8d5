"""Which timesteps are drawn, by their histogram."""

import pytest
import torch

from helpers.diffusion.draws import Draws
from helpers.diffusion.timesteps import TimestepBias, draw

DRAWS = 40_000


def histogram(bias: TimestepBias, batch_size: int = 100) -> torch.Tensor:
    """The share of draws in each tenth of the timesteps, `[10]`, drawn in batches of this size."""
    generator, weights = torch.Generator().manual_seed(0), bias.weights(1000)
    t = torch.cat([draw(weights, batch_size, Draws(generator)) for _ in range(DRAWS // batch_size)])
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() <= 999
    return torch.histc(t.float(), 10, 0, 1000) / len(t)


def test_without_bias_all_timesteps_come_equally_often():
    assert histogram(TimestepBias()) == pytest.approx(torch.full((10,), 0.1), abs=0.006)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("strategy, tenths", [("earlier", range(5)), ("later", range(5, 10)), ("range", range(2, 6))])
def test_a_bias_shows_at_every_batch_size(strategy, tenths, batch_size):
    bias = TimestepBias(strategy, multiplier=3, portion=0.5, begin=200, end=600)
    shares = histogram(bias, batch_size)
    inside = shares[list(tenths)].mean()
    outside = shares[[tenth for tenth in range(10) if tenth not in tenths]].mean()
    assert inside / outside == pytest.approx(3, rel=0.1)


def test_what_has_no_weight_is_never_drawn():
    weights = torch.zeros(1000)
    weights[[0, 998]] = torch.tensor([1e-3, 3e-3])
    t = draw(weights, DRAWS, Draws(torch.Generator().manual_seed(0)))
    assert set(t.tolist()) == {0, 998}
    assert (t == 998).float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_drawing_reads_nothing_back_from_the_device():
    """On the meta device there are no values to read, as on a GPU they are not there yet."""
    t = draw(torch.ones(1000, device="meta"), 1, Draws(None))
    assert t.device.type == "meta" and t.shape == (1,) and t.dtype == torch.int64


def test_a_multiplier_below_one_makes_them_rarer():
    shares = histogram(TimestepBias("later", multiplier=0.5, portion=0.1))
    assert shares[9] / shares[:9].mean() == pytest.approx(0.5, rel=0.1)
