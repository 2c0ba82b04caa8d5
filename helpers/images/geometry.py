"""From an image's size to its training size: whole numbers in, whole numbers out; no image is opened here.

A source of W x H is brought to an `intermediate` size (one factor for both axes), and a box of the `target`
size is cut out of that. All sizes are width x height in pixels, after EXIF orientation. The arithmetic is exact
(fractions), so a plan is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from helpers.sizes import Size

HALF = Fraction(1, 2)
Rounding = Callable[[Fraction | float], int]
MAX_ASPECT = 10
"""Longest edge : shortest edge of a usable image. Beyond 10:1 a square crop shows under a tenth of the scene, and
an uncropped target has an edge of more than ten times the resolution."""


@dataclass(frozen=True)
class Rules:
    """How the images of one dataset are brought to training size.

    `resolution`, `minimum_image_size`, `maximum_image_size` and `target_downsample_size` are edges in pixels where
    `resolution_type` is "pixel", megapixels (1.0 = 1,000,000 pixels) where it is "area". `crop_aspect_buckets` holds
    (width / height, weight) pairs and is read only where `crop_aspect` is "random". Without `enlarge`, images that do
    not fill their target are left out, and so are those whose target has an edge below `smallest` pixels. With
    `crops_once` an image keeps the crop that is drawn for it, whatever the epoch.

    Raises:
        ValueError: if the resolution is not a multiple of the alignment, or half of the downsampling pair is missing.
    """

    resolution: float
    resolution_type: str = "pixel"
    alignment: int = 8
    crop: bool = True
    crop_aspect: str = "square"
    crop_style: str = "random"
    crop_aspect_buckets: tuple[tuple[float, float], ...] = ()
    aspect_bucket_rounding: int = 2
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    enlarge: bool = True
    smallest: int = 1
    crops_once: bool = False

    def __post_init__(self) -> None:
        if self.in_pixels and self.resolution % self.alignment:
            below = int(self.resolution // self.alignment) * self.alignment
            raise ValueError(
                f"resolution {self.resolution:g} is not a multiple of {self.alignment}: "
                f"type {max(below, self.alignment)} or {below + self.alignment}"
            )
        if (self.maximum_image_size is None) != (self.target_downsample_size is None):
            raise ValueError("maximum_image_size and target_downsample_size come as a pair: set both or neither")
        if self.crop and self.crop_aspect == "random" and not self.crop_aspect_buckets:
            raise ValueError("crop_aspect random needs crop_aspect_buckets, for example [1.0, 0.75, 1.33]")

    @property
    def in_pixels(self) -> bool:
        """Whether sizes are edges in pixels, not megapixels."""
        return self.resolution_type == "pixel"

    @property
    def box_style(self) -> str:
        """The style to hand to `crop_box`: an image that is not cropped by choice loses its excess evenly."""
        return self.crop_style if self.crop else "center"


@dataclass(frozen=True)
class Plan:
    """One way to train on an image: resize `source` to `intermediate`, then cut a box of `target` out of it.

    `weight` is how likely the plan is among the plans of the same image (relative, not normalised).
    """

    source: Size
    intermediate: Size
    target: Size
    weight: float = 1.0

    @property
    def upsampled(self) -> bool:
        """Whether the image has to be enlarged to fill the target."""
        return self.intermediate.width > self.source.width or self.intermediate.height > self.source.height


def refusal(size: Size, rules: Rules) -> str | None:
    """Why an image of this size is left out, in words; None if it is used."""
    if max(size) > MAX_ASPECT * min(size):
        return f"{size} is longer than {MAX_ASPECT}:1"
    if reason := _too_small(size, rules):
        return reason
    if rules.minimum_image_size is None:
        return None
    if rules.in_pixels and min(size) < rules.minimum_image_size:
        return f"{size} has an edge below minimum_image_size {rules.minimum_image_size:g}"
    if not rules.in_pixels and size.width * size.height < _pixels(rules.minimum_image_size):
        megapixels = size.width * size.height / 1e6
        return (
            f"{size} ({megapixels:.4g} megapixels) is below minimum_image_size {rules.minimum_image_size:g} megapixels"
        )
    return None


def _too_small(size: Size, rules: Rules) -> str | None:
    for plan in plans(size, rules):
        if plan.upsampled and not rules.enlarge:
            return f"{size} is smaller than its training size {plan.target}, and would teach the blur of enlarging"
        if min(plan.target) < rules.smallest:
            return (
                f"{size} would be trained at {plan.target}, with an edge below the {rules.smallest} pixels that the "
                "model needs: raise the resolution, or type resolution_type pixel"
            )
    return None


def plans(size: Size, rules: Rules) -> tuple[Plan, ...]:
    """The plans of an image of this size: one, or with `crop_aspect` random one per aspect that may be drawn."""
    if rules.crop and rules.crop_aspect == "random":
        return _random_plans(size, rules)
    if rules.crop and rules.crop_aspect == "square":
        return (_plan(size, _target(Fraction(1), rules, _nearest), rules),)
    return (_plan(size, _own_target(size, rules), rules),)


def crop_box(intermediate: Size, target: Size, style: str, u: float = 0.0, v: float = 0.0) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) of the target inside the intermediate image; never outside of it.

    Args:
        style: "random" (uniform over all positions), "center" or "centre", or "corner" (top left).
        u: in [0, 1): the horizontal draw, read only by "random".
        v: the same for the vertical.
    """
    left = _offset(intermediate.width, target.width, style, u)
    top = _offset(intermediate.height, target.height, style, v)
    return left, top, left + target.width, top + target.height


