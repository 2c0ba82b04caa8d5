"""What an audit found, as a table for a person and as JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.data.audit import Audited, Finding
from helpers.files import on_one_line, printable

NAMED = 5
"""How many files of a kind of finding the table names."""


@dataclass(frozen=True)
class Audit:
    """Everything that `--check` tells. What is None could not be told, and `not_looked_at` says why.

    Args:
        batches: of an epoch by dataset's id; empty where no run is possible.
        steps: of the whole run.
        batches_per_step: gradient_accumulation_steps.
        embed_bytes: on the disk, of all captions.
        output_bytes: of the checkpoints that are kept, and the result.
        free_bytes: on the disk of the caches.
    """

    datasets: tuple[Audited, ...]
    findings: tuple[Finding, ...]
    batches: dict[str, int]
    steps: int | None
    batches_per_step: int
    captions: int
    embed_bytes: int | None
    output_bytes: int | None
    free_bytes: int | None
    not_looked_at: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int | None:
        return math.ceil(sum(self.batches.values()) / self.batches_per_step) if self.batches else None

    @property
    def kept(self) -> str:
        """What is cached of images, in a word."""
        return self.datasets[0].space.cached

    @property
    def image_bytes(self) -> int:
        return sum(audited.image_bytes for audited in self.datasets)

    @property
    def decode_seconds(self) -> float:
        return sum(audited.decode_seconds for audited in self.datasets)


def as_json_text(audit: Audit) -> str:
    """One object. Letters beyond ASCII are escaped, so that any console takes it."""
    content = {
        "datasets": [_dataset(audit, audited) for audited in audit.datasets],
        "findings": [_finding(finding) for finding in audit.findings],
        "steps_per_epoch": audit.steps_per_epoch,
        "steps": audit.steps,
        "captions": audit.captions,
        "caches": {
            "image_bytes": audit.image_bytes,
            "embed_bytes": audit.embed_bytes,
            "free_bytes": audit.free_bytes,
            "decode_seconds": round(audit.decode_seconds, 2),
        },
        "output_bytes": audit.output_bytes,
        "not_looked_at": list(audit.not_looked_at),
    }
    return json.dumps(content, indent=2)


def _dataset(audit: Audit, audited: Audited) -> dict[str, Any]:
    report = audited.dataset.report(audit.batches.get(audited.dataset.id, 0))
    return {
        "id": report.dataset_id,
        "folder": printable(audited.dataset.folder),
        "found": report.found,
        "used": report.used,
        "left_out": len(report.left_out),
        "enlarged": report.upsampled,
        "repeats": report.repeats,
        "batches_per_epoch": report.batches_per_epoch,
        "buckets": {str(size): count for size, count in report.buckets.items()},
        "image_bytes": audited.image_bytes,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "dataset": finding.dataset,
        "file": None if finding.file is None else printable(finding.file),
        "kind": finding.kind,
        "reason": finding.reason,
        "remedy": finding.remedy,
    }


def as_table(audit: Audit) -> str:
    """The same for a person: datasets, findings by kind, and what a run would take."""
    reports = [audited.dataset.report(audit.batches.get(audited.dataset.id, 0)) for audited in audit.datasets]
    head = ["dataset", "found", "used", "left out", "enlarged", "repeats", "batches an epoch"]
    rows = [
        [r.dataset_id, r.found, r.used, len(r.left_out), r.upsampled, r.repeats, r.batches_per_epoch] for r in reports
    ]
    lines = _aligned([head, *rows])
    for report in reports:
        buckets = ", ".join(f"{size} ({count:,})" for size, count in report.buckets.items())
        lines.append(f"buckets of {on_one_line(report.dataset_id)}: {buckets or 'none'}")
    lines.append("")
    for kind in dict.fromkeys(finding.kind for finding in audit.findings):
        lines += _kind(kind, [finding for finding in audit.findings if finding.kind == kind])
    count = len(audit.findings)
    lines.append(f"{count:,} {'finding' if count == 1 else 'findings'}" if count else "Nothing was found.")
    return "\n".join([*lines, *_needs(audit)])


def _kind(kind: str, findings: Sequence[Finding]) -> Iterable[str]:
    yield f"{kind}: {len(findings):,}"
    for finding in findings[:NAMED]:
        file = f"{printable(finding.file)}: " if finding.file else ""
        yield f"  {on_one_line(finding.dataset)}: {file}{finding.reason}"
        yield f"    -> {finding.remedy}"
    if len(findings) > NAMED:
        yield f"  ... and {len(findings) - NAMED:,} more, all listed by --check json"
    yield ""


def _needs(audit: Audit) -> Iterable[str]:
    if audit.steps is not None:
        yield f"steps: {audit.steps_per_epoch:,} an epoch, {audit.steps:,} in all"
    embeds = "an unknown size" if audit.embed_bytes is None else _size(audit.embed_bytes)
    free = "" if audit.free_bytes is None else f"; {_size(audit.free_bytes)} are free"
    images = f"{_size(audit.image_bytes)} of {audit.kept}"
    yield f"caches on the disk: {images}, {embeds} of {audit.captions:,} captions{free}"
    if audit.output_bytes is not None:
        yield f"checkpoints and result on the disk: {_size(audit.output_bytes)}"
    then = "about what filling an empty cache takes" if audit.kept == "pixels" else "then the VAE encodes the images"
    yield f"decoding took {audit.decode_seconds:.1f} s here: {then}"
    yield from (f"not looked at: {words}" for words in audit.not_looked_at)


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns, the first to the left and the numbers to the right."""
    texts = [[on_one_line(cell) if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in texts]


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
