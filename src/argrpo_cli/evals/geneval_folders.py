"""GenEval's pictures on disk: the benchmark's own layout, written and read, and the nano world's.

The benchmark's generation script writes, and its evaluator reads,

    FOLDER/00007/metadata.jsonl          one line, the prompt as evaluation_metadata.jsonl has it
    FOLDER/00007/samples/00000.png       its first picture

and the evaluator a line for each picture that `summary_scores.py` reads (here `results.official.jsonl`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli.geneval.grammar import Prompt, parse_prompt
from argrpo_cli.geneval.prompts import official_prompts
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, reason, write_text

METADATA, SAMPLES = "metadata.jsonl", "samples"
SAMPLE = re.compile(r"(\d+)\.png")
OFFICIAL_SET = "geneval"


@dataclass(frozen=True)
class Picture:
    """One picture to be judged: `file` in its folder, what it should show, and which of its prompt's it is."""

    file: str
    prompt: Prompt
    sample: int


def planned(prompts: Sequence[Prompt], per_prompt: int, official: bool) -> list[Picture]:
    """The pictures of prompts in the benchmark's layout, or in one folder."""
    name = "{0:05d}/" + SAMPLES + "/{1:05d}.png" if official else "{0:05d}-{1}.png"
    return [
        Picture(name.format(prompt.index, sample), prompt, sample) for prompt in prompts for sample in range(per_prompt)
    ]


def write_metadata(folder: Path, prompts: Sequence[Prompt]) -> None:
    """The prompt of each folder of the benchmark's layout."""
    for prompt in prompts:
        path = folder / f"{prompt.index:05d}" / METADATA
        if not path.is_file():
            write_text(path, json.dumps(prompt.metadata()) + "\n")


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures of a folder in the benchmark's layout, whoever wrote it; prompts keep their official numbers.

    Raises:
        UserError: no such folder or layout, a prompt that GenEval has not, pictures that are missing.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder of images")
    try:
        inside = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
        there = {
            path: _samples(path / SAMPLES) for path in sorted(inside, key=lambda path: (int(path.name), path.name))
        }
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {reason(error)}") from error
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
        for sample, name in enumerate(samples):
            pictures.append(Picture(f"{path.name}/{SAMPLES}/{name}", prompt, sample))
    return pictures


def absent(pictures: Sequence[Picture]) -> int:
    """How many of the official prompts have no picture."""
    return len(official_prompts()) - len({one.prompt.text for one in pictures} & {p.text for p in official_prompts()})


def official_row(file: str, prompt: Prompt, correct: bool, why: str, details: dict[str, Any]) -> dict[str, Any]:
    """A line of the official evaluator; `details` are the boxes that counted, {class: [[x0, y0, x1, y1, score]]}."""
    return {
        "filename": file,
        "tag": prompt.tag,
        "prompt": prompt.text,
        "correct": correct,
        "reason": why,
        "metadata": json.dumps(prompt.metadata()),
        "details": json.dumps(details),
    }


def _samples(folder: Path) -> list[str]:
    """Names of the pictures in the order of their numbers."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if SAMPLE.fullmatch(path.name)]
    return sorted(names, key=lambda name: (int(SAMPLE.fullmatch(name)[1]), name))


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
        prompt = Prompt(len(known) + int(folder.name), prompt.tag, prompt.text, prompt.include, prompt.exclude)
    if any(key in row and row[key] != value for key, value in prompt.metadata().items()):
        raise UserError(f"{path}: tag, include and exclude are not those of GenEval's prompt {text!r}")
    return prompt
