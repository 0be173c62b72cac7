"""Captions by name or from a file: what text-conditional sampling, training and measuring are asked to draw."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.errors import UserError, did_you_mean
from argrpo_cli.files import read_jsonl, read_text

CAPTION_SETS = ("nano", "geneval", "geneval-nano", "geneval-nano-extra")


def read_captions(given: str | list[str]) -> list[str]:
    """Captions from a list, a bundled name (`CAPTION_SETS`), a text file (one a line) or a .jsonl file (`prompt`).

    Raises:
        UserError: no such file, or no captions in it.
    """
    if isinstance(given, list):
        return given
    if given == "nano":
        from argrpo_cli.nano.captions import training_captions

        return training_captions()
    if given in CAPTION_SETS:
        from argrpo_cli.geneval.prompts import prompt_set

        return [prompt.text for prompt in prompt_set(given)]
    path = Path(given).expanduser()
    if not path.is_file():
        hint = did_you_mean(given, CAPTION_SETS)
        raise UserError(f"no captions {given!r}: not a file, and the bundled ones are {', '.join(CAPTION_SETS)}{hint}")
    if path.suffix == ".jsonl":
        rows = read_jsonl(path)
        bad = next((number for number, row in enumerate(rows, 1) if not isinstance(row.get("prompt"), str)), None)
        if bad is not None:
            raise UserError(f"{path}, line {bad}: 'prompt' is missing or not text")
        captions = [row["prompt"] for row in rows]
    else:
        captions = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not captions:
        raise UserError(f"{path} holds no captions; write one a line")
    return captions
