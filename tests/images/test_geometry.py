"""Geometry: the documented sizes, and properties that hold for every size."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from helpers.images.geometry import MAX_ASPECT, Plan, Rules, crop_box, plans, refusal
from helpers.sizes import Size

DOCUMENTED = Rules(64, minimum_image_size=64, maximum_image_size=256, target_downsample_size=128)
EVERY_KIND = {
    "documented": DOCUMENTED,
    "square": Rules(64),
    "square area": Rules(0.25, "area", alignment=64),
    "preserve": Rules(64, crop_aspect="preserve"),
    "preserve pair": replace(DOCUMENTED, crop_aspect="preserve", minimum_image_size=None),
    "preserve area": Rules(1.0, "area", alignment=64, crop_aspect="preserve"),
    "area pair": Rules(0.004096, "area", crop_aspect="preserve", maximum_image_size=0.06, target_downsample_size=0.02),
    "uncropped": Rules(64, crop=False),
    "uncropped pair": replace(DOCUMENTED, crop=False, minimum_image_size=None),
    "random": Rules(64, crop_aspect="random", crop_aspect_buckets=((1.0, 1), (0.75, 2), (1.5, 1))),
    "one digit": Rules(64, crop_aspect="preserve", aspect_bucket_rounding=1),
    "no digits": Rules(64, crop_aspect="preserve", aspect_bucket_rounding=0),
}


def random_sizes(count: int, seed: int = 0) -> list[Size]:
    """Usable sizes from a few pixels to a large camera's, small ones as likely as large."""
    draw = random.Random(seed)
    edges = [
        Size(round(math.exp(draw.uniform(0, 9.3))), round(math.exp(draw.uniform(0, 9.3)))) for _ in range(4 * count)
    ]
    return [size for size in edges if refusal(size, Rules(64)) is None][:count]


@pytest.fixture(params=EVERY_KIND.values(), ids=EVERY_KIND.keys())
def rules(request: pytest.FixtureRequest) -> Rules:
    return request.param


@pytest.mark.parametrize(
    "source, intermediate",
    [
        ((65, 64), (65, 64)),  # not large: keeps its size
        ((256, 256), (256, 256)),  # strictly greater is large, equal is not
        ((257, 200), (164, 128)),  # 164.48
        ((200, 257), (128, 164)),
        ((6000, 4000), (192, 128)),
        ((4000, 6000), (128, 192)),
        ((1000, 100), (1000, 100)),  # large, but its short edge is below the downsampled size already
        ((257, 129), (255, 128)),  # 255.0
        ((300, 200), (192, 128)),
    ],
)
def test_the_documented_values_give_the_documented_sizes(source: tuple, intermediate: tuple) -> None:
    assert plans(Size(*source), DOCUMENTED) == (Plan(Size(*source), Size(*intermediate), Size(64, 64)),)


