"""GenEval's pictures: the benchmark's own layout on disk, written and read, and the sheet of the failures.

The benchmark's generation script writes, and its evaluator reads,

    FOLDER/00007/metadata.jsonl          one line, the prompt as evaluation_metadata.jsonl has it
    FOLDER/00007/samples/00000.png       its first picture

and the evaluator a line for each picture that `summary_scores.py` reads (here `results.official.jsonl`).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from argrpo_cli.geneval.prompts import Prompt, official_prompts, parse_prompt
from argrpo_cli.geneval.rules import Thresholds
from argrpo_cli.listing import check_folder
from argrpo_cli.pictures import read_image
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, readable, write_text

METADATA, SAMPLES = "metadata.jsonl", "samples"
OFFICIAL_SET = "geneval"
# Of the sheet.
COLUMNS, SIDE, PAD, LINES, CHARACTERS = 5, 224, 8, 6, 36
INK, PAPER = (30, 30, 30), (255, 255, 255)
BOX, DOUBTFUL = (220, 30, 60), (150, 150, 150)


def write_metadata(folder: Path, prompts: Iterable[Prompt]) -> None:
    """The prompt of each folder of the benchmark's layout."""
    for prompt in prompts:
        path = folder / f"{prompt.index:05d}" / METADATA
        if not path.is_file():
            write_text(path, json.dumps(prompt.metadata()) + "\n")


def read_pictures(folder: Path) -> list[tuple[str, Prompt]]:
    """File and prompt of each picture of a folder in the benchmark's layout; prompts keep their official numbers.

    Raises:
        UserError: no such folder or layout, a prompt that GenEval has not, pictures that are missing.
    """
    check_folder(folder)
    with readable(f"the folder {folder}"):
        there = {path: _numbered(path / SAMPLES, ".png") for path in _numbered(folder)}
    count = max((len(samples) for samples in there.values()), default=0)
    if not count:
        raise UserError(f"no images in {folder}; GenEval's lie as 00000/{SAMPLES}/00000.png with 00000/{METADATA}")
    short = [f"{path.name} has {len(samples)}" for path, samples in there.items() if len(samples) < count]
    if short:
        more = f" and {len(short) - 3} more" if len(short) > 3 else ""
        raise UserError(f"{folder}: images are missing: {', '.join(short[:3])}{more}; expected {count} of each prompt")
    known = {prompt.text: prompt for prompt in official_prompts()}
    pictures = []
    for path, samples in there.items():
        prompt = _prompt(path, known)
        pictures += [(sample.relative_to(folder).as_posix(), prompt) for sample in samples]
    return pictures


def _numbered(folder: Path, suffix: str = "") -> list[Path]:
    """The folders in a folder, or the files with a suffix, that have a number as their name, in this order."""
    inside = folder.iterdir() if folder.is_dir() else ()
    paths = [one for one in inside if one.stem.isdecimal() and one.suffix == suffix and one.is_file() == bool(suffix)]
    return sorted(paths, key=lambda path: (int(path.stem), path.name))


def official_row(prompt: Prompt, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the official evaluator, whose `details` are the boxes that counted, {class: [[x0, y0, x1, y1, score]]}.

    Args:
        verdict: of `geneval.judge_batch`.
    """
    row = verdict["row"]
    return {
        "filename": row["file"],
        **{key: row[key] for key in ("tag", "prompt", "correct", "reason")},
        "metadata": json.dumps(prompt.metadata()),
        "details": json.dumps(verdict["kept"]),
    }


def _prompt(folder: Path, known: dict[str, Prompt]) -> Prompt:
    """The official prompt of a folder, or one that the templates make, numbered after the official ones."""
    path = folder / METADATA
    row = read_json(path)
    text = row.get("prompt")
    if not isinstance(text, str):
        raise UserError(f"{path} names no prompt")
    try:
        prompt = known.get(text) or parse_prompt(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if prompt.index < 0:
        prompt = replace(prompt, index=len(known) + int(folder.name))
    if any(key in row and row[key] != value for key, value in prompt.metadata().items()):
        raise UserError(f"{path}: tag, include and exclude are not those of GenEval's prompt {text!r}")
    return prompt


def failure_sheet(rows: Sequence[dict[str, Any]], folder: Path, thresholds: Thresholds) -> Image.Image:
    """Rows of results.jsonl whose images lie in `folder` as one picture: boxes that were found, and the reasons."""
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
