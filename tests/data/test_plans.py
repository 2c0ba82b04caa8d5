"""Plans in tables are what they would be as objects."""

import random
from collections import Counter
from itertools import accumulate

import numpy as np

from helpers.data.plans import Plans
from helpers.images.geometry import Plan, Rules, plans
from helpers.sizes import Size

RANDOM = Rules(64, crop_aspect="random", crop_aspect_buckets=((1.0, 1.0), (0.5, 3.3), (2.0, 0.1)))
CHOICES = (
    plans(Size(640, 480), RANDOM), (), plans(Size(30, 20), Rules(64)), plans(Size(100, 900), RANDOM),
)  # fmt: skip
NUMBERS = [3, 0, 0, 2, 3, 3]
PLAIN = tuple(CHOICES[number] for number in NUMBERS)


def test_tables_give_back_what_was_put_in():
    made = Plans(CHOICES, NUMBERS)
    assert made == PLAIN and PLAIN == made and len(made) == len(PLAIN) and made[-1] == PLAIN[-1]
    assert isinstance(made[1][0], Plan) and made[1] is made[2]
    assert made[4:0:-1] == PLAIN[4:0:-1] and made.taken([5, 3, 3]) == (PLAIN[5], PLAIN[3], PLAIN[3])
    assert made != PLAIN[:-1] and len(Plans([], [])) == 0


def test_images_are_counted_by_their_plans():
    for made in (Plans(CHOICES, NUMBERS), Plans(CHOICES, [*NUMBERS, 2, 2]).taken(range(6))):
        assert dict(made.counted()) == Counter(PLAIN)
    assert Plans(CHOICES, [2, 0]).has_choices() and not Plans(CHOICES, [2, 2]).has_choices()


def test_each_plan_has_its_target_in_the_table():
    made = Plans(CHOICES, NUMBERS)
    rows, targets = made.first_rows(), made.targets()
    for row, choices in zip(rows.tolist(), PLAIN):
        assert targets[row : row + len(choices)] == [plan.target for plan in choices]


def test_a_plan_is_drawn_as_by_adding_up_the_weights_of_objects():
    made, draw = Plans(CHOICES, NUMBERS), random.Random(0)
    for u in [0.0, np.nextafter(1.0, 0.0), *(draw.random() for _ in range(200))]:
        for index, choices in enumerate(PLAIN):
            sums = list(accumulate(plan.weight for plan in choices))
            assert made.drawn(index, u) == next(i for i, upper in enumerate(sums) if u * sums[-1] < upper)
