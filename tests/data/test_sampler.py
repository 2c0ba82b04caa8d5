"""An epoch is exactly what was promised, and any position goes on as if nothing had happened."""

import hashlib
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from helpers.data.dataset import Dataset, plan_images
from helpers.data.sampler import BatchPlan, Dealt, Position, Sampler, Use
from helpers.data.scan import DatasetError, LeftOut, Record, Scan
from helpers.images.geometry import Rules
from helpers.sizes import Size

SQUARE = Rules(64, maximum_image_size=256, target_downsample_size=128)
PRESERVE = Rules(64, crop_aspect="preserve", aspect_bucket_rounding=1)
RANDOM = Rules(64, crop_aspect="random", crop_aspect_buckets=((1.0, 1.0), (0.5, 3.0), (2.0, 1.0)))
SIZES = (Size(640, 480), Size(480, 640), Size(500, 500), Size(1000, 400))
ALL_RULES = pytest.mark.parametrize("rules", [SQUARE, PRESERVE, RANDOM], ids=["square", "preserve", "random"])


def record(number: int, dataset_id: str = "set", captions: tuple[str, ...] | None = None) -> Record:
    content = hashlib.sha256(str(number).encode()).hexdigest()
    path = Path(f"/images/{number % 7}/{number}.jpg")
    return Record(dataset_id, path, content, SIZES[number % len(SIZES)], captions or (f"caption {number}",))


def dataset(count: int = 50, rules: Rules = PRESERVE, dataset_id: str = "set", **options) -> Dataset:
    records = tuple(record(number, dataset_id) for number in range(count))
    return plan_images(dataset_id, Path("/images"), rules, Scan(records, (), ()), **options)


def sampler(*datasets: Dataset, batch_size: int = 4, seed: int = 42, dropout: float = 0.1) -> Sampler:
    return Sampler(datasets or (dataset(),), batch_size, seed, dropout)


def epoch(of: Sampler, number: int = 0) -> list[BatchPlan]:
    return [batch for _, batch in islice(of.batches(Position(number, 0)), of.batches_in_epoch(number))]


def uses(batches: list[BatchPlan]) -> list[Use]:
    return [use for batch in batches for use in batch.uses]


def by_image(batches: list[BatchPlan]) -> dict[tuple[str, Path], list[Use]]:
    found: dict[tuple[str, Path], list[Use]] = {}
    for use in uses(batches):
        found.setdefault((use.record.dataset_id, use.record.path), []).append(use)
    return {image: sorted(several, key=str) for image, several in found.items()}


@ALL_RULES
@pytest.mark.parametrize("repeats", [0, 1, 4])
def test_an_epoch_sees_every_image_repeats_plus_one_times(rules, repeats):
    for number in (0, 3):
        seen = Counter(use.record.path for use in uses(epoch(sampler(dataset(rules=rules, repeats=repeats)), number)))
        assert len(seen) == 50 and set(seen.values()) == {repeats + 1}


@ALL_RULES
def test_a_batch_holds_one_size_and_only_the_last_of_a_size_is_smaller(rules):
    batches = epoch(sampler(dataset(rules=rules)))
    counts: dict[Size, list[int]] = {}
    for batch in batches:
        assert {use.plan.target for use in batch.uses} == {batch.target}
        counts.setdefault(batch.target, []).append(len(batch.uses))
    for sizes in counts.values():
        assert max(sizes) <= 4 and sum(size < 4 for size in sizes) <= 1


def test_the_remainder_makes_a_smaller_batch():
    assert sorted(len(batch.uses) for batch in epoch(sampler(dataset(10, SQUARE)))) == [2, 4, 4]


@ALL_RULES
def test_any_position_gives_the_same_continuation(rules):
    data = dataset(30, rules), dataset(11, rules, "other", repeats=1, probability=0.3)
    whole = list(islice(sampler(*data).batches(), 60))
    assert whole[-1][0].epoch >= 2
    for done in (1, 7, 20, 41):
        assert list(islice(sampler(*data).batches(whole[done - 1][0]), 60 - done)) == whole[done:]


def test_the_position_after_an_epoch_is_the_start_of_the_next():
    of = sampler(dataset(10, SQUARE))
    assert [position for position, _ in islice(of.batches(), 4)] == [(0, 1), (0, 2), (1, 0), (1, 1)]
    after_all = list(islice(of.batches(Position(0, 3)), 2))
    assert after_all == list(islice(of.batches(Position(1, 0)), 2))