@pytest.mark.parametrize(
    "source, rules, intermediate, target",
    [
        # Without the pair only the aspect is cut away.
        ((6000, 4000), Rules(64), (96, 64), (64, 64)),
        ((101, 64), Rules(64), (101, 64), (64, 64)),
        ((32, 48), Rules(64), (64, 96), (64, 64)),
        # Own aspect: 3:2 at 64 is 96; 1.33 * 64 = 85.12 becomes 88 (10.64 rounds up); 16:9 = 1.78 -> 113.92 -> 112.
        ((6000, 4000), Rules(64, crop_aspect="preserve"), (96, 64), (96, 64)),
        ((4000, 3000), Rules(64, crop_aspect="preserve"), (88, 66), (88, 64)),
        ((1920, 1080), Rules(64, crop_aspect="preserve"), (114, 64), (112, 64)),
        # 64 / 0.75 = 85.33 -> 88, which 64 x 85.33 would not fill.
        ((3000, 4000), Rules(64, crop=False), (66, 88), (64, 88)),
        # A half rounds up: aspect 1.3125 -> 1.31 unless four digits are kept; then 84 / 8 = 10.5 -> 11.
        ((84, 64), Rules(64, crop_aspect="preserve", aspect_bucket_rounding=4), (88, 67), (88, 64)),
        # Areas: sqrt(1e6 * 1.5) = 1224.7 -> 19.1 * 64; sqrt(1e6 / 1.5) = 816.5 -> 12.76 * 64.
        ((6000, 4000), Rules(1.0, "area", 64, crop_aspect="preserve"), (1248, 832), (1216, 832)),
        ((6000, 4000), Rules(0.262144, "area", 64), (768, 512), (512, 512)),
        # Not below 0.5 megapixels: becomes 0.25 megapixels, 612.37 x 408.25.
        (
            (6000, 4000),
            Rules(0.0625, "area", 8, maximum_image_size=0.5, target_downsample_size=0.25),
            (612, 408),
            (248, 248),
        ),
        # The downsampled image would be too small for its wide target, so it covers the target instead.
        (
            (2560, 320),
            Rules(
                64,
                crop_aspect="random",
                crop_aspect_buckets=((6.0, 1),),
                maximum_image_size=256,
                target_downsample_size=64,
            ),
            (512, 64),
            (384, 64),
        ),
        (
            (600, 400),
            Rules(
                64,
                crop_aspect="random",
                crop_aspect_buckets=((4.0, 1),),
                maximum_image_size=256,
                target_downsample_size=64,
            ),
            (256, 171),
            (256, 64),
        ),
    ],
)
def test_sizes_worked_out_by_hand(source: tuple, rules: Rules, intermediate: tuple, target: tuple) -> None:
    assert plans(Size(*source), rules)[0] == Plan(Size(*source), Size(*intermediate), Size(*target))


def test_the_crop_lies_inside_and_has_the_targets_size(rules: Rules) -> None:
    draw = random.Random(1)
    for size in random_sizes(400):
        for plan in plans(size, rules):
            for style in ("random", "center", "centre", "corner"):
                u, v = draw.choice((0.0, draw.random(), math.nextafter(1, 0))), draw.random()
                left, top, right, bottom = crop_box(plan.intermediate, plan.target, style, u, v)
                assert left >= 0 and top >= 0
                assert right <= plan.intermediate.width and bottom <= plan.intermediate.height
                assert (right - left, bottom - top) == plan.target


def test_targets_are_aligned(rules: Rules) -> None:
    for size in random_sizes(400):
        for plan in plans(size, rules):
            assert plan.target.width % rules.alignment == 0 and plan.target.height % rules.alignment == 0


def test_both_axes_are_scaled_by_one_factor(rules: Rules) -> None:
    for size in random_sizes(400):
        for plan in plans(size, rules):
            lowest = max((plan.intermediate.width - 0.5) / size.width, (plan.intermediate.height - 0.5) / size.height)
            highest = min((plan.intermediate.width + 0.5) / size.width, (plan.intermediate.height + 0.5) / size.height)
            assert lowest <= highest * (1 + 1e-12), (size, plan)


def test_an_image_is_enlarged_only_if_it_cannot_fill_the_target(rules: Rules) -> None:
    for size in random_sizes(400):
        for plan in plans(size, rules):
            fills = size.width >= plan.target.width and size.height >= plan.target.height
            assert plan.upsampled != fills, (size, plan)


@pytest.mark.parametrize(
    "rules", [rules for rules in EVERY_KIND.values() if rules.maximum_image_size is None or not rules.crop]
)
def test_without_the_pair_no_more_than_the_aspect_is_cut_away(rules: Rules) -> None:
    for size in random_sizes(400):
        for plan in plans(size, rules):
            assert plan.intermediate.width == plan.target.width or plan.intermediate.height == plan.target.height


def test_plans_are_pure(rules: Rules) -> None:
    sizes = random_sizes(100)
    first = [plans(size, rules) for size in sizes]
    assert [plans(size, replace(rules)) for size in reversed(sizes)] == first[::-1]


def test_portrait_and_landscape_are_mirror_images_for_square_targets() -> None:
    for size in random_sizes(200):
        (plan,), (turned,) = plans(size, DOCUMENTED), plans(Size(size.height, size.width), DOCUMENTED)
        assert turned.intermediate == plan.intermediate[::-1]


