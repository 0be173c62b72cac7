"""Entropies as tests ask for them: of a policy along tokens, and what is measured of several."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from argrpo_cli.draw import score_tokens
from argrpo_cli.evals import entropy
from argrpo_cli.evals.entropy_results import NamedPolicy, Question
from argrpo_cli.image_labels import open_labelled, some_of
from argrpo_cli.policy.protocol import Policy
from argrpo_cli.shapes import Condition, Sampling
from argrpo_cli.system.processes import ALONE


def entropy_of(
    policy: Policy,
    tokens: Tensor,
    conditions: Sequence[Condition],
    cfg_scale: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Entropies [B, T]; conditional without a scale."""
    sampling = Sampling(cfg_scale=cfg_scale or 1.0, temperature=temperature)
    return score_tokens(policy, conditions, tokens, sampling).entropy


def measure(
    subjects: Sequence[NamedPolicy],
    question: Question,
    sampling: Sampling | dict[str, Any] = Sampling(),
    batch_size: int = 64,
    folder: Path | None = None,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Rows; what is measured is kept nowhere, or in a folder."""
    options = asdict(sampling) if isinstance(sampling, Sampling) else sampling
    with tempfile.TemporaryDirectory() as temporary:
        return entropy.measure(subjects, question, options, batch_size, ALONE, folder or Path(temporary), cache)


def along(folder: Path, limit: int | None = None) -> Question:
    """The question of the pictures of a folder."""
    return Question(limit=limit, data=some_of(open_labelled(folder), limit))
