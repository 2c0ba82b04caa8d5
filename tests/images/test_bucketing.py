from __future__ import annotations

import random

from helpers.images.bucketing import buckets
from helpers.sizes import Size


def test_every_position_is_in_the_bucket_of_its_size_once_and_in_order() -> None:
    sizes = [Size(64, 64), Size(64, 96), Size(96, 64)]
    targets = random.Random(0).choices(sizes, k=200)
    grouped = buckets(targets)
    assert sorted(position for members in grouped.values() for position in members) == list(range(200))
    for size, members in grouped.items():
        assert members == sorted(members) and all(targets[position] == size for position in members)


def test_the_order_of_the_buckets_does_not_depend_on_the_order_of_the_images() -> None:
    targets = [Size(96, 64), Size(64, 64), Size(64, 96), Size(64, 64)]
    assert list(buckets(targets)) == list(buckets(targets[::-1])) == [Size(64, 64), Size(64, 96), Size(96, 64)]


def test_no_images_no_buckets() -> None:
    assert buckets([]) == {}
