from __future__ import annotations

import numpy as np
import pytest

from helpers.images.bucketing import batches, numbered
from helpers.sizes import Size


def test_the_buckets_do_not_depend_on_the_order_of_the_images() -> None:
    targets = [Size(96, 64), Size(64, 96), Size(64, 64), Size(96, 64)]
    assert numbered(targets) == numbered(targets[::-1]) == {Size(64, 64): 0, Size(64, 96): 1, Size(96, 64): 2}


@pytest.mark.parametrize("count", [1, 2, 16, 17, 500])
@pytest.mark.parametrize("kinds", [(0,), (0, 1, 2), (3, 7)], ids=str)
def test_batches_hold_every_image_once_one_bucket_each_and_only_the_last_of_a_bucket_is_smaller(count, kinds) -> None:
    draw = np.random.default_rng(count)
    buckets, order = draw.choice(kinds, count), draw.permutation(count)
    members, starts, stops = batches(order, buckets, 4)
    cut = [members[a:b].tolist() for a, b in zip(starts, stops)]
    assert sorted(sum(cut, [])) == list(range(count))
    for kind in set(buckets.tolist()):
        sizes = [len(batch) for batch in cut if buckets[batch[0]] == kind]
        assert all(set(buckets[batch]) == {kind} for batch in cut if buckets[batch[0]] == kind)
        assert set(sizes[:-1]) <= {4} and 1 <= sizes[-1] <= 4


def test_within_a_bucket_the_order_is_the_given_one() -> None:
    members, starts, stops = batches(np.array([4, 0, 3, 1, 2]), np.array([1, 0, 0, 1, 1]), 2)
    assert [members[a:b].tolist() for a, b in zip(starts, stops)] == [[1, 2], [4, 0], [3]]
