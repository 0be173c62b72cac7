"""Golden cases of GenEval: inputs and what the official code (djghosh13/geneval, af4902f2) answers to them.

`decisions.jsonl.gz`: the prompt (the number of its `line` in the official list, or made-up `metadata`), settings that
differ from the official ones, detections with the ten colours' CLIP logits, and the verdict; `reward` is the answer
of the reward server that AR-GRPO ships. `positions.jsonl.gz`: pairs of boxes. `crops.npz`: images, masks, boxes and the
crops that CLIP gets, with the options of each case in `crops.json`. `summary.json`: the summary of all decisions
on official prompts with official settings. Numbers that were float32 are written with as many digits as that takes.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from argrpo_cli.geneval.observers import crop_for_color, pick_colors
from argrpo_cli.geneval.prompts import Prompt, Requirement, official_prompts
from argrpo_cli.geneval.rules import ClassifyColor, Detection

DATA = Path(__file__).parents[1] / "data" / "geneval"


@cache
def decisions() -> list[dict[str, Any]]:
    return _lines("decisions.jsonl.gz")


@cache
def positions() -> list[dict[str, Any]]:
    return _lines("positions.jsonl.gz")


def crops() -> list[dict[str, Any]]:
    """One dictionary a case: image, mask (or None), box, crop, and the official options."""
    options = json.loads((DATA / "crops.json").read_text())
    with np.load(DATA / "crops.npz") as arrays:
        return [
            {"options": option, **{key: arrays.get(f"{key}_{index}") for key in ("image", "mask", "box", "crop")}}
            for index, option in enumerate(options)
        ]


def summary_numbers() -> dict[str, Any]:
    return json.loads((DATA / "summary.json").read_text())


def prompt_of(case: dict[str, Any]) -> Prompt:
    return official_prompts()[case["line"]] if "line" in case else prompt_from(case["metadata"])


def prompt_from(row: dict[str, Any], index: int = 0) -> Prompt:
    """The inverse of `Prompt.metadata`."""
    parts = {
        key: tuple(
            Requirement(
                one["class"], one["count"], one.get("color"), tuple(one["position"]) if "position" in one else None
            )
            for one in row.get(key, ())
        )
        for key in ("include", "exclude")
    }
    return Prompt(index, row["tag"], row["prompt"], **parts)


def detections_of(case: dict[str, Any]) -> dict[str, list[Detection]]:
    """The detections with float32 values, as a detector gives them."""
    return {
        name: [
            Detection(tuple(np.float32(row["box"]).tolist()), float(np.float32(row["score"])), index)
            for index, row in enumerate(rows)
        ]
        for name, rows in case["detections"].items()
    }


def classifier_of(case: dict[str, Any]) -> ClassifyColor:
    """Answers with the colours of the case's logits."""
    logits = {name: [row["clip_logits"] for row in rows] for name, rows in case["detections"].items()}
    return lambda name, found: pick_colors(np.array([logits[name][detection.index] for detection in found]))


def _lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def color_classifier(image, masks, color_logits):
    """The colours of one image's objects, crop by crop; `masks[name][detection.index]` is a detection's mask."""

    def classify(name, detections):
        crops = [crop_for_color(image, masks[name][one.index], one.box) for one in detections]
        return pick_colors(color_logits(name, crops))

    return classify
