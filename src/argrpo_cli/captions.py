"""Captions by name or from a file: what text-conditional sampling, training and measuring are asked to draw."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from argrpo_cli.geneval.prompts import SETS, TAGS, Prompt, content, mirrored, prompt_set
from argrpo_cli.system.errors import UserError, did_you_mean
from argrpo_cli.system.files import expanded, read_jsonl, read_text
from argrpo_cli.system.plain import lines_of, parse_json, unguarded

CAPTION_SETS = ("nano", *SETS)
PER_CATEGORY, SEED = 72, 7  # of the set nano
SHARED = ("single_object", "counting")  # the benchmark asks nearly all of their few captions: these are trained on, too


def read_captions(source: str | list[str], column: str = "prompt", each: bool = False) -> list[str]:
    """Captions from a list, a bundled name (`CAPTION_SETS`), or a file: see `file_rows`.

    Args:
        column: of a file with columns; several captions in it count each, and a row without any is left out.
        each: the rows belong to pictures, so that each must have exactly one.

    Raises:
        UserError: no such file, or no captions in it.
    """
    if isinstance(source, list):
        return source
    if source == "nano":
        return list(nano_captions())
    if source in SETS:
        return [prompt.text for prompt in prompt_set(source)]
    path = expanded(source)
    if not path.is_file():
        hint = did_you_mean(source, CAPTION_SETS)
        raise UserError(f"no captions {source!r}: not a file, and the bundled ones are {', '.join(CAPTION_SETS)}{hint}")
    captions: list[str] = []
    for number, row in enumerate(file_rows(path), start=1):
        where = f"{path}, {'line' if path.suffix.lower() == '.jsonl' else 'row'} {number}"
        texts = captions_in({column: row.strip()} if isinstance(row, str) else row, column, where)
        if each and len(texts) != 1:
            raise UserError(f"{where}: {column!r} holds {len(texts)} captions; give one for each picture")
        captions += texts
    if not captions:
        raise UserError(f"{path} holds no captions; write one a line")
    return captions


def file_rows(path: Path) -> list[str | dict[str, Any]]:
    """The texts, or rows with columns, of a .jsonl, .csv or .tsv file, of a list in a .json file, or of lines of text.

    Raises:
        UserError: a file that cannot be read, or that its name does not tell the kind of.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return read_jsonl(path)
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","))
        except csv.Error as error:
            raise UserError(f"cannot read {path}: {error}") from error
        return [{key: unguarded(cell) for key, cell in row.items() if key is not None} for row in rows]
    if suffix != ".json":
        return [line for line in lines_of(text) if line.strip()]
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise UserError(f"cannot read {path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, str | dict) for row in rows):
        raise UserError(f"cannot read {path}: expected a list of texts or of objects")
    return rows


@cache
def nano_captions() -> tuple[str, ...]:
    """Captions to train on: the nano world's grammar without what the benchmark asks.

    Distinct ones, at most `PER_CATEGORY` of each category, categories in turn. There are 24 captions of a single object
    and 72 of two to four, and the benchmark asks for most of them; those two categories are not held out. Of the others
    no caption asks for what a prompt of the benchmark asks, in any order of words ('a cat and a dog', 'a dog right of a
    cat').
    """
    import numpy as np

    from argrpo_cli.nano.scenes import caption_scene

    rng = np.random.default_rng(SEED)
    rows: list[list[str]] = []
    for tag in TAGS:
        captions: dict[str, None] = {}
        for _ in range(40 * PER_CATEGORY):  # enough to meet every caption of the small categories
            prompt = caption_scene(rng, tag).prompt
            if prompt.tag == tag and len(captions) < PER_CATEGORY and not asked_by_the_benchmark(prompt):
                captions[prompt.text] = None
        rows.append(list(captions))
    return tuple(row[place] for place in range(PER_CATEGORY) for row in rows if place < len(row))


@cache
def _benchmark() -> frozenset[Any]:
    return frozenset(content(prompt) for name in ("geneval", "geneval-nano-extra") for prompt in prompt_set(name))


def asked_by_the_benchmark(prompt: Prompt) -> bool:
    """Whether GenEval, or its nano version, asks for the same in any words, where a category is held out."""
    asked = content(prompt) in _benchmark() or (prompt.tag == "position" and content(mirrored(prompt)) in _benchmark())
    return asked and prompt.tag not in SHARED


def captions_in(row: dict[str, Any], column: str, where: str) -> list[str]:
    """The captions in one row of data: a text, a list of texts or null; empty ones are left out.

    Raises:
        UserError: `where` the row is, when it has no such column or something else in it.
    """
    if column not in row:
        hint = did_you_mean(column, row) or f"; there are {', '.join(row)} (conditions.column chooses)"
        raise UserError(f"{where}: {column!r} is missing{hint}")
    value = row[column]
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if bad := [text for text in texts if text is not None and not isinstance(text, str)]:
        raise UserError(f"{where}: {column!r} holds a {type(bad[0]).__name__}, expected text or a list of texts")
    return [text for text in texts if text and text.strip()]


def normalized(caption: str) -> str:
    """A caption with single spaces: two are the same when this is."""
    return " ".join(caption.split())


def distinct(captions: Iterable[str]) -> Iterator[str]:
    """Each caption once, as it was first written, in the order of the first time."""
    seen: set[str] = set()
    for caption in captions:
        if (key := normalized(caption)) not in seen:
            seen.add(key)
            yield caption
