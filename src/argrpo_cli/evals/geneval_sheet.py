"""The contact sheet of GenEval's failures: each image with the boxes that were found and the reason."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from argrpo_cli.geneval.nano_detector import NANO_THRESHOLDS
from argrpo_cli.geneval.rules import Thresholds
from argrpo_cli.images import read_image

COLUMNS, SIDE, PAD, LINES, CHARACTERS = 5, 224, 8, 6, 36
INK, PAPER = (30, 30, 30), (255, 255, 255)
BOX, DOUBTFUL = (220, 30, 60), (150, 150, 150)


def failure_sheet(
    rows: Sequence[dict[str, Any]], folder: Path, thresholds: Thresholds = NANO_THRESHOLDS
) -> Image.Image:
    """Rows of results.jsonl whose images lie in `folder`, as one picture."""
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    line = 16
    cell = (SIDE + 2 * PAD, SIDE + 2 * PAD + LINES * line)
    height = -(-len(rows) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(rows)) * cell[0], height * cell[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        x, y = (index % COLUMNS) * cell[0] + PAD, (index // COLUMNS) * cell[1] + PAD
        pixels = read_image(folder / row["file"])
        height, width = pixels.shape[-2:]
        scale = SIDE / max(height, width)
        filtered = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        size = max(1, round(width * scale)), max(1, round(height * scale))
        sheet.paste(Image.fromarray(pixels.transpose(1, 2, 0)).resize(size, filtered), (x, y))
        least = thresholds.least(row["tag"])
        for one in row["objects"]:
            sure = one["score"] > least  # others did not count and are drawn thin
            corners = [
                min(max(v * scale, 0), SIDE - 1) + origin for v, origin in zip(one["box"], (x, y, x, y), strict=True)
            ]
            draw.rectangle(corners, outline=BOX if sure else DOUBTFUL, width=2 if sure else 1)
            if sure:
                color = f"{one['color']} " if one["color"] else ""  # known only where the prompt asks for it
                label = f"{color}{one['class']} {one['score']:.2f}"
                width = draw.textlength(label, font=small)
                at = min(corners[0] + 2, x + SIDE - width - 1), min(corners[1] + 1, y + SIDE - 14)
                draw.rectangle(draw.textbbox(at, label, font=small), fill=PAPER)
                draw.text(at, label, fill=BOX, font=small)
        for place, (text, ink) in enumerate(captions(row)):
            draw.text((x, y + SIDE + 2 + place * line), text, fill=ink, font=font)
    return sheet


def captions(row: dict[str, Any]) -> list[tuple[str, tuple[int, int, int]]]:
    """The prompt and the reason in lines that fit below a picture, each with its colour."""
    words = textwrap.wrap(row["prompt"], CHARACTERS)
    reason = [part for text in row["reason"].splitlines() for part in textwrap.wrap(text, CHARACTERS)]
    return [*((text, INK) for text in words), *((text, BOX) for text in reason)][:LINES]
