"""Score pictures that `inference.py --demo` has written: do they show the thing that they should?

    python -m examples.demo.score_pictures "purple heart" PICTURE.png ... [--at-least 0.5]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo.draw import Thing
from examples.demo.score import Seen, see

EDGE = 64
"""Shorter edge in pixels at which things are named, whatever the picture's size."""


def seen_in(path: Path) -> Seen:
    """What a picture shows."""
    with Image.open(path) as picture:
        factor = EDGE / min(picture.size)
        size = (round(picture.width * factor), round(picture.height * factor))
        return see(np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Score the demo's pictures.")
    parser.add_argument("thing", help='a colour and a shape: "purple heart"')
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--at-least", type=float, default=0.0, help="share, 0..1; fewer exits with 1")
    options = parser.parse_args()
    thing = Thing(*options.thing.split())
    seen = {path: seen_in(path) for path in options.pictures}
    for path, what in seen.items():
        print(f"{path.name}: {what.colour} {what.shape}")
    right = float(np.mean([what.shows(thing) for what in seen.values()]))
    print(f"{right:.0%} show a {options.thing}")
    return int(right < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
