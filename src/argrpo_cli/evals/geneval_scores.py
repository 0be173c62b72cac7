"""GenEval's figures from verdicts: categories and overall with standard errors, totals, a line for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from argrpo_cli.geneval.grammar import Prompt
from argrpo_cli.geneval.prompts import prompt_set
from argrpo_cli.geneval.summary import Score, summarise, tag_scores

Rows = Sequence[dict[str, Any]]  # of results.jsonl


def set_scores(rows: Rows, prompts: Sequence[Prompt], sets: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Categories and overall, for the first of some sets of prompts and, where there are more, for all together."""
    first = {prompt.index for prompt in prompt_set(sets[0])}
    parts = {sets[0]: [row for row in rows if row["index"] in first]}
    if len(sets) > 1:
        parts[" + ".join(sets)] = list(rows)
    return {name: part_scores(own, prompts) for name, own in parts.items()}


def part_scores(rows: Rows, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """Categories and overall of all rows: {category or "overall": {mean, error, images, prompts}}."""
    known = {prompt.index: prompt for prompt in prompts}
    by_tag, overall = tag_scores((known[row["index"]], float(row["correct"])) for row in rows)
    return {tag: _plain(score) for tag, score in by_tag.items()} | {"overall": _plain(overall)}


def totals(rows: Rows, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The two totals of the official summary: shares of correct images, and of prompts with a correct image."""
    known = {prompt.index: prompt for prompt in prompts}
    summary = summarise((known[row["index"]], row["correct"]) for row in rows)
    return {"correct_images": summary.correct_images, "correct_prompts": summary.correct_prompts}


def difference(first: Rows, second: Rows) -> list[dict[str, Any]]:
    """Rows whose `correct` is the first's less the second's, picture by picture."""
    return [{**a, "correct": a["correct"] - b["correct"]} for a, b in zip(first, second, strict=True)]


def by_prompt(rows: dict[str, Rows], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """A line per prompt: how many of its images are correct, and why not, policy by policy."""
    own: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in rows}
    for name, given in rows.items():
        for row in given:
            own[name].setdefault(row["index"], []).append(row)
    lines = []
    for prompt in prompts:
        line: dict[str, Any] = {"index": prompt.index, "tag": prompt.tag, "prompt": prompt.text}
        for name, images in ((name, own[name].get(prompt.index, [])) for name in rows):
            reasons = [row["reason"] for row in images if row["reason"]]
            line[name] = {"correct": sum(row["correct"] for row in images), "images": len(images), "reasons": reasons}
        lines.append(line)
    return lines


def _plain(score: Score) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    values = asdict(score)
    return {**values, "error": None if values["error"] != values["error"] else values["error"]}
