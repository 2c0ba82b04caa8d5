"""Labelled contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SHORTEST_EDGE = 192  # px; smaller pictures are enlarged to it so that a person can judge them
MARGIN = 12
FONT_SIZE = 14


@dataclass(frozen=True)
class Cell:
    """A picture and the words below it."""

    image: Image.Image
    label: str


def sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Lay rows of cells out on a white page, each column as wide as its widest picture."""
    font = ImageFont.load_default(FONT_SIZE)
    cells = [[_enlarged(cell) for cell in row] for row in rows]
    columns = max(len(row) for row in cells)
    widths = [max(row[i].image.width for row in cells if i < len(row)) for i in range(columns)]
    labels = [[_wrapped(cell.label, widths[i]) for i, cell in enumerate(row)] for row in cells]
    line = FONT_SIZE + 4
    heights = [
        max(cell.image.height + line * (text.count("\n") + 1) for cell, text in zip(row, texts))
        for row, texts in zip(cells, labels)
    ]
    page = Image.new("RGB", (sum(widths) + MARGIN * (columns + 1), sum(heights) + MARGIN * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(page)
    top = MARGIN
    for row, texts, height in zip(cells, labels, heights):
        left = MARGIN
        for cell, text, width in zip(row, texts, widths):
            page.paste(cell.image, (left, top))
            draw.multiline_text((left, top + cell.image.height + 2), text, "black", font, spacing=3)
            left += width + MARGIN
        top += height + MARGIN
    return page


def _enlarged(cell: Cell) -> Cell:
    factor = -(-SHORTEST_EDGE // min(cell.image.size))
    if factor <= 1:
        return cell
    size = (cell.image.width * factor, cell.image.height * factor)
    return Cell(cell.image.resize(size, Image.Resampling.BICUBIC), cell.label)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, max(8, int(width / (FONT_SIZE * 0.52))))
