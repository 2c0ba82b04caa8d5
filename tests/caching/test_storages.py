"""Embeds in 8 bits: how far off a number may be, how much they take, and that odd ones neither break nor spread."""

from __future__ import annotations

import pytest
import torch

from helpers.caching.storages import GROUP, STORAGES, dequantise, quantised

SMALLEST = torch.finfo(torch.bfloat16).tiny
WIDTHS = [1, 8, 32, 63, 64, 65, 96, 128, 768, 1000, 1024, 4096]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def there_and_back(embeds: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(embeds, torch.nan)
    dequantise(quantised(embeds), out)
    return out


def largest_of_group(embeds: torch.Tensor) -> torch.Tensor:
    """For each number the largest of its group, by a loop: float32 of the same shape."""
    largest = torch.empty(embeds.shape)
    for start in range(0, embeds.shape[-1], GROUP):
        group = embeds[..., start : start + GROUP].float().abs()
        largest[..., start : start + GROUP] = group.amax(-1, keepdim=True)
    return largest


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e36])
def test_a_number_is_off_by_half_a_step_of_its_group_at_most(width, scale):
    """A step is 1/127 of the group's largest number, up to the scale's rounding; then bfloat16 rounds the product."""
    embeds = (random(3, 7, width).float() * scale).bfloat16()
    found = there_and_back(embeds)
    step = largest_of_group(embeds) / 127 * (1 + 2**-8)
    allowed = step / 2 + found.float().abs() * 2**-8
    assert ((found.float() - embeds.float()).abs() <= allowed).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_what_a_token_takes_tells_its_width(width):
    for storage in STORAGES.values():
        stored = storage.packed(random(2, 3, width))
        assert stored[0, 0].nbytes == storage.nbytes(width) and storage.width(stored.shape[-1]) == width


def test_in_8_bits_t5_xxl_takes_a_third_of_a_megabyte():
    assert 77 * STORAGES["int8"].nbytes(4096) == 325_248
    assert 77 * STORAGES["bf16"].nbytes(4096) == 630_784


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("width", [32, 65, 128])
def test_a_batch_is_read_from_its_records(name, width):
    storage, embeds = STORAGES[name], random(5, 7, width)
    records = [row.contiguous().view(torch.uint8).numpy().reshape(-1) for row in storage.packed(embeds)]
    out = torch.full_like(embeds, torch.nan)
    storage.unpack(records, out)
    assert torch.equal(out, embeds if name == "bf16" else there_and_back(embeds))
    storage.unpack([], out[:0])


def test_zeros_stay_zeros():
    embeds = random(2, 3, 192)
    embeds[..., 64:128] = 0
    embeds[1] = -0.0
    found = there_and_back(embeds)
    assert not found[..., 64:128].any() and not found[1].any() and found[0, :, :64].all(-1).any()


def test_the_largest_and_the_smallest_numbers_do_not_overflow_or_divide_by_zero():
    largest = torch.finfo(torch.bfloat16).max
    row = torch.zeros(1, 1, 256).bfloat16()
    row[..., 0], row[..., 1] = largest, -largest
    row[..., 64], row[..., 65] = SMALLEST, -SMALLEST
    row[..., 128] = 1e-40
    found = there_and_back(row)
    assert torch.isfinite(found).all()
    assert found[0, 0, :2].tolist() == pytest.approx([largest, -largest], rel=2**-7)
    assert found[0, 0, 64:66].tolist() == [SMALLEST, -SMALLEST] and not found[..., 192:].any()


def test_an_outlier_costs_the_numbers_of_its_group_alone():
    """T5 has channels that are many times larger than all others."""
    plain = random(4, 77, 1024)
    spiked = plain.clone()
    spiked[..., 70] *= 50
    one, other = there_and_back(plain), there_and_back(spiked)
    assert torch.equal(one[..., :64], other[..., :64]) and torch.equal(one[..., 128:], other[..., 128:])
    errors = (other - spiked).float()[..., 64:128].abs()
    assert errors.max() <= largest_of_group(spiked)[..., 64:128].max() / 127


def test_what_was_in_8_bits_before_stays_as_it_is():
    """So a cache that is made of another one, by way of bfloat16, drifts no further."""
    once = there_and_back(random(4, 7, 128))
    assert (there_and_back(once) - once).abs().max() <= largest_of_group(once).max() * 2**-7


def test_groups_are_those_of_one_token():
    embeds = random(2, 3, 128)
    other = embeds.clone()
    other[:, 1] *= 1000
    assert torch.equal(quantised(embeds)[:, [0, 2]], quantised(other)[:, [0, 2]])
