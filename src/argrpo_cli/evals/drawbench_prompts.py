"""DrawBench's 200 prompts (Saharia et al. 2022, section 4.3): from the hub or a file, checked against their hashes.

The prompts have no licence that lets them travel with this package, so only the SHA-256 of each is here, of the list
that the AR-GRPO authors evaluate (200 prompts, five times over).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli.captions import CAPTION_SETS, read_captions
from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.files import read_jsonl, read_text

HUB = "sayakpaul/drawbench"
FINGERPRINT = Path(__file__).with_name("drawbench_prompts.sha256")
COLUMNS = ("Prompts", "prompts", "Prompt", "prompt", "caption", "text")  # names under which files have them
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".json")


@dataclass(frozen=True)
class PromptList:
    """Prompts to draw, each once, in the order of their first mention, and where they come from."""

    source: str
    prompts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the prompts, a line each."""
        return digest("\n".join(self.prompts))

    @property
    def matching(self) -> int:
        """How many are among DrawBench's 200."""
        return len({digest(prompt) for prompt in self.prompts} & published_hashes())

    @property
    def official(self) -> bool:
        """Whether they are DrawBench's, all of them and no other."""
        return self.matching == len(self.prompts) == len(published_hashes())

    def remark(self) -> str:
        """What to warn of, or ""."""
        if self.official:
            return ""
        total = len(published_hashes())
        own = len(self.prompts) - self.matching
        others = f", and {own} are others" if own else ""
        return (
            f"the prompts of {self.source} are not DrawBench's list: {self.matching} of its {total} are among "
            f"them{others}; the numbers do not compare with the paper's table 4"
        )


def digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def published_hashes() -> set[str]:
    """SHA-256 of each of DrawBench's 200 prompts."""
    return set(FINGERPRINT.read_text("ascii").split())


def read_prompts(given: str, limit: int | None = None) -> PromptList:
    """Prompts of a file, a bundled set of captions (`captions.CAPTION_SETS`), or a data set of the hub.

    Files: .txt (one a line), .jsonl, .csv or .tsv with a column of `COLUMNS`, .json with a list of texts, of objects
    with such a key, or of the AR-GRPO authors' `conversations`. Of a data set `owner/name` the first split is read.

    Args:
        limit: only so many, from the start.

    Raises:
        UserError: no such file or set, no prompts in it, the hub is not reached.
    """
    path = Path(given).expanduser()
    if given in CAPTION_SETS:
        found: Iterable[str] = read_captions(given)
    elif path.is_file():
        found = _of_file(path)
    elif path.suffix in SUFFIXES or given.count("/") != 1:
        raise UserError(
            f"no prompts {given!r}: give a file ({', '.join(SUFFIXES)}), a data set of the hub such as {HUB}, "
            f"or one of {', '.join(CAPTION_SETS)}"
        )
    else:
        found = _of_hub(given)
    prompts = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    if not prompts:
        raise UserError(f"{given} holds no prompts")
    return PromptList(given, tuple(prompts[:limit]))


def _of_file(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return _of_rows(read_jsonl(path), path)
    if path.suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t" if path.suffix == ".tsv" else ",")
        return _of_rows(list(reader), path)
    if path.suffix == ".json":
        return _of_json(path)
    return read_text(path).splitlines()


def _of_json(path: Path) -> list[str]:
    try:
        rows = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"cannot read {path}: it is not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, str | dict) for row in rows):
        raise UserError(f"cannot read {path}: expected a list of texts or of objects")
    if all(isinstance(row, str) for row in rows):
        return rows
    return _of_rows([row if isinstance(row, dict) else {"prompt": row} for row in rows], path)


def _of_rows(rows: Sequence[Mapping[str, Any]], source: object) -> list[str]:
    """The prompts of rows: under a name of `COLUMNS`, or what the human says first in `conversations`."""
    if rows and "conversations" in rows[0]:
        turns = [row.get("conversations") for row in rows]
        said = [turn[0].get("value") if isinstance(turn, list) and turn else None for turn in turns]
    else:
        column = next((name for name in COLUMNS if rows and name in rows[0]), None)
        if column is None:
            has = f"it has {', '.join(map(str, rows[0]))}" if rows else "it is empty"
            raise UserError(f"{source}: no column of prompts ({has}); name it {COLUMNS[0]} or {COLUMNS[3]}")
        said = [row.get(column) for row in rows]
    bad = next((number for number, text in enumerate(said, 1) if not isinstance(text, str)), None)
    if bad is not None:
        raise UserError(f"{source}, row {bad}: its prompt is missing or not text")
    return said


def _of_hub(name: str) -> list[str]:
    """The prompts of a data set of the hub, fetched once into its cache."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    mend = "download its prompts and give the file as --prompts"
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells of every attempt; the outcome is enough
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # of the hub, the network, a parser: whatever it is, the set cannot be read
        raise UserError(f"cannot fetch the data set {name} of the hub: {first_line(error)}; {mend}") from error
    finally:
        hub_logging.set_verbosity(level)
    table = next(iter(loaded.values()))
    column = next((key for key in COLUMNS if key in table.column_names), None)
    if column is None:
        raise UserError(
            f"the data set {name} has no column of prompts (it has {', '.join(table.column_names)}); {mend}"
        )
    return [str(text) for text in table[column]]
