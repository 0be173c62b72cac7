"""Judging GenEval's pictures from their files: objects, colours, verdicts; by several processes, and taken up again.

What is judged so far lies in `.judging`, a file for each batch; `results.jsonl` is written when all are.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from argrpo_cli.evals.geneval_detectors import Judge
from argrpo_cli.evals.geneval_folders import Picture, official_row
from argrpo_cli.geneval.grammar import Prompt
from argrpo_cli.geneval.rules import ClassifyColor, Detection, Detections, judge_image
from argrpo_cli.images import read_image
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import make_dir, read_jsonl, write_jsonl
from argrpo_cli.system.processes import Team
from argrpo_cli.system.progress import shared_progress

RESULTS, OFFICIAL_RESULTS, JOURNAL = "results.jsonl", "results.official.jsonl", ".judging"


def judge_pictures(
    pictures: Sequence[Picture], folder: Path, out: Path, judge: Judge, batch_size: int, team: Team
) -> list[dict[str, Any]]:
    """The rows of results.jsonl, which it writes to `out` with results.official.jsonl.

    Args:
        folder: where the pictures lie.
        batch_size: pictures that are read and judged at a time.

    Raises:
        UserError: a picture that is missing or damaged, files that cannot be read or written.
    """
    wanted = [picture.file for picture in pictures]
    rows = team.from_lead(lambda: _finished(out / RESULTS, wanted))
    if rows is not None:
        return rows
    batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    known = team.from_lead(lambda: _judged(out / JOURNAL))
    left = [number for number, batch in enumerate(batches) if any(one.file not in known for one in batch)]

    def work() -> None:
        mine = left[team.index :: team.count]
        with shared_progress(team, f"judging {out.name}", sum(len(batches[number]) for number in mine)) as advance:
            for number in mine:
                write_jsonl(
                    make_dir(out / JOURNAL) / f"{number:06d}.jsonl", _judge_batch(batches[number], folder, judge)
                )
                advance(len(batches[number]))

    team.together(work)
    known = team.from_lead(lambda: _judged(out / JOURNAL))
    if gone := next((file for file in wanted if file not in known), None):
        raise UserError(f"{out} has no verdict on {gone}, though a process wrote it; give an --out that all share")
    rows = [known[file]["row"] for file in wanted]

    def finish() -> None:
        official = [
            official_row(one.file, one.prompt, row["correct"], row["reason"], known[one.file]["kept"])
            for one, row in zip(pictures, rows, strict=True)
        ]
        write_jsonl(out / OFFICIAL_RESULTS, official)
        write_jsonl(out / RESULTS, rows)
        shutil.rmtree(out / JOURNAL, ignore_errors=True)

    team.lead(finish)
    return rows


def _finished(path: Path, wanted: Sequence[str]) -> list[dict[str, Any]] | None:
    """The rows of an earlier call, None where they are not all there."""
    rows = {row.get("file"): row for row in read_jsonl(path)} if path.is_file() else {}
    return [rows[file] for file in wanted] if all(file in rows for file in wanted) else None


def _judged(journal: Path) -> dict[str, dict[str, Any]]:
    """What is judged so far, by the file of the picture."""
    lines = [line for path in sorted(journal.glob("[0-9]*.jsonl")) for line in read_jsonl(path)]
    return {line["row"]["file"]: line for line in lines}


def _judge_batch(pictures: Sequence[Picture], folder: Path, judge: Judge) -> list[dict[str, Any]]:
    """Lines of the journal, in order; pictures of one size are looked at together."""
    pixels = [read_image(folder / picture.file) for picture in pictures]
    lines: dict[int, dict[str, Any]] = {}
    for shape in dict.fromkeys(one.shape for one in pixels):
        places = [place for place, one in enumerate(pixels) if one.shape == shape]
        images = torch.from_numpy(np.stack([pixels[place] for place in places]))
        seen = judge.observer.observe(images, [pictures[place].prompt for place in places])
        for place, (detections, classify) in zip(places, seen, strict=True):
            lines[place] = _line(pictures[place], detections, classify, judge)
    return [lines[place] for place in range(len(pictures))]


def _line(picture: Picture, detections: Detections, classify: ClassifyColor, judge: Judge) -> dict[str, Any]:
    prompt: Prompt = picture.prompt
    colors: dict[tuple[str, int | None], str] = {}

    def classify_and_note(name: str, found: Sequence[Detection]) -> Sequence[str]:
        answers = classify(name, found)
        colors.update({(name, one.index): color for one, color in zip(found, answers, strict=True)})
        return answers

    verdict = judge_image(prompt, detections, classify_and_note, judge.observer.thresholds)
    if judge.names_every_color:
        for name, found in detections.items():
            classify_and_note(name, found)
    told = [(name, one) for name, found in detections.items() for one in found if one.score > judge.least_told]
    told.sort(key=lambda pair: -pair[1].score)
    row = {
        "file": picture.file,
        "index": prompt.index,
        "tag": prompt.tag,
        "prompt": prompt.text,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "objects": [
            {
                "class": name,
                "box": [round(side, 1) for side in one.box],
                "score": round(one.score, 4),
                "color": colors.get((name, one.index)),
            }
            for name, one in told
        ],
    }
    kept = {name: [[*one.box, one.score] for one in found] for name, found in verdict.kept.items()}
    return {"row": row, "kept": kept}
