"""Conditioning images: which one belongs to which image of a dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from helpers.data.dataset import Dataset
from helpers.data.records import Record, taken, with_controls
from helpers.data.scan import LeftOut, Scan
from helpers.files import printable
from helpers.sizes import Size

UNPAIRED = "no conditioning image: "
"""How the reason begins of an image that is left out for its partner."""

NAMED = 3
"""How many files a note names as examples."""


def pair(dataset: Dataset, partners: Scan, folder: Path) -> tuple[Dataset, tuple[str, ...]]:
    """The dataset with the partner of each image as its `control`; images without a usable one are left out.

    Partners have the same place in their folder, and the same name but for its suffix.

    Args:
        partners: of the conditioning images' `folder`.

    Returns:
        also what the user should be told of the partners.
    """
    usable: dict[str, list[int]] = defaultdict(list)
    for number, partner in enumerate(partners.records):
        usable[_name(partner.path, folder)].append(number)
    refused = {_name(item.path, folder): item for item in partners.left_out}
    controls: list[int] = []
    failures: dict[Path, str] = {}
    for record in dataset.records:
        name = _name(record.path, dataset.folder)
        numbers = usable.get(name, [])
        reason = _refusal(record, [partners.records[number] for number in numbers], refused.get(name), folder)
        if reason:
            failures[record.path] = UNPAIRED + reason
        else:
            controls.append(numbers[0])
    kept = dataset.without(failures)
    paired = with_controls(kept.records, taken(partners.records, controls))
    named = {_name(record.path, dataset.folder) for record in dataset.records}
    named |= {_name(item.path, dataset.folder) for item in dataset.left_out}
    result = replace(kept, records=paired)
    return result, (*_unused(result, partners, folder, named), *_enlarged(result))


def without_controls(dataset: Dataset, failures: Mapping[Path, str]) -> Dataset:
    """The same dataset without the images whose partners could not be used; `failures` has the partners' reasons."""
    return dataset.without({
        record.path: f"{UNPAIRED}{printable(record.control.path)} {failures[record.control.path]}"
        for record in dataset.records if record.control and record.control.path in failures
    })


def _name(path: Path, folder: Path) -> str:
    """What an image and its partner have in common."""
    return str(path.with_suffix("")).removeprefix(str(folder))


def _refusal(record: Record, partners: list[Record], refused: LeftOut | None, folder: Path) -> str | None:
    """Why an image has no partner that can be used; None if it has one."""
    if len(partners) > 1:
        names = ", ".join(printable(partner.path.name) for partner in partners)
        return f"there are several of its name, {names}: keep the one that is meant"
    if not partners and refused:
        return f"{printable(refused.path)} {refused.reason}"
    if not partners:
        return f"there is none of its name in {printable(folder)}"
    if not same_aspect(record.size, partners[0].size):
        return f"{printable(partners[0].path)} is {partners[0].size}, of another aspect than {record.size}"
    return None


def same_aspect(a: Size, b: Size) -> bool:
    """Whether one is the other in another size, but for a pixel that each edge of the smaller one was rounded by."""
    return abs(a.width * b.height - a.height * b.width) <= max(a.width + a.height, b.width + b.height)


def _unused(dataset: Dataset, partners: Scan, folder: Path, named: set[str]) -> Iterator[str]:
    """What to tell of conditioning images that belong to no image; `named` are the names of all images."""
    start = f"dataset {dataset.id!r}: "
    spare = [printable(partner.path) for partner in partners.records if _name(partner.path, folder) not in named]
    if spare:
        yield f"{start}{len(spare):,} conditioning images belong to no image of it: {_listed(spare)}"
    bad = [item for item in partners.left_out if _name(item.path, folder) not in named]
    if bad:
        words = _listed([f"{printable(item.path)} {item.reason}" for item in bad])
        yield f"{start}{len(bad):,} conditioning images that belong to no image of it cannot be used: {words}"


def _enlarged(dataset: Dataset) -> Iterator[str]:
    smaller = [
        printable(record.control.path) for record, plans in zip(dataset.records, dataset.plans)
        if any(plan.intermediate.width > record.control.size.width for plan in plans)
    ]
    if smaller:
        words = f"{len(smaller):,} conditioning images are smaller than their images are trained from, and are enlarged"
        yield f"dataset {dataset.id!r}: {words}: {_listed(smaller)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
