"""GenEval's verdict on one image, from what a detector found in it.

    verdict = judge_image(prompt, {"dog": [Detection((10, 12, 60, 58), 0.97)]}, classify_color)
    verdict.correct, verdict.reason

`classify_color(name, detections)` gives one colour word for each of these detections of class `name`; it is called
only when a prompt asks for a colour and there are enough objects. Boxes and scores are compared in float32, as the
official script does: a score that is 0.3 in float32 is not above the threshold 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from argrpo_cli.geneval.prompts import COLORS, Prompt, Requirement


@dataclass(frozen=True)
class Thresholds:
    """The official settings. Scores must exceed theirs; `nms_threshold` 1 keeps overlapping boxes of a class."""

    threshold: float = 0.3
    counting_threshold: float = 0.9  # for the category `counting`, where a doubtful extra object costs the point
    max_objects: int = 16  # of a class
    nms_threshold: float = 1.0
    position_threshold: float = 0.1  # share of the objects' sides by which their centres may differ unnoticed

    def least(self, tag: str) -> float:
        """What a score must exceed in a category."""
        return self.counting_threshold if tag == "counting" else self.threshold


OFFICIAL = Thresholds()


@dataclass(frozen=True)
class Detection:
    """A found object: box (x0, y0, x1, y1) in pixels and score; `index` leads a caller to its mask or colour."""

    box: tuple[float, float, float, float]
    score: float
    index: int | None = None


Detections = Mapping[str, Sequence[Detection]]
ClassifyColor = Callable[[str, Sequence[Detection]], Sequence[str]]


@dataclass(frozen=True)
class Verdict:
    """Is the image correct, why not (a line for each failed requirement), and the objects that were looked at."""

    correct: bool
    reason: str
    kept: dict[str, tuple[Detection, ...]]


def judge_image(
    prompt: Prompt, detections: Detections, classify_color: ClassifyColor, thresholds: Thresholds = OFFICIAL
) -> Verdict:
    """The official verdict. Of each class only the `count` best objects are looked at for colour and position.

    More objects than asked for are a fault only where the prompt excludes them (category `counting`). Relations in
    a reason are in alphabetical order; the official script prints them in the order of a Python set.
    """
    kept = select(detections, prompt.tag, thresholds)
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # of each requirement the objects that meet it
    for requirement in prompt.include:
        objects = kept.get(requirement.name, ())[: requirement.count]
        reason = None
        if len(objects) < requirement.count:
            reason = f"expected {requirement.name}>={requirement.count}, found {len(objects)}"
        else:
            if requirement.color is not None:
                reason = _color_fault(requirement, classify_color(requirement.name, objects))
            if requirement.position is not None and reason is None:
                reason = _position_fault(requirement, objects, groups, thresholds)
        groups.append(objects if reason is None else None)
        reasons += [] if reason is None else [reason]
    for exclusion in prompt.exclude:
        count = len(kept.get(exclusion.name, ()))
        if count >= exclusion.count:
            reasons.append(f"expected {exclusion.name}<{exclusion.count}, found {count}")
    return Verdict(not reasons, "\n".join(reasons), kept)


def reward_score(
    prompt: Prompt, detections: Detections, classify_color: ClassifyColor, thresholds: Thresholds = OFFICIAL
) -> tuple[float, float]:
    """The reward server's form, which Flow-GRPO and AR-GRPO query: a score, at most 1, and the verdict with exact
    counts, 1 or 0. (AR-GRPO uses GenEval's own verdict, which the server gives, too.)

    The score is the mean of these terms, for each requirement: 1 - |count wanted - count found| / count wanted; for
    a colour the same with the objects of that colour, for a position 1. Where the count is wrong, one 0 stands for
    both. Kept from the original: the score is negative when more than twice the count is found, and a position that
    fails adds 0 *and* 1, or 0 where its target failed. Excluded objects lower neither.
    """
    kept = select(detections, prompt.tag, thresholds)
    terms: list[float] = []
    strict = True
    groups: list[Sequence[Detection] | None] = []
    for requirement in prompt.include:
        objects = kept.get(requirement.name, ())
        terms.append(1 - abs(requirement.count - len(objects)) / requirement.count)
        matched = len(objects) == requirement.count
        if not matched:
            terms += [0.0] if requirement.color is not None or requirement.position is not None else []
        else:
            if requirement.color is not None:
                right = list(classify_color(requirement.name, objects)).count(requirement.color)
                terms.append(1 - abs(requirement.count - right) / requirement.count)
                matched = right == requirement.count
            if requirement.position is not None and matched:
                matched = _position_fault(requirement, objects, groups, thresholds) is None
                no_target = groups[requirement.position[1]] is None
                terms += [1.0] if matched else [0.0] if no_target else [0.0, 1.0]
        groups.append(objects if matched else None)
        strict = strict and matched
    return sum(terms) / len(terms) if terms else 0.0, float(strict)


def select(detections: Detections, tag: str, thresholds: Thresholds = OFFICIAL) -> dict[str, tuple[Detection, ...]]:
    """The objects that count, best first: above the threshold, at most `max_objects` of a class, then NMS.

    Classes of which nothing is left are left out. Of equal scores the later detection comes first.
    """
    least = np.float32(thresholds.least(tag))
    kept = {}
    for name, objects in detections.items():
        scores = np.array([detection.score for detection in objects], np.float32)
        order = np.argsort(scores, kind="stable")[::-1]
        ranked = [objects[place] for place in order if scores[place] > least][: thresholds.max_objects]
        survivors: list[Detection] = []
        for detection in ranked:
            # At 1 no box suppresses another, not even its exact copy.
            if thresholds.nms_threshold == 1 or all(
                iou(detection.box, better.box) < np.float32(thresholds.nms_threshold) for better in survivors
            ):
                survivors.append(detection)
        if survivors:
            kept[name] = tuple(survivors)
    return kept


def colored_objects(
    prompt: Prompt, detections: Detections, thresholds: Thresholds = OFFICIAL
) -> list[tuple[str, Detection]]:
    """The objects, with their class, whose colour `judge_image` and `reward_score` ask for: to answer in one batch."""
    kept = select(detections, prompt.tag, thresholds)
    requirements = [part for part in prompt.include if part.color is not None]
    pairs = [(part, kept.get(part.name, ())[: part.count]) for part in requirements]
    return [(part.name, one) for part, objects in pairs if len(objects) == part.count for one in objects]


def iou(box_a: Sequence[float], box_b: Sequence[float]) -> np.float32:
    """Intersection over union of two boxes whose last pixel belongs to them: a side is x1 - x0 + 1 long."""
    a, b = np.asarray(box_a, np.float32), np.asarray(box_b, np.float32)
    shared = _area(np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:]))
    union = _area(a[:2], a[2:]) + _area(b[:2], b[2:]) - shared
    return shared / union if union else np.float32(0)


def relative_position(
    box_a: Sequence[float], box_b: Sequence[float], position_threshold: float = OFFICIAL.position_threshold
) -> tuple[str, ...]:
    """Where a lies from b: none, one or two of "above", "below", "left of" and "right of", in this order.

    The offset of the centres is shortened, per axis, by `position_threshold` times the sum of the two sides; a
    relation holds when what is left is more than half the length of the whole offset.
    """
    a, b = (np.asarray(box, np.float32).reshape(2, 2) for box in (box_a, box_b))
    offset = a.mean(0) - b.mean(0)
    sides = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    rest = np.sign(offset) * np.maximum(np.abs(offset) - np.float32(position_threshold) * sides, 0)
    if np.all(np.abs(rest) < 1e-3):
        return ()
    x, y = rest / np.linalg.norm(offset)
    holds = {"above": y < -0.5, "below": y > 0.5, "left of": x < -0.5, "right of": x > 0.5}
    return tuple(relation for relation, true in holds.items() if true)


def _area(low: np.ndarray, high: np.ndarray) -> np.float32:
    return np.prod(np.maximum(high - low + 1, 0))


def _color_fault(requirement: Requirement, colors: Sequence[str]) -> str | None:
    colors = list(colors)
    right = colors.count(requirement.color)
    if right >= requirement.count:
        return None
    counts = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    color, name = requirement.color, requirement.name
    return f"expected {color} {name}>={requirement.count}, found {right} {color}; and {counts}"


def _position_fault(
    requirement: Requirement,
    objects: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    thresholds: Thresholds,
) -> str | None:
    """The first of the objects that does not stand as wanted to one of the target's; a target that failed fails it."""
    relation, index = requirement.position
    targets = groups[index]
    if targets is None:
        return f"no target for {requirement.name} to be {relation}"
    for detection in objects:
        for target in targets:
            relations = relative_position(detection.box, target.box, thresholds.position_threshold)
            if relation not in relations:
                return f"expected {requirement.name} {relation} target, found {' and '.join(relations)} target"
    return None