def _offset(edge: int, target: int, style: str, draw: float) -> int:
    room = edge - target
    if room < 0:
        raise ValueError(f"a box of {target} pixels does not fit into {edge}")
    if style == "random":
        return math.floor(draw * (room + 1))
    if style in ("center", "centre"):
        return room // 2
    if style == "corner":
        return 0
    raise ValueError(f"crop_style {style!r} is unknown: use random, center or corner")


def _random_plans(size: Size, rules: Rules) -> tuple[Plan, ...]:
    every = [(_target(_exact(aspect), rules, _nearest), weight) for aspect, weight in rules.crop_aspect_buckets]
    filled = [(target, weight) for target, weight in every if _enlargement(size, target) <= 1]
    if not filled:
        filled = [min(every, key=lambda entry: _enlargement(size, entry[0]))]
    return tuple(_plan(size, target, rules, weight) for target, weight in filled)


def _plan(size: Size, target: Size, rules: Rules, weight: float = 1.0) -> Plan:
    return Plan(size, _intermediate(size, target, rules), target, weight)


def _own_target(size: Size, rules: Rules) -> Size:
    """The target of the image's own aspect, rounded; where it may not be enlarged to fill that, rounded down."""
    target = _target(_rounded_aspect(size, rules.aspect_bucket_rounding), rules, _nearest)
    if rules.enlarge or _enlargement(size, target) <= 1:
        return target
    return _target(Fraction(*size), rules, math.floor)


def _target(aspect: Fraction, rules: Rules, rounded: Rounding) -> Size:
    """The aligned target of an aspect (width / height): short edge or area as the resolution says.

    Args:
        rounded: how edges become multiples of the alignment.
    """
    if not rules.in_pixels:
        area = _pixels(rules.resolution)
        edges = math.sqrt(area * aspect), math.sqrt(area / aspect)
        return Size(*(_aligned(edge, rules, rounded) for edge in edges))
    short = int(rules.resolution)
    long = _aligned(short * max(aspect, 1 / aspect), rules, rounded)
    return Size(long, short) if aspect >= 1 else Size(short, long)


def _intermediate(size: Size, target: Size, rules: Rules) -> Size:
    """The size that the target is cut from: downsampled only if large, and never smaller than the target."""
    if rules.crop and rules.maximum_image_size is not None:
        reduced = _reduced(size, rules) if _is_large(size, rules) else size
        if reduced.width >= target.width and reduced.height >= target.height:
            return reduced
    return covering(size, target)


def _is_large(size: Size, rules: Rules) -> bool:
    if rules.in_pixels:
        return max(size) > rules.maximum_image_size
    return size.width * size.height > _pixels(rules.maximum_image_size)


def _reduced(size: Size, rules: Rules) -> Size:
    """A large image at `target_downsample_size`, by one factor; itself if that would enlarge it."""
    if rules.in_pixels:
        factor = _exact(rules.target_downsample_size) / min(size)
    else:
        factor = math.sqrt(_pixels(rules.target_downsample_size) / (size.width * size.height))
    return size if factor >= 1 else Size(_nearest(size.width * factor), _nearest(size.height * factor))


def covering(size: Size, target: Size) -> Size:
    """The image scaled by one factor so that one axis is the target's and the other at least the target's."""
    factor = _enlargement(size, target)
    return Size(_nearest(size.width * factor), _nearest(size.height * factor))


def _enlargement(size: Size, target: Size) -> Fraction:
    return max(Fraction(target.width, size.width), Fraction(target.height, size.height))


def _rounded_aspect(size: Size, digits: int) -> Fraction:
    """Width / height to so many digits, halves up; at least one unit of the last digit, so that it never is zero."""
    unit = 10**digits
    return Fraction(max(1, _nearest(Fraction(size.width * unit, size.height))), unit)


def _aligned(edge: Fraction | float, rules: Rules, rounded: Rounding) -> int:
    return max(rules.alignment, rules.alignment * rounded(edge / rules.alignment))


def _nearest(value: Fraction | float) -> int:
    return math.floor(value + HALF) if isinstance(value, Fraction) else math.floor(value + 0.5)


def _exact(value: float) -> Fraction:
    """The decimal number that the user typed, not its nearest binary one."""
    return Fraction(repr(value))


def _pixels(megapixels: float) -> int:
    return _nearest(megapixels * 1e6)
