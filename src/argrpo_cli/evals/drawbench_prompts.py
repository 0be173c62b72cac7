"""The prompts of DrawBench: of a file, of the hub, and whether they are the benchmark's own.

DrawBench (Saharia et al. 2022, section 4.3) has no licence that lets its prompts travel with this package, so only the
SHA-256 of each is here, of the list that the AR-GRPO authors evaluate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argrpo_cli.captions import CAPTION_SETS, file_rows, read_captions
from argrpo_cli.system.errors import UserError, first_line
from argrpo_cli.system.files import expanded
from argrpo_cli.system.hub import quiet_hub

HUB = "sayakpaul/drawbench"
FINGERPRINT = Path(__file__).with_name("drawbench_prompts.sha256")
PROMPT_COLUMNS = ("Prompts", "prompts", "Prompt", "prompt", "caption", "text")  # names under which files have them
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

    def remark(self) -> str:
        """What to warn of, where these are not DrawBench's, all of them and no other; else ""."""
        total, own = len(published_hashes()), len(self.prompts) - self.matching
        if not own and self.matching == total:
            return ""
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


def read_prompts(source: str, limit: int | None = None) -> PromptList:
    """Prompts of a file, a bundled set of captions (`captions.CAPTION_SETS`), or a data set of the hub.

    Files: .txt (one a line), .jsonl, .csv or .tsv with a column of `PROMPT_COLUMNS`, .json with a list of texts, of
    objects with such a key, or of the AR-GRPO authors' `conversations`. Of a data set `owner/name` the first split is
    read.

    Args:
        limit: only so many, from the start.

    Raises:
        UserError: no such file or set, no prompts in it, the hub is not reached.
    """
    path = expanded(source)
    if source in CAPTION_SETS:
        texts = read_captions(source)
    elif path.is_file():
        texts = _texts(file_rows(path), path)
    elif path.suffix in SUFFIXES or source.count("/") != 1:
        raise UserError(
            f"no prompts {source!r}: give a file ({', '.join(SUFFIXES)}), a data set of the hub such as {HUB}, "
            f"or one of {', '.join(CAPTION_SETS)}"
        )
    else:
        texts = _of_hub(source)
    prompts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not prompts:
        raise UserError(f"{source} holds no prompts")
    return PromptList(source, tuple(prompts[:limit]))


def _texts(rows: Sequence[str | Mapping[str, Any]], source: Path) -> list[str]:
    """The prompts of rows: under a name of `PROMPT_COLUMNS`, or what the human says first in `conversations`."""
    if all(isinstance(row, str) for row in rows):
        return list(rows)
    rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    if "conversations" in rows[0]:
        turns = [row.get("conversations") for row in rows]
        firsts = [turn[0] if isinstance(turn, list) and turn else None for turn in turns]
        texts = [first.get("value") if isinstance(first, dict) else None for first in firsts]
    else:
        column = _column(rows[0], str(source), f"name it {PROMPT_COLUMNS[0]} or {PROMPT_COLUMNS[3]}")
        texts = [row.get(column) for row in rows]
    bad = next((number for number, text in enumerate(texts, 1) if not isinstance(text, str)), None)
    if bad is not None:
        raise UserError(f"{source}, row {bad}: its prompt is missing or not text")
    return texts


def _column(names: Iterable[str], source: str, mend: str) -> str:
    """The one of `PROMPT_COLUMNS` that there is."""
    column = next((name for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        raise UserError(f"{source}: no column of prompts (it has {', '.join(map(str, names))}); {mend}")
    return column


def _of_hub(name: str) -> list[str]:
    """The prompts of a data set of the hub, fetched once into its cache."""
    import datasets

    mend = "download its prompts and give the file as --prompts"
    try:
        with quiet_hub():
            loaded = datasets.load_dataset(name)
    except Exception as error:  # of the hub, the network, a parser: whatever it is, the set cannot be read
        raise UserError(f"cannot fetch the data set {name} of the hub: {first_line(error)}; {mend}") from error
    table = next(iter(loaded.values()))
    column = _column(table.column_names, f"the data set {name}", mend)
    return [str(text) for text in table[column]]
