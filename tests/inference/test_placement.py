"""Where weights lie and how much is made at a time, without a GPU."""

from __future__ import annotations

import pytest

from helpers.inference.placement import GB, RESERVED, Budget, budget_of, place
from helpers.models.footprint import Footprint

T5_XXL = Footprint(weights=9_500_000_000, group=530_000_000, each=20_000_000)
UNET = Footprint(weights=1_000_000_000, group=50_000_000, each=300_000_000)


def within(gigabytes: float) -> Budget:
    return Budget(int(gigabytes * GB), "")


def test_what_does_not_fit_comes_layer_by_layer_and_what_fits_lies_there_whole():
    assert place(T5_XXL, within(5.3), most=8).by_groups
    assert not place(T5_XXL, within(15.3), most=8).by_groups
    assert not place(UNET, within(5.3)).by_groups


@pytest.mark.parametrize("gigabytes", [1.4, 2, 5.3, 15.3, 23.3])
@pytest.mark.parametrize("need", [T5_XXL, UNET], ids=["T5", "UNet"])
def test_a_budget_is_kept_and_used(need, gigabytes):
    placed = place(need, within(gigabytes))
    assert placed.bytes == need.peak(placed.batch, placed.by_groups) <= gigabytes * GB
    assert placed.batch == 16 or need.peak(2 * placed.batch, placed.by_groups) > gigabytes * GB


def test_batches_are_powers_of_two_and_no_larger_than_what_is_to_be_made():
    assert [place(UNET, within(23), most=count).batch for count in (1, 2, 3, 5, 16)] == [1, 2, 2, 4, 16]


def test_a_budget_that_nothing_fits_gets_what_takes_least():
    placed = place(UNET, within(0.01))
    assert placed.by_groups and placed.batch == 1


def test_a_vae_decodes_in_tiles_where_a_whole_picture_does_not_fit():
    whole, tiled = Footprint(330_000_000, 1_000_000, 6_000_000_000), Footprint(330_000_000, 1_000_000, 900_000_000)
    assert place(whole, within(5.3), tiled=tiled).tiled and place(whole, within(5.3), tiled=tiled).bytes < 2 * GB
    assert not place(whole, within(15.3), tiled=tiled).tiled


def test_on_a_cpu_memory_is_not_counted_and_large_pictures_are_made_one_by_one():
    budget = budget_of("auto", "cpu", None)
    assert place(T5_XXL, budget, most=8).batch == 8
    assert place(UNET, budget, pixels=64 * 64).batch == 16
    assert place(UNET, budget, pixels=256 * 256).batch == 1


def test_auto_is_what_the_gpu_has_free_and_says_so():
    budget = budget_of("auto", "cuda", 11 * GB)
    assert budget.bytes == 11 * GB - RESERVED and "11.0 GB" in budget.words and "free" in budget.words
    assert budget_of("6", "cuda", 11 * GB).bytes == 6 * GB - RESERVED
    whole = budget_of("max", "cuda", 11 * GB)
    assert whole.bytes is None and place(T5_XXL, whole, pixels=1024 * 1024) == place(T5_XXL, within(100))