@ALL_RULES
@pytest.mark.parametrize("dealt", [[(4, 3)], [(1, 20), (8, 2)], [(3, 5), (5, 2), (3, 1)]])
def test_an_epoch_that_goes_on_in_batches_of_another_size_sees_each_image_just_as_often(rules, dealt):
    data, parts = (dataset(rules=rules, repeats=1), dataset(30, rules, "other")), []
    of = sampler(*data, batch_size=dealt[0][0])
    for number, (size, batches) in enumerate(dealt):
        of = Sampler(data, size, 42, 0.1, {2: [Dealt(*part) for part in dealt[:number]]})
        parts += epoch(of, 2)[:batches]
        assert all(len(batch.uses) <= size for batch in parts[-batches:])
    last = Sampler(data, 6, 42, 0.1, {2: [Dealt(*part) for part in dealt]})
    whole, rest = epoch(sampler(*data, batch_size=6), 2), epoch(last, 2)
    assert by_image(parts + rest) == by_image(whole), "with the same crops and captions, too"
    assert epoch(last, 3) == epoch(sampler(*data, batch_size=6), 3)
    assert list(islice(last.batches(Position(2, 2)), 50)) == list(islice(last.batches(Position(2, 0)), 52))[2:]


def test_an_epoch_goes_on_where_one_dataset_is_used_up():
    few, many = dataset(1, SQUARE, "few"), dataset(40, SQUARE, "many")
    seen = epoch(sampler(few, many))
    until = 1 + next(number for number, batch in enumerate(seen) if batch.dataset_id == "few")
    rest = epoch(Sampler((few, many), 3, 42, 0.1, {0: [Dealt(4, until)]}))
    assert {batch.dataset_id for batch in rest} == {"many"} and len(uses(seen[:until] + rest)) == 41


def test_a_position_that_the_epoch_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="epoch 1 has 3 batches, not the 4"):
        sampler(dataset(10, SQUARE)).batches(Position(1, 4))


def test_the_order_differs_between_epochs_and_seeds_and_is_equal_for_equal_seeds():
    def order(number: int, seed: int) -> list[Path]:
        return [use.record.path for use in uses(epoch(sampler(seed=seed), number))]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(number, seed)) for number in range(3) for seed in (1, 2)}) == 6


def test_batches_are_composed_anew_in_each_epoch():
    together = [frozenset(use.record.path for use in batch.uses) for n in (0, 1) for batch in epoch(sampler(), n)]
    assert len(set(together)) > 0.9 * len(together)


@ALL_RULES
def test_the_draws_of_an_image_do_not_depend_on_other_images_or_their_order(rules):
    data = dataset(40, rules, repeats=1)
    fewer = data.taken(range(17)[::-1])
    found = by_image(epoch(sampler(fewer, batch_size=3), 2))
    everything = by_image(epoch(sampler(data, dataset(9, rules, "other")), 2))
    assert len(found) == 17 and all(everything[image] == several for image, several in found.items())


def test_the_draws_of_a_dataset_survive_a_move_of_its_folder():
    data = dataset(20, SQUARE)
    moved_records = tuple(replace(r, path=Path("/elsewhere") / r.path.relative_to("/images")) for r in data.records)
    moved = replace(data, folder=Path("/elsewhere"), records=moved_records)
    assert [use.box for use in uses(epoch(sampler(data)))] == [use.box for use in uses(epoch(sampler(moved)))]


def test_the_draws_of_an_image_differ_between_epochs_repeats_seeds_and_datasets():
    boxes = {
        use.box
        for seed in (1, 2)
        for of in (sampler(dataset(1, SQUARE, name, repeats=1), seed=seed) for name in ("a", "b"))
        for number in (0, 1)
        for use in uses(epoch(of, number))
    }
    assert len(boxes) == 2 * 2 * 2 * 2


def test_equal_files_under_two_names_are_drawn_apart():
    one = record(0)
    data = dataset(1, SQUARE)
    twins = replace(data.taken([0, 0]), records=(one, replace(one, path=Path("/images/copy.jpg"))))
    first, second = uses(epoch(sampler(twins)))
    assert first.box != second.box


def test_random_crops_are_uniform_over_all_positions():
    many = dataset(1, Rules(64, maximum_image_size=100, target_downsample_size=64), repeats=19_999)
    boxes = [use.box for use in uses(epoch(sampler(many, batch_size=500)))]
    room = 85 - 64  # 640x480 becomes 85x64
    counts = Counter(left for left, _, _, _ in boxes)
    assert set(counts) == set(range(room + 1))
    expected = len(boxes) / (room + 1)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 47  # 0.1 % of chances with 21 degrees of freedom
    assert all((top, right, bottom) == (0, left + 64, 64) for left, top, right, bottom in boxes)


def test_the_two_axes_of_a_crop_are_drawn_independently():
    roomy = Rules(64, maximum_image_size=600, target_downsample_size=400)
    of = sampler(dataset(1, roomy, repeats=3999), batch_size=100)
    corners = np.array([use.box[:2] for use in uses(epoch(of))])
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.06