def test_random_aspects_are_those_that_the_image_fills() -> None:
    rules = Rules(64, crop_aspect="random", crop_aspect_buckets=((1.0, 1), (1.5, 3), (0.5, 1)))
    by_target = {plan.target: plan.weight for plan in plans(Size(100, 64), rules)}
    assert by_target == {Size(64, 64): 1, Size(96, 64): 3}


def test_if_no_random_aspect_is_filled_the_one_that_needs_least_enlarging_is_taken() -> None:
    rules = Rules(64, crop_aspect="random", crop_aspect_buckets=((1.0, 1), (1.5, 3), (0.5, 1)))
    (plan,) = plans(Size(40, 60), rules)
    # 64/40 = 1.6 for the square, 96/40 = 2.4 for 3:2, 128/60 = 2.13 for 1:2
    assert plan.target == Size(64, 64) and plan.upsampled and plan.intermediate == Size(64, 96)


@pytest.mark.parametrize(
    "size, rules, word",
    [
        ((63, 64), DOCUMENTED, "minimum_image_size 64"),
        ((64, 63), DOCUMENTED, "minimum_image_size 64"),
        ((64, 64), DOCUMENTED, None),
        ((63, 65), Rules(0.004096, "area", minimum_image_size=0.004096), "minimum_image_size 0.004096"),
        ((64, 64), Rules(0.004096, "area", minimum_image_size=0.004096), None),
        ((1, 1), Rules(64), None),
        ((10000, 1), Rules(64), f"{MAX_ASPECT}:1"),
        ((64, 641), Rules(64), f"{MAX_ASPECT}:1"),
        ((640, 64), Rules(64), None),
    ],
)
def test_refusals_say_why(size: tuple, rules: Rules, word: str | None) -> None:
    reason = refusal(Size(*size), rules)
    assert reason is None if word is None else word in reason and str(Size(*size)) in reason


@pytest.mark.parametrize(
    "style, u, v, corner",
    [
        ("center", 0.9, 0.9, (50, 0)),
        ("centre", 0.9, 0.9, (50, 0)),
        ("corner", 0.9, 0.9, (0, 0)),
        ("random", 0.0, 0.0, (0, 0)),
        ("random", 0.999999, 0.999999, (101, 1)),
        ("random", 0.5, 0.5, (51, 1)),
    ],
)
def test_crop_styles(style: str, u: float, v: float, corner: tuple) -> None:
    assert crop_box(Size(165, 65), Size(64, 64), style, u, v)[:2] == corner


def test_random_crops_are_uniform_over_all_positions() -> None:
    count = 7 * 300
    lefts = [crop_box(Size(70, 64), Size(64, 64), "random", index / count, 0)[0] for index in range(count)]
    assert [lefts.count(left) for left in range(7)] == [300] * 7


def test_an_image_that_is_not_cropped_by_choice_is_trimmed_evenly() -> None:
    assert Rules(64, crop=False, crop_style="random").box_style == "center"
    assert Rules(64, crop_style="corner").box_style == "corner"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"resolution": 100}, ("96", "104")),
        ({"resolution": 4}, ("8",)),
        ({"resolution": 64, "maximum_image_size": 256}, ("target_downsample_size",)),
        ({"resolution": 64, "target_downsample_size": 128}, ("maximum_image_size",)),
        ({"resolution": 64, "crop_aspect": "random"}, ("crop_aspect_buckets",)),
    ],
)
def test_impossible_rules_are_refused_in_words(arguments: dict, words: tuple) -> None:
    with pytest.raises(ValueError) as error:
        Rules(**arguments)
    assert all(word in str(error.value) for word in words)


def test_decimal_numbers_are_taken_as_they_are_typed() -> None:
    # 1.15 * 80 / 8 is 11.5, and rounds up, although the nearest binary number to 1.15 is a little less.
    rules = Rules(80, crop_aspect="random", crop_aspect_buckets=((1.15, 1),))
    assert plans(Size(500, 400), rules)[0].target == Size(96, 80)
    # 0.015876 * 1e6 is a little more than 15876 = 126 * 126, which is not too small for it.
    assert 0.015876 * 1e6 > 15876
    assert refusal(Size(126, 126), Rules(0.004096, "area", minimum_image_size=0.015876)) is None


