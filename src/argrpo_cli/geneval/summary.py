"""GenEval's score of many images: the share of correct ones in each category, and the plain mean of the categories.

    summary = summarise([(prompt, verdict.correct), ...])      # usually four images of each prompt
    summary.overall.mean, summary.by_tag["counting"].error

Standard errors are clustered by prompt (`clusters.py`). Categories share no prompts, so the error of the mean of T of
them is sqrt(sum_t error_t^2) / T. It covers the choice of the prompts as well as that of the seeds; for the difference
of two policies on the same prompts, give `tag_scores` the differences.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from argrpo_cli.clusters import clustered_mean
from argrpo_cli.geneval.grammar import Prompt
from argrpo_cli.system.errors import UserError


@dataclass(frozen=True)
class Score:
    """A mean over images and its standard error (NaN where a category has a single prompt)."""

    mean: float
    error: float
    images: int
    prompts: int


@dataclass(frozen=True)
class Summary:
    """What the official summary prints, with standard errors. A prompt is correct when one of its images is."""

    by_tag: dict[str, Score]
    overall: Score
    correct_images: float
    correct_prompts: float


def summarise(outcomes: Iterable[tuple[Prompt, bool]]) -> Summary:
    """The scores of (prompt, is its image correct), one for each image."""
    rows = list(outcomes)
    by_tag, overall = tag_scores(rows)
    by_prompt: dict[Prompt, bool] = defaultdict(bool)
    for prompt, correct in rows:
        by_prompt[prompt] |= bool(correct)
    images = sum(bool(correct) for _, correct in rows) / len(rows)
    return Summary(by_tag, overall, images, sum(by_prompt.values()) / len(by_prompt))


def tag_scores(values: Iterable[tuple[Prompt, float]]) -> tuple[dict[str, Score], Score]:
    """The score of each category, in the order of its first prompt, and their plain mean over the categories."""
    groups: dict[str, dict[Prompt, list[float]]] = defaultdict(lambda: defaultdict(list))
    for prompt, value in values:
        groups[prompt.tag][prompt].append(float(value))
    if not groups:
        raise UserError("there are no images to summarise")
    by_tag = {
        tag: Score(*clustered_mean(list(group.values())), sum(map(len, group.values())), len(group))
        for tag, group in groups.items()
    }
    scores = list(by_tag.values())
    overall = Score(
        mean=sum(score.mean for score in scores) / len(scores),
        error=math.sqrt(sum(score.error**2 for score in scores)) / len(scores),
        images=sum(score.images for score in scores),
        prompts=sum(score.prompts for score in scores),
    )
    return by_tag, overall