@pytest.mark.parametrize(("rules", "corner"), [
    (replace(SQUARE, crop_style="corner"), (0, 0)),
    (replace(SQUARE, crop_style="center"), (53, 32)),  # 640x480 becomes 171x128
    (replace(SQUARE, crop=False, maximum_image_size=None, target_downsample_size=None), (0, 1)),  # of 88x66
])
def test_crops_that_are_not_random_are_where_their_style_says(rules, corner):
    for number in range(3):
        assert uses(epoch(sampler(dataset(1, rules)), number))[0].box[:2] == corner


def test_random_aspects_are_drawn_by_weight():
    of = sampler(dataset(1, RANDOM, repeats=4999), batch_size=100)
    counts = Counter(use.plan.target for use in uses(epoch(of)))
    shares = {target: count / 5000 for target, count in counts.items()}
    assert shares == pytest.approx({Size(64, 64): 0.2, Size(64, 128): 0.6, Size(128, 64): 0.2}, abs=0.025)


def test_captions_are_dropped_at_the_given_rate():
    every = uses(epoch(sampler(dataset(repeats=199), batch_size=100, dropout=0.1)))
    dropped = [use for use in every if use.dropped]
    assert len(dropped) / len(every) == pytest.approx(0.1, abs=0.015)
    assert all(use.caption == "" for use in dropped)
    assert all(use.caption == use.record.captions[0] for use in every if not use.dropped)


@pytest.mark.parametrize(("rate", "dropped"), [(0.0, 0), (1.0, 50)])
def test_none_or_all_captions_can_be_dropped(rate, dropped):
    assert sum(use.dropped for use in uses(epoch(sampler(dropout=rate)))) == dropped


def test_each_of_several_captions_is_drawn_equally_often():
    data = replace(dataset(1, SQUARE, repeats=2999), records=(record(0, captions=("one", "two", "three")),))
    counts = Counter(use.caption for use in uses(epoch(sampler(data, batch_size=100, dropout=0))))
    assert counts.keys() == {"one", "two", "three"} and min(counts.values()) > 900


def test_probability_weighs_where_batches_come_from_until_a_dataset_is_used_up():
    often = dataset(4000, SQUARE, "often", probability=3.0)
    seldom = dataset(4000, SQUARE, "seldom", probability=1.0)
    order = [batch.dataset_id for batch in epoch(sampler(often, seldom))]
    assert Counter(order) == {"often": 1000, "seldom": 1000}
    assert order[:1000].count("often") == pytest.approx(750, abs=50)
    assert set(order[-400:]) == {"seldom"}


def test_batches_of_equal_datasets_are_mixed():
    order = [batch.dataset_id for batch in epoch(sampler(dataset(400, SQUARE, "a"), dataset(400, SQUARE, "b")))]
    changes = sum(left != right for left, right in zip(order, order[1:]))
    assert 60 < changes < 140  # of 199 neighbours


def test_batches_are_counted_by_dataset():
    of = sampler(dataset(10, SQUARE, "a"), dataset(5, SQUARE, "b", repeats=1))
    assert of.batches_by_dataset(0) == {"a": 3, "b": 3} and of.batches_in_epoch(0) == 6
    assert Counter(batch.dataset_id for batch in epoch(of)) == {"a": 3, "b": 3}


def test_an_empty_dataset_is_an_error_that_says_why_it_is_empty():
    empty = replace(dataset(0), left_out=(LeftOut(Path("/images/a.jpg"), "is damaged: cut short"),))
    with pytest.raises(DatasetError, match=r"dataset 'set': instance_data_dir is /images.*a\.jpg: is damaged"):
        sampler(dataset(3, dataset_id="full"), empty)
    with pytest.raises(DatasetError, match="at least one"):
        Sampler([], 4, 42, 0.1)


def test_draws_are_the_same_on_every_machine_and_in_every_release():
    """A checkpoint must resume to the same crops after an upgrade: these numbers may never change."""
    of = sampler(dataset(5, SQUARE))
    assert [(use.record.path.name, use.box[:2], use.dropped) for use in uses(epoch(of))] == GOLDEN


GOLDEN = [
    ("3.jpg", (216, 27), False),
    ("2.jpg", (39, 23), False),
    ("0.jpg", (103, 36), False),
    ("4.jpg", (86, 0), False),
    ("1.jpg", (58, 82), False),
]


@ALL_RULES
def test_a_hundred_thousand_images_are_planned_in_well_under_two_seconds(rules):
    few = dataset(100, rules)
    of = sampler(few.taken([*range(100)] * 1000), batch_size=16)
    began = time.process_time()
    assert of.batches_in_epoch(0) >= 6250
    assert time.process_time() - began < 2