def test_an_unknown_crop_style_and_a_box_that_does_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="random, center or corner"):
        crop_box(Size(65, 65), Size(64, 64), "middle")
    with pytest.raises(ValueError, match="does not fit"):
        crop_box(Size(63, 65), Size(64, 64), "center")


@pytest.mark.parametrize("size, used", [(Size(64, 64), True), (Size(90, 64), True), (Size(63, 200), False)])
def test_without_enlarging_images_that_do_not_fill_their_target_are_left_out(size, used):
    reason = refusal(size, Rules(resolution=64, enlarge=False))
    assert (reason is None) == used
    assert used or "63x200 is smaller than its training size 64x64" in reason
    assert refusal(size, Rules(resolution=64)) is None


PRESERVE = Rules(256, alignment=16, crop_aspect="preserve", enlarge=False)
PRESERVE_AREA = replace(PRESERVE, resolution_type="area", resolution=0.1)


@pytest.mark.parametrize(
    "source, rules, target",
    [
        ((380, 256), PRESERVE, (368, 256)),  # 1.48 * 256 / 16 = 23.7, and 384 is more than there is
        ((256, 380), PRESERVE, (256, 368)),
        ((383, 256), PRESERVE, (368, 256)),  # 1.496 is 1.5 to two digits, which is 384
        ((760, 512), PRESERVE, (384, 256)),  # there is enough of a larger image
        ((385, 260), PRESERVE, (384, 256)),
        ((415, 241), PRESERVE_AREA, (400, 240)),  # sqrt(1e5 * 1.72) / 16 = 25.9, and 416 is more than there is
    ],
)
def test_without_enlarging_an_own_aspect_is_rounded_down_to_what_the_image_fills(source, rules, target):
    assert refusal(Size(*source), rules) is None
    (plan,) = plans(Size(*source), rules)
    assert plan.target == target and not plan.upsampled


@pytest.mark.parametrize("rules", [PRESERVE, PRESERVE_AREA, replace(PRESERVE, crop=False)])
def test_without_enlarging_an_image_is_used_if_it_has_as_much_as_is_trained(rules):
    for size in random_sizes(400):
        enough = min(size) >= 256 if rules.in_pixels else size.width * size.height >= 1e5
        if enough:
            assert refusal(size, rules) is None and not plans(size, rules)[0].upsampled, size


@pytest.mark.parametrize("source, used", [
    ((900, 500), "336x192"), ((800, 300), "416x160"), ((256, 256), None), ((1000, 1000), None), ((1000, 1040), None),
])
def test_targets_with_an_edge_below_the_smallest_are_left_out_with_the_reason(source, used):
    rules = Rules(0.065536, "area", 16, crop_aspect="preserve", enlarge=False, smallest=256)
    reason = refusal(Size(*source), rules)
    assert reason is None if used is None else f"trained at {used}, with an edge below the 256 pixels" in reason
    assert refusal(Size(*source), replace(rules, smallest=1)) is None


@pytest.mark.parametrize("resolution, kind", [
    (512, "pixel"), (768, "pixel"), (0.25, "area"), (0.6, "area"), (1.0, "area"),
])
def test_stable_diffusions_buckets_are_whole_latents_of_the_wanted_size(resolution: float, kind: str) -> None:
    rules = Rules(resolution, kind, alignment=64, crop_aspect="preserve")
    sizes = [Size(*random.Random(seed).choices(range(1200, 2400), k=2)) for seed in range(500)]
    for size in sizes:
        [plan] = plans(size, rules)
        longer = max(size) / min(size)
        if kind == "pixel":
            wanted = (resolution, resolution * longer)
        else:
            wanted = (math.sqrt(resolution * 1e6 / longer), math.sqrt(resolution * 1e6 * longer))
        for edge, ideal in zip(sorted(plan.target), wanted):
            assert edge % 64 == 0 and abs(edge - max(ideal, 64)) <= 32 + 0.02 * ideal
        assert plan.intermediate.width >= plan.target.width and plan.intermediate.height >= plan.target.height
